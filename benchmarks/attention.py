"""Self-attention by length, forward and with its gradients: our implementations beside torch's scaled_dot_product_attention.

    python benchmarks/attention.py [--lengths 256,512,1024,2048,4096] [--repeats 5] [--out FILE.json]

q, k, v are f32 [B, T, 4, 64] with B T = 4096, so that every row does the same number of projections' worth of tokens. Outputs are
asserted equal first; the runs alternate in one process; torch gets OMP_WAIT_POLICY=PASSIVE and as many threads as there are
cores; freed memory is kept, as under `ldm`. This is where attention.CHUNK_ABOVE comes from. Prints one JSON object a line and a table.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ldm_jax.kernels import attention, heap

HEADS, DEPTH, TOKENS = 4, 64, 4096
OURS = ("einsum", "chunked", "xla")


def functions(shape: tuple[int, ...], backward: bool) -> dict[str, callable]:
    """{name: () -> seconds} over the same q, k, v and the same output gradient."""
    r = np.random.RandomState(0)
    q, k, v, g = (r.randn(*shape).astype(np.float32) for _ in range(4))
    made, results = {}, {}
    for name in OURS:

        def forward(q, k, v, name=name):
            return attention.attention(q, k, v, implementation=name)

        def both(q, k, v, g, forward=forward):
            out, pull = jax.vjp(forward, q, k, v)
            return out, *pull(g)

        run = jax.jit(both if backward else forward)
        arguments = [jnp.asarray(a) for a in ((q, k, v, g) if backward else (q, k, v))]
        results[name] = np.asarray(jax.tree.leaves(run(*arguments))[-1])
        made[name] = lambda run=run, arguments=arguments: jax.block_until_ready(run(*arguments))

    tensors = [torch.tensor(a).transpose(1, 2).contiguous().requires_grad_(backward) for a in (q, k, v)]
    gradient = torch.tensor(g).transpose(1, 2).contiguous()

    def theirs():
        with torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(*tensors)
            return torch.autograd.grad(out, tensors, gradient)[-1] if backward else out

    expected = theirs().detach().transpose(1, 2).numpy()
    for name, got in results.items():
        assert np.abs(got - expected).max() < 1e-4, (name, np.abs(got - expected).max())
    return made | {"torch": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", default="256,512,1024,2048,4096")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the figures")
    options = parser.parse_args()
    heap.keep()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = []
    for backward in (False, True):
        for length in map(int, options.lengths.split(",")):
            shape = (max(1, TOKENS // length), length, HEADS, DEPTH)
            runs = functions(shape, backward)
            seconds = {name: [] for name in runs}
            for _ in range(options.repeats):
                for name, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - begin)
            middle = {name: statistics.median(values) for name, values in seconds.items()}
            rows.append(
                {
                    "shape": shape,
                    "backward": backward,
                    "auto": attention.choose(shape, length, jnp.float32, "cpu"),
                    "milliseconds": {name: round(1e3 * value, 2) for name, value in middle.items()},
                    "ratio_to_torch": {name: round(middle[name] / middle["torch"], 2) for name in OURS},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    names = [*OURS, "torch"]
    print("| B, T | what | " + " | ".join(f"{n}, ms" for n in names) + " | auto | its ratio |")
    print("|---" * (len(names) + 4) + "|")
    for row in rows:
        what = "forward + backward" if row["backward"] else "forward"
        cells = " | ".join(f"{row['milliseconds'][n]:.1f}" for n in names)
        b, t = row["shape"][:2]
        print(f"| {b}, {t} | {what} | {cells} | {row['auto']} | {row['ratio_to_torch'][row['auto']]:.2f} |")
    if options.out:
        options.out.write_text(json.dumps({"cores": len(os.sched_getaffinity(0)), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
