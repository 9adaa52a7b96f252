"""Mean and standard deviation of each latent channel over training images, measured once and kept as JSON.

z_white = (z - mean) / std      (the place of Stable Diffusion's 0.18215; Karras et al. 2024, EDM2, appendix B.2)
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ldm_jax.kernels import processes
from ldm_jax.runs.checkpoint import write_text
from ldm_jax.sampling.model import Space
from ldm_jax.training.first_stage import IMAGES, moments


def measure(
    network: Any, params: Any, batches: Iterator[dict[str, np.ndarray]], space: Space = IMAGES
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) f32[C] of the posterior over images: its variance is that of the means plus the mean variance."""

    @jax.jit
    def encode(params, data):
        return moments(network, params, space.load(data))

    count, total, square = 0, 0.0, 0.0
    for batch in batches:
        z = {k: np.asarray(a, np.float64)[batch["valid"]] for k, a in encode(params, batch[space.entry]).items()}
        count += z["mean"][..., 0].size
        places = tuple(range(z["mean"].ndim - 1))
        total = total + z["mean"].sum(places)
        square = square + sum(np.square(a).sum(places) for a in z.values())
    average = total / count
    std = np.sqrt(np.maximum(square / count - average**2, 1e-12))
    return average.astype(np.float32), std.astype(np.float32)


def load_or_measure(path: pathlib.Path, stage: Any, batches: Callable[[], Iterator]) -> tuple[np.ndarray, np.ndarray]:
    """The statistics in `path` if they belong to this checkpoint of the stage, else measured and written there."""
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["checkpoint"] == stage.sha256:
            return np.asarray(kept["mean"], np.float32), np.asarray(kept["std"], np.float32)
    mean, std = measure(stage.network, stage.params, batches())
    if processes.is_first():
        write_text(
            path, json.dumps({"checkpoint": stage.sha256, "mean": mean.tolist(), "std": std.tolist()}, indent=1) + "\n"
        )
    return mean, std
