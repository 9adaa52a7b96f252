"""The metric lpips: the perceptual distance of reconstructions to their originals (Zhang et al. 2018, arXiv:1801.03924).

The network and its heads are read from the published files of lpips (weights/lpips.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ldm_jax.evaluation import features, images
from ldm_jax.evaluation.metrics import ORIGINALS, RECONSTRUCTIONS, Case, Figure, Flag, Metric, Need, means, option
from ldm_jax.training.images import from_uint8
from ldm_jax.weights import lpips as lpips_weights
from ldm_jax.weights.tree_hash import tree_sha256


class Lpips(NamedTuple):
    """`distance` is (x, y) u8[b, H, W, 3] -> f32[b]; `sha256` identifies the weights."""

    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    sha256: str


def load(vgg: str, heads: str) -> Lpips:
    """LPIPS with the published files. ValueError for files that do not hold it."""
    module, params = lpips_weights.load(vgg, heads)

    def distance(params, pairs):
        x, y = jax.numpy.split(from_uint8(pairs), 2, axis=1)  # one image above the other
        with jax.default_matmul_precision("highest"):
            return module.apply({"params": params}, x, y)

    run = features.batched(distance, params, images.BATCH)
    return Lpips(lambda x, y: run(np.concatenate([x, y], axis=1)), tree_sha256(params))


def _check_files(text: str) -> None:
    if len([file for file in text.split(",") if file]) != 2:
        raise ValueError(f"--lpips={text}; expected two files, VGG16.pth,HEADS.pth")


FILES = Flag(
    "lpips",
    "VGG16.pth,HEADS.pth",
    "the published files of lpips",
    check=_check_files,
    open=lambda text: load(*text.split(",")),
)


def each(case: Case, batch: dict[str, np.ndarray], which: slice) -> dict[str, np.ndarray]:
    return {"lpips": option(case, FILES).distance(batch["image"], batch["original"])}


METRIC = Metric(
    names=("lpips",),
    of=RECONSTRUCTIONS,
    help="perceptual distance",
    figures=means("lpips"),
    gives=lambda network: (Figure("lpips"),),
    needs=(ORIGINALS, Need(lambda case: option(case, FILES) is not None, "--lpips=VGG16.pth,HEADS.pth")),
    each=each,
    flags=(FILES,),
    origin=lambda case: {"lpips_sha256": option(case, FILES).sha256},
)
