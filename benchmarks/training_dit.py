"""One training step of a DiT against diffusers' DiTTransformer2DModel in torch.

    python benchmarks/training_dit.py [--runs 5] [--dtype float32|bfloat16] [--only memory,compile,compile_scan,time,small]

`time`, `memory` and `compile` are of DiT-S/2 on 32x32x4 latents, batch 8; `small` times a narrower one on 64 tokens, batch 128;
`compile_scan` compiles the former with `scan_layers` and `remat`. With --dtype=bfloat16 ours computes in bf16, torch in f32.
How it is measured: side_by_side.py.
Prints JSON and writes benchmarks/results/training_dit.json (training_dit_bfloat16.json).
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from side_by_side import Ours, Theirs

from ldm_jax import weights
from ldm_jax.models.dit import DiT

S2 = {"size": 32, "channels": 4, "batch": 8, "width": 384, "depth": 12, "heads": 6, "classes": 1000}
SMALL = {"size": 16, "channels": 4, "batch": 128, "width": 256, "depth": 6, "heads": 4, "classes": 10}


def flops(c: dict, patch: int = 2) -> float:
    """Multiply-adds times two of the linear layers and attention, forward and backward (three times the forward)."""
    n, d = (c["size"] // patch) ** 2, c["width"]
    block = 2 * n * 12 * d * d + 4 * n * n * d + 2 * 6 * d * d
    return 3.0 * c["batch"] * c["depth"] * block


def network(c: dict, dtype: str = "float32", **more) -> DiT:
    return DiT(
        patch_size=2,
        hidden_size=c["width"],
        depth=c["depth"],
        num_heads=c["heads"],
        in_channels=c["channels"],
        num_classes=c["classes"],
        time_shift=1.0,
        mlp_norm_eps=1e-5,
        dtype=dtype,
        **more,
    )


def batch(c: dict) -> tuple[np.ndarray, ...]:
    r = np.random.RandomState(0)
    x = r.randn(c["batch"], c["size"], c["size"], c["channels"]).astype(np.float32)
    t = r.uniform(0, 999, c["batch"]).astype(np.float32)
    return x, t, r.randint(0, c["classes"], c["batch"]).astype(np.int32), r.randn(*x.shape).astype(np.float32)


def ours(c: dict, dtype: str, params: dict | None = None, **more) -> Ours:
    x, t, label, target = batch(c)
    return Ours(network(c, dtype, **more), (x, t, {"label": label}), target, params)


def theirs(c: dict) -> Theirs:
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=c["heads"],
        attention_head_dim=c["width"] // c["heads"],
        in_channels=c["channels"],
        num_layers=c["depth"],
        sample_size=c["size"],
        num_embeds_ada_norm=c["classes"],
    )
    # One embedder for all blocks, as DiT has it; diffusers' other blocks hold copies that would cost torch time and memory.
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    # In evaluation mode there is no label dropout, which would draw other labels than ours.
    model.eval()
    x, t, label, target = batch(c)
    return Theirs(model, (x, t, label.astype(np.int64)), target)


def matmul_gflops(c: dict) -> float:
    """What a plain f32 product of this network's largest shape reaches, XLA, best of ten."""
    rows, d = c["batch"] * (c["size"] // 2) ** 2, c["width"]
    a, b = jnp.ones((rows, d)), jnp.ones((d, 4 * d))
    f = jax.jit(jnp.matmul)
    f(a, b).block_until_ready()
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        f(a, b).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * rows * d * 4 * d / min(times) / 1e9


def step_time(c: dict, dtype: str, runs: int) -> dict:
    torch_side = theirs(c)
    params = weights.from_state(network(c), torch_side.arrays())
    our_side = ours(c, dtype, params)
    result = side_by_side.step_time(our_side, torch_side, runs, same_precision=dtype == "float32")
    gflops = flops(c) / result["wall_s"]["ours"]["min"] / 1e9
    return {**result, "dtype": dtype, "gflops": gflops, "matmul_gflops": matmul_gflops(c)}


def main() -> None:
    parser = side_by_side.arguments(__doc__, "memory,compile,compile_scan,time,small")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    o = parser.parse_args()
    if o.child:
        child, scan = o.child.removesuffix("_scan"), {"scan_layers": True, "remat": True}
        more = scan if child != o.child else {}
        print(json.dumps(side_by_side.run_child(child, lambda: ours(S2, o.dtype, **more), lambda: theirs(S2))))
        return
    words = ("--dtype", o.dtype)
    parts = {
        "memory": lambda: side_by_side.memory(__file__, words),
        "compile": lambda: side_by_side.compile_time(__file__, words),
        "compile_scan": lambda: side_by_side.compile_time(__file__, words, "compile_scan"),
        "time": lambda: step_time(S2, o.dtype, o.runs),
        "small": lambda: step_time(SMALL, o.dtype, o.runs),
    }
    side_by_side.measure("training_dit" + ("" if o.dtype == "float32" else f"_{o.dtype}"), parts, o.only)


if __name__ == "__main__":
    main()
