"""Distances between images as a frozen network sees them, for the reconstruction of a first stage.

    d(x, y) = sum_l mean_hw sum_c w_lc (u_l(x) - u_l(y))^2,   u_l the activations of layer l, of length 1 over the channels

(Zhang et al. 2018, arXiv:1801.03924, eq. 1.) With the published files of VGG16 and of the heads w this is LPIPS. With a classifier
trained here in the place of VGG16 there are no heads, w = 1 / layers: a perceptual distance, but not LPIPS and on no scale of its.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.models.classifier import Classifier
from ldm_jax.models.layers import GroupNorm
from ldm_jax.models.lpips import unit
from ldm_jax.weights import lpips


class Perceptual(NamedTuple):
    """`distance`(params, x, y) -> f32[B] of images f32[B, H, W, 3] in [-1, 1]; its frozen `params`; what it counts in the loss."""

    distance: Callable[[Any, jax.Array, jax.Array], jax.Array]
    params: Any
    weight: float


def activations(network: Classifier, params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """What each layer of a classifier gives, after its norm and activation: {name: f32[B, h, w, C]}, the shallowest first."""
    _, kept = network.apply(
        {"params": params}, x, capture_intermediates=lambda module, _: isinstance(module, GroupNorm)
    )
    return {name: found["__call__"][0].astype(jnp.float32) for name, found in kept["intermediates"].items()}


def load(
    name: str, read_classifier: Callable[[pathlib.Path], tuple[Classifier, Any]], weight: float = 1.0
) -> Perceptual:
    """config.task.perceptual: `name` is 'lpips:VGG16.pth,HEADS.pth', or 'classifier:DIR', a run that `read_classifier` reads.

    Raises ValueError for another name, a weight that is not positive, and files or a run that do not hold what they should.
    """
    kind, _, where = name.partition(":")
    files = where.split(",")
    if (kind, len(files)) not in (("lpips", 2), ("classifier", 1)) or not all(files):
        raise ValueError(
            f"task.perceptual.name is {name!r}; expected lpips:VGG16.pth,HEADS.pth or classifier:DIR, a run of `ldm train`"
        )
    if not weight > 0:
        raise ValueError(f"task.perceptual.weight is {weight!r}; expected a number above 0 (no block at all for none)")
    if kind == "lpips":
        network, params = lpips.load(*files)

        def distance(params, x, y):
            return network.apply({"params": params}, x, y)
    else:
        network, params = read_classifier(pathlib.Path(where))

        def distance(params, x, y):
            there, here = activations(network, params, x), activations(network, params, y)
            terms = [jnp.square(unit(there[name]) - unit(here[name])).sum(-1).mean((1, 2)) for name in here]
            return sum(terms) / len(terms)

    return Perceptual(distance, params, weight)
