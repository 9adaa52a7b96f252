"""One training step (forward, backward, AdamW) of a U-Net against diffusers' UNet2DModel in torch.

    python benchmarks/training_unet.py [--runs 5] [--batch 64] [--only memory,compile,time,parts]

9.0M parameters on 32 x 32 x 3. Both networks carry the same weights; equal parameter counts and outputs are asserted before
anything is timed. The timed runs alternate in one process; torch gets OMP_WAIT_POLICY=PASSIVE (its threads would spin against
XLA's) and as many threads as there are cores. `parts` times one convolution's three products. Peak memory is each
side's own process (ru_maxrss, which a child inherits from its parent: hence memory first). Processor seconds stand beside
wall seconds: on a shared machine only they can be compared.
Prints a table and writes benchmarks/results/training_unet.json.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.models.conv import conv2d
from ldm_jax.models.unet import UNet
from ldm_jax.weights.unet import from_torch

CORES = len(os.sched_getaffinity(0))
RESULTS = pathlib.Path(__file__).parent / "results" / "training_unet.json"
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64, 128, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "attention_head_dim": 64,
    "norm_num_groups": 32,
}
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
# pixels a side, channels in, channels out
CONVOLUTIONS = ((32, 3, 64), (32, 64, 64), (32, 128, 64), (32, 64, 3), (16, 128, 128), (8, 256, 256))


def data(batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x, target = random.normal(size=(2, batch, 32, 32, 3)).astype(np.float32)
    return x, random.uniform(0, 999, batch).astype(np.float32), target


class Jax:
    def __init__(self, batch: int, params: dict | None = None):
        self.module, self.data = UNet(**CONFIG), tuple(map(jnp.asarray, data(batch)))
        if params is None:
            params = jax.jit(self.module.init)(jax.random.key(0), *self.data[:2])["params"]
        optimizer = optax.adamw(1e-4, **ADAMW)

        def step(params, state, x, t, target):
            def loss(params):
                return jnp.square(self.module.apply({"params": params}, x, t) - target).mean()

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self.params = jax.tree.map(jnp.array, params)
        self.state = jax.jit(optimizer.init)(self.params)
        begin, cpu = time.perf_counter(), time.process_time()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, *self.data)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        self.compile_cpu_seconds = time.process_time() - cpu

    def step(self) -> float:
        self.params, self.state, loss = self.compiled(self.params, self.state, *self.data)
        return float(loss)


class Torch:
    def __init__(self, batch: int):
        import torch
        from diffusers import UNet2DModel

        torch.set_num_threads(CORES)
        torch.manual_seed(0)
        self.model = UNet2DModel(sample_size=32, **CONFIG)
        x, t, target = data(batch)
        self.data = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(t)
        self.target = torch.tensor(target).permute(0, 3, 1, 2).contiguous()
        betas = (ADAMW["b1"], ADAMW["b2"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, betas, ADAMW["eps"], ADAMW["weight_decay"])

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.model(*self.data).sample - self.target).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def alternate(sides: dict[str, Callable[[], object]], runs: int) -> dict:
    """Wall and processor seconds (median, min, max) of each side, run in turn after one warm-up each."""
    for run in sides.values():
        run()
    wall: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, run in sides.items():
            begin, cpu_begin = time.perf_counter(), time.process_time()
            run()
            wall[side].append(time.perf_counter() - begin)
            cpu[side].append(time.process_time() - cpu_begin)

    def summary(seconds: list[float]) -> dict:
        return {"median": float(np.median(seconds)), "min": min(seconds), "max": max(seconds)}

    return {
        "wall_s": {side: summary(values) for side, values in wall.items()},
        "cpu_s": {side: summary(values) for side, values in cpu.items()},
    }


def ratios(result: dict, ours: str = "ours", torch: str = "torch") -> dict:
    return {
        "wall_ratio": result["wall_s"][ours]["median"] / result["wall_s"][torch]["median"],
        "cpu_ratio": result["cpu_s"][ours]["median"] / result["cpu_s"][torch]["median"],
    }


def step_time(runs: int, batch: int) -> dict:
    import torch

    theirs = Torch(batch)
    params = from_torch({k: v.detach().numpy().copy() for k, v in theirs.model.state_dict().items()})
    count = sum(a.size for a in jax.tree.leaves(params))
    assert count == sum(p.numel() for p in theirs.model.parameters())
    ours = Jax(batch, params)
    with torch.no_grad():
        expected = theirs.model(*theirs.data).sample.permute(0, 2, 3, 1).numpy()
    difference = float(np.abs(jax.jit(ours.module.apply)({"params": params}, *ours.data[:2]) - expected).max())
    assert difference < 1e-4, difference
    losses = [(ours.step(), theirs.step()) for _ in range(3)]
    assert np.allclose(*zip(*losses), rtol=1e-3), losses
    result = alternate({"ours": ours.step, "torch": theirs.step}, runs)
    return {"parameters": count, "batch": batch, "difference_of_outputs": difference, **result, **ratios(result)}


def parts(runs: int, batch: int) -> dict:
    """Forward, input gradient and kernel gradient of single 3 x 3 convolutions: ours, XLA's own, torch's."""
    import torch

    torch.set_num_threads(CORES)

    def xla(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dims)

    def backward(tx, tg, tk, of_x: bool, of_kernel: bool):
        ones, mask = [1, 1], [of_x, of_kernel, False]
        return torch.ops.aten.convolution_backward(tg, tx, tk, None, ones, ones, ones, False, [0, 0], 1, mask)

    def jitted(f, *arrays):
        arrays = tuple(map(jnp.asarray, arrays))
        f = jax.jit(f)
        return lambda: jax.block_until_ready(f(*arrays))

    def gradient(f, argument):
        return lambda x, k, g: jax.vjp(f, x, k)[1](g)[argument]

    results = {}
    for size, c, o in CONVOLUTIONS:
        random = np.random.default_rng(0)
        x, g = (random.normal(size=(batch, size, size, n)).astype(np.float32) for n in (c, o))
        kernel = random.normal(size=(3, 3, c, o)).astype(np.float32)
        tx, tg = (torch.tensor(a).permute(0, 3, 1, 2).contiguous() for a in (x, g))
        tk = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous()
        ours_forward = jax.jit(lambda x, k: conv2d(x, k, 1, 1))

        products = {
            "forward": {
                "ours": jitted(ours_forward, x, kernel),
                "xla": jitted(xla, x, kernel),
                "torch": lambda tx=tx, tk=tk: torch.nn.functional.conv2d(tx, tk, padding=1),
            },
            "input_gradient": {
                "ours": jitted(gradient(ours_forward, 0), x, kernel, g),
                "xla": jitted(gradient(xla, 0), x, kernel, g),
                "torch": lambda tx=tx, tg=tg, tk=tk: backward(tx, tg, tk, True, False),
            },
            "kernel_gradient": {
                "ours": jitted(gradient(ours_forward, 1), x, kernel, g),
                "xla": jitted(gradient(xla, 1), x, kernel, g),
                "torch": lambda tx=tx, tg=tg, tk=tk: backward(tx, tg, tk, False, True),
            },
        }
        for product, sides in products.items():
            result = alternate(sides, runs)
            for measure in ("wall_s", "cpu_s"):
                median = {side: values["median"] for side, values in result[measure].items()}
                results.setdefault(f"{size}x{size} {c}->{o} {product}", {})[measure] = median
    return results


def child(what: str, batch: int, **environment: str) -> dict:
    command = [sys.executable, __file__, "--child", what, "--batch", str(batch)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(what: str, batch: int) -> dict:
    if what == "import_torch":
        import diffusers.models.unets  # noqa: F401
        import torch  # noqa: F401
    elif what in ("ours", "torch"):
        run = Jax(batch) if what == "ours" else Torch(batch)
        for _ in range(2):
            run.step()
    elif what == "compile":
        run = Jax(batch)
        return {"wall_s": run.compile_seconds, "cpu_s": run.compile_cpu_seconds}
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def cache_options(folder: str) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def memory(batch: int) -> dict:
    """Peak MiB of each side; ours with the compiled step from the cache, as in every run but the first."""
    with tempfile.TemporaryDirectory() as folder:
        child("compile", batch, **cache_options(folder))
        peak = {what: child(what, batch, **cache_options(folder))["mib"] for what in ("ours", "torch")}
    peak |= {what: child(what, batch)["mib"] for what in ("import_jax", "import_torch")}
    net = (peak["ours"] - peak["import_jax"]) / (peak["torch"] - peak["import_torch"])
    return {**peak, "ratio": peak["ours"] / peak["torch"], "ratio_without_imports": net}


def compile_time(batch: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return {when: child("compile", batch, **cache_options(folder)) for when in ("cold", "cached")}


def show(name: str, result: dict) -> None:
    print(f"\n{name}")
    if name == "time":
        print(f"{result['parameters'] / 1e6:.1f}M parameters, batch {result['batch']}, outputs differ by", end=" ")
        print(f"{result['difference_of_outputs']:.1e}")
        for measure in ("wall_s", "cpu_s"):
            for side, values in result[measure].items():
                print(f"  {measure} {side:6} {values['median']:7.2f} ({values['min']:.2f} - {values['max']:.2f})")
        print(f"  ratio {result['wall_ratio']:.2f} (wall), {result['cpu_ratio']:.2f} (processor)")
    elif name == "parts":
        print(f"  {'':34} processor ms: ours  xla  torch | wall ms: ours  xla  torch")
        for part, measures in result.items():
            row = [1e3 * measures[m][side] for m in ("cpu_s", "wall_s") for side in ("ours", "xla", "torch")]
            print(
                f"  {part:34} {row[0]:17.0f} {row[1]:4.0f} {row[2]:6.0f} | {row[3]:13.0f} {row[4]:4.0f} {row[5]:6.0f}"
            )
    else:
        print("  " + json.dumps(result, default=float))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", default="memory,compile,time,parts")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(options.child, options.batch)))
        return
    measure = {
        "time": lambda: step_time(options.runs, options.batch),
        "parts": lambda: parts(options.runs, options.batch),
        "memory": lambda: memory(options.batch),
        "compile": lambda: compile_time(options.batch),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only.split(","):
        results[name] = measure[name]()
        show(name, results[name])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
