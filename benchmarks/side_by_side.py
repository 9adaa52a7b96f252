"""What the training benchmarks share: a compiled step of ours, the same in torch, and fair measures of the two.

One step is forward, backward and AdamW on the mean squared error. The two sides carry the same weights; equal parameter
counts, outputs and first losses are asserted before anything is timed. Timed runs alternate in one process; torch gets
OMP_WAIT_POLICY=PASSIVE (its threads would spin against XLA's) and as many threads as there are cores. Processor seconds of
all threads stand beside wall seconds: on a shared machine only they can be compared. Freed memory is kept for both sides, and
the heap settled, as under `ldm` (kernels/heap.py); with MALLOC_MMAP_MAX_=65536, glibc's default, in the environment it is
not. Peak memory is ru_maxrss of a process for each side, ours with the compiled step from the cache, as in every run but the
first; compile time is a process of its own, too.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.kernels import heap

HEAP_KEPT = heap.keep()
CORES = len(os.sched_getaffinity(0))
RESULTS = pathlib.Path(__file__).parent / "results"
LEARNING_RATE = 1e-4
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


class Ours:
    """A linen module's training step, compiled: `inputs` are what apply takes, `target` what its (first) output should be."""

    def __init__(self, module: Any, inputs: tuple, target: np.ndarray, params: dict | None = None):
        self.module, self.inputs, self.target = module, jax.tree.map(jnp.asarray, inputs), jnp.asarray(target)
        if params is None:
            params = jax.jit(module.init)(jax.random.key(0), *self.inputs)["params"]
        optimizer = optax.adamw(LEARNING_RATE, **ADAMW)

        def step(params, state, inputs, target):
            def loss(params):
                out = jax.tree.leaves(module.apply({"params": params}, *inputs))[0]
                return jnp.square(out - target).mean()

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self.params = jax.tree.map(jnp.array, params)
        self.state = jax.jit(optimizer.init)(self.params)
        begin, cpu = time.perf_counter(), time.process_time()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.inputs, self.target)
        self.compiled = lowered.compile()
        self.compile_seconds = {"wall_s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
        heap.settle()

    def output(self) -> np.ndarray:
        forward = heap.settled(jax.jit(self.module.apply))
        return np.asarray(forward({"params": self.params}, *self.inputs))

    def step(self) -> float:
        self.params, self.state, loss = self.compiled(self.params, self.state, self.inputs, self.target)
        return float(loss)


class Theirs:
    """A diffusers model's training step; inputs and target as numpy arrays in our layout (channels last)."""

    def __init__(self, model: Any, inputs: tuple, target: np.ndarray):
        import torch

        torch.set_num_threads(CORES)
        self.torch, self.model = torch, model
        self.inputs = tuple(self._tensor(a) for a in inputs)
        self.target = self._tensor(target)
        betas = (ADAMW["b1"], ADAMW["b2"])
        self.optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, betas, ADAMW["eps"], ADAMW["weight_decay"]
        )

    def _tensor(self, a: np.ndarray) -> Any:
        tensor = self.torch.tensor(a)
        return tensor.permute(0, 3, 1, 2).contiguous() if a.ndim == 4 else tensor

    def output(self) -> np.ndarray:
        with self.torch.no_grad():
            return self.model(*self.inputs).sample.permute(0, 2, 3, 1).numpy()

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.model(*self.inputs).sample - self.target).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def arrays(self) -> dict[str, np.ndarray]:
        return {k: v.detach().numpy().copy() for k, v in self.model.state_dict().items()}


def alternate(sides: dict[str, Callable[[], object]], runs: int) -> dict[str, Any]:
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

    def summary(seconds: list[float]) -> dict[str, float]:
        return {"median": float(np.median(seconds)), "min": min(seconds), "max": max(seconds)}

    return {
        "runs": runs,
        "wall_s": {side: summary(values) for side, values in wall.items()},
        "cpu_s": {side: summary(values) for side, values in cpu.items()},
    }


def step_time(ours: Ours, theirs: Theirs, runs: int, *, same_precision: bool = True) -> dict[str, Any]:
    """Seconds a step and their ratios; AssertionError where the two sides do not compute the same."""
    count = sum(a.size for a in jax.tree.leaves(ours.params))
    assert count == sum(p.numel() for p in theirs.model.parameters())
    difference = float(np.abs(ours.output() - theirs.output()).max())
    losses = [(ours.step(), theirs.step()) for _ in range(3)]
    if same_precision:
        assert difference < 1e-4, difference
        assert np.allclose(*zip(*losses), rtol=1e-3), losses
    result = alternate({"ours": ours.step, "torch": theirs.step}, runs)
    medians = {kind: {side: v["median"] for side, v in result[kind].items()} for kind in ("wall_s", "cpu_s")}
    ratios = {kind: medians[kind]["ours"] / medians[kind]["torch"] for kind in medians}
    return {
        "parameters": count,
        "batch": len(theirs.target),
        "difference_of_outputs": difference,
        **result,
        "wall_ratio": ratios["wall_s"],
        "cpu_ratio": ratios["cpu_s"],
        "images_per_second": len(theirs.target) / medians["wall_s"]["ours"],
    }


def _child(script: str, words: Iterable[str], what: str, folder: str = "") -> dict[str, Any]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, script, *words, "--child", what]
    environment = os.environ | (cache if folder else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(what: str, ours: Callable[[], Ours], theirs: Callable[[], Theirs]) -> dict[str, Any]:
    """What a process of its own measures: 'ours' or 'torch' after three steps, what imports take, or compile seconds."""
    if what == "import_torch":
        import diffusers.models.unets  # noqa: F401
    elif what in ("ours", "torch"):
        run = ours() if what == "ours" else theirs()
        for _ in range(3):
            run.step()
    elif what == "compile":
        return ours().compile_seconds
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def memory(script: str, words: Iterable[str]) -> dict[str, float]:
    """Peak MiB of each side's process and of its imports alone; `ratio` with, `ratio_without_imports` without those."""
    with tempfile.TemporaryDirectory() as folder:
        _child(script, words, "compile", folder)
        sides = ("ours", "torch", "import_jax", "import_torch")
        peak = {what: _child(script, words, what, folder)["mib"] for what in sides}
    net = (peak["ours"] - peak["import_jax"]) / (peak["torch"] - peak["import_torch"])
    return {**peak, "ratio": peak["ours"] / peak["torch"], "ratio_without_imports": net}


def compile_time(script: str, words: Iterable[str], what: str = "compile") -> dict[str, Any]:
    """Wall and processor seconds until the step is compiled, with an empty cache and with a warm one."""
    with tempfile.TemporaryDirectory() as folder:
        return {when: _child(script, words, what, folder) for when in ("cold", "cached")}


def arguments(doc: str, only: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="alternating runs of each side (5)")
    parser.add_argument("--only", default=only, help=f"what to measure ({only})")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def machine() -> dict[str, Any]:
    return {
        "cpu": platform.machine(),
        "cores": CORES,
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
        "heap_kept": HEAP_KEPT,
    }


def measure(name: str, parts: dict[str, Callable[[], dict[str, Any]]], only: str) -> None:
    """Measures the chosen parts in order; each is printed and put into benchmarks/results/<name>.json at once.

    Memory comes first: ru_maxrss of a child starts at what its parent had when it was forked.
    """
    chosen = only.split(",")
    unknown = sorted(set(chosen) - set(parts))
    if unknown:
        sys.exit(f"error: --only={','.join(unknown)}; expected some of {','.join(parts)}")
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    for part in (p for p in parts if p in chosen):
        before = machine()
        result = parts[part]() | {"machine": before}
        print(f"{part}: {json.dumps(_rounded(result))}", flush=True)
        results = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(results | {part: _rounded(result)}, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
