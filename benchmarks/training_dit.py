"""One training step (forward, backward, AdamW) of a DiT against diffusers' DiTTransformer2DModel in torch.

    python benchmarks/training_dit.py [--dtype float32|bfloat16] [--rounds 7] [--only time,memory,compile,small]

The two networks carry the same weights; equal outputs and parameter counts are asserted before anything is timed. The
timed runs alternate in one process; torch gets OMP_WAIT_POLICY=PASSIVE (its threads would spin against XLA's) and as many
threads as there are cores. Peak memory is ru_maxrss of a process for each side, `ratio` with and `net_ratio` without
what the imports alone take.
Prints one JSON object a line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.models.dit import DiT

CORES = len(os.sched_getaffinity(0))
S2 = {"size": 32, "channels": 4, "batch": 8, "width": 384, "depth": 12, "heads": 6, "classes": 1000}
SMALL = {"size": 16, "channels": 4, "batch": 128, "width": 256, "depth": 6, "heads": 4, "classes": 10}
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


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


def jax_step(module: DiT):
    optimizer = optax.adamw(1e-4, **ADAMW)

    def step(params, state, x, t, label, target):
        def loss(p):
            return jnp.mean((module.apply({"params": p}, x, t, {"label": label}) - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer, jax.jit(step, donate_argnums=(0, 1))


class Jax:
    def __init__(self, c: dict, dtype: str, params: dict | None = None, **more):
        self.module = network(c, dtype, **more)
        self.data = tuple(jnp.asarray(a) for a in batch(c))
        if params is None:
            params = jax.jit(self.module.init)(jax.random.key(0), *self.data[:2], {"label": self.data[2]})["params"]
        self.params = jax.tree.map(jnp.array, params)
        optimizer, step = jax_step(self.module)
        self.state = jax.jit(optimizer.init)(self.params)
        begin = time.perf_counter()
        self.compiled = step.lower(self.params, self.state, *self.data).compile()
        self.compile_seconds = time.perf_counter() - begin

    def step(self) -> float:
        self.params, self.state, loss = self.compiled(self.params, self.state, *self.data)
        return float(loss)


class Torch:
    def __init__(self, c: dict, dtype: str = "float32"):
        import torch
        from diffusers import DiTTransformer2DModel

        torch.set_num_threads(CORES)
        torch.manual_seed(0)
        self.torch, self.bf16 = torch, dtype == "bfloat16"
        self.model = DiTTransformer2DModel(
            num_attention_heads=c["heads"],
            attention_head_dim=c["width"] // c["heads"],
            in_channels=c["channels"],
            num_layers=c["depth"],
            sample_size=c["size"],
            num_embeds_ada_norm=c["classes"],
        )
        # One embedder for all blocks, as DiT has it; diffusers' other blocks hold copies that would cost torch time and memory.
        for block in self.model.transformer_blocks[1:]:
            block.norm1.emb = self.model.transformer_blocks[0].norm1.emb
        # In evaluation mode there is no label dropout, which would draw other labels than ours.
        self.model.eval()
        x, t, label, target = batch(c)
        self.data = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(t), torch.tensor(label).long()
        self.target = torch.tensor(target).permute(0, 3, 1, 2).contiguous()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-4, (ADAMW["b1"], ADAMW["b2"]), ADAMW["eps"], ADAMW["weight_decay"]
        )

    def loss(self):
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.bf16):
            output = self.model(*self.data).sample
        return ((output.float() - self.target) ** 2).mean()

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def params(self, depth: int) -> dict:
        from ldm_jax.weights.dit import from_diffusers

        return from_diffusers(
            {k: v.detach().numpy().copy() for k, v in self.model.state_dict().items()}, depth, "block"
        )


def summary(seconds: list[float]) -> dict:
    return {"median": round(float(np.median(seconds)), 4), "min": round(min(seconds), 4), "max": round(max(seconds), 4)}


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


def side_by_side(name: str, c: dict, dtype: str, rounds: int) -> dict:
    theirs = Torch(c)
    params = theirs.params(c["depth"])
    ours = Jax(c, dtype, params)
    count = sum(a.size for a in jax.tree.leaves(params))
    assert count == sum(p.numel() for p in theirs.model.parameters())
    output = np.asarray(jax.jit(network(c).apply)({"params": params}, *batch(c)[:2], {"label": batch(c)[2]}))
    with theirs.torch.no_grad():
        reference = theirs.model(*theirs.data).sample.permute(0, 2, 3, 1).numpy()
    difference = float(np.abs(output - reference).max())
    assert difference < 1e-4, difference

    losses = [(ours.step(), theirs.step()) for _ in range(3)]
    if dtype == "float32":
        assert np.allclose(*zip(*losses), rtol=1e-3), losses
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    cpu: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(rounds):
        for side, run in (("ours", ours), ("torch", theirs)):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            run.step()
            seconds[side].append(time.perf_counter() - begin)
            cpu[side].append(time.process_time() - cpu_begin)
    best = min(seconds["ours"])
    return {
        "what": name,
        "dtype": dtype,
        "torch_dtype": "float32",
        "parameters": count,
        "largest_difference_of_outputs": difference,
        "ours": summary(seconds["ours"]),
        "torch": summary(seconds["torch"]),
        "ratio": round(float(np.median(seconds["ours"]) / np.median(seconds["torch"])), 3),
        "ratio_of_minima": round(best / min(seconds["torch"]), 3),
        # Processor seconds of all threads: what is left to compare by on a machine that others use as well.
        "cpu": {side: summary(values) for side, values in cpu.items()},
        "cpu_ratio": round(float(np.median(cpu["ours"]) / np.median(cpu["torch"])), 3),
        "images_per_second": round(c["batch"] / float(np.median(seconds["ours"])), 1),
        "gflops": round(flops(c) / best / 1e9, 1),
        "matmul_gflops": round(matmul_gflops(c), 1),
    }


def child(what: str, dtype: str, **environment) -> dict:
    command = [sys.executable, __file__, "--child", what, "--dtype", dtype]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(what: str, dtype: str) -> dict:
    if what == "import_torch":
        import diffusers.models  # noqa: F401
        import torch  # noqa: F401
    elif what in ("torch", "ours"):
        run = Torch(S2) if what == "torch" else Jax(S2, dtype)
        for _ in range(3):
            run.step()
    elif what == "compile":
        return {"seconds": round(Jax(S2, dtype).compile_seconds, 2)}
    elif what == "compile_scan":
        return {"seconds": round(Jax(S2, dtype, scan_layers=True, remat=True).compile_seconds, 2)}
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def memory(dtype: str) -> dict:
    peak = {what: round(child(what, dtype)["mib"]) for what in ("ours", "torch", "import_jax", "import_torch")}
    net = (peak["ours"] - peak["import_jax"]) / (peak["torch"] - peak["import_torch"])
    ratio = peak["ours"] / peak["torch"]
    return {"what": "peak memory, MiB", "dtype": dtype, **peak, "ratio": round(ratio, 3), "net_ratio": round(net, 3)}


def compile_time(dtype: str) -> dict:
    result = {"what": "compile seconds", "dtype": dtype}
    for what in ("compile", "compile_scan"):
        with tempfile.TemporaryDirectory() as folder:
            cache = {
                "JAX_COMPILATION_CACHE_DIR": folder,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            for when in ("cold", "cached"):
                result[f"{what}_{when}"] = child(what, dtype, **cache)["seconds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="time,small,memory,compile")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(options.child, options.dtype)))
        return
    parts = {
        "time": lambda: side_by_side("DiT-S/2, 32x32x4, batch 8", S2, options.dtype, options.rounds),
        "small": lambda: side_by_side("width 256, depth 6, 64 tokens, batch 128", SMALL, options.dtype, options.rounds),
        "memory": lambda: memory(options.dtype),
        "compile": lambda: compile_time(options.dtype),
    }
    for name in options.only.split(","):
        print(json.dumps(parts[name]()), flush=True)


if __name__ == "__main__":
    main()
