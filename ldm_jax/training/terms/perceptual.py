"""Distances between images as a frozen network sees them, for the reconstruction of a first stage.

    d(x, y) = sum_l mean_hw sum_c w_lc (u_l(x) - u_l(y))^2,   u_l the activations of layer l, of length 1 over the channels

(Zhang et al. 2018, arXiv:1801.03924, eq. 1.) With the published files of VGG16 and of the heads w this is LPIPS. With a classifier
trained here in the place of VGG16 there are no heads, w = 1 / layers: a perceptual distance, which is not LPIPS and has another scale.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.models.classifier import Classifier
from ldm_jax.models.layers import GroupNorm
from ldm_jax.models.lpips import unit
from ldm_jax.training.task import Context
from ldm_jax.training.terms.term import Term, check_weight


def activations(network: Classifier, params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """What each layer of a classifier gives, after its norm and activation: {name: f32[B, h, w, C]}, the shallowest first."""
    _, kept = network.apply(
        {"params": params}, x, capture_intermediates=lambda module, _: isinstance(module, GroupNorm)
    )
    return {name: layer["__call__"][0].astype(jnp.float32) for name, layer in kept["intermediates"].items()}


def classifier_distance(network: Classifier, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """d(x, y) f32[B] of images f32[B, H, W, 3] in [-1, 1] in the layers of a classifier."""
    of_x, of_y = activations(network, params, x), activations(network, params, y)
    distances = [jnp.square(unit(of_x[name]) - unit(of_y[name])).sum(-1).mean((1, 2)) for name in of_y]
    return sum(distances) / len(distances)


def make(context: Context, *, name: str, weight: float = 1.0) -> Term | None:
    """config.task.perceptual: `name` is 'lpips:VGG16.pth,HEADS.pth', or 'classifier:DIR', a run; None where context.load is.

    Raises ValueError for another name, a weight that is not positive, and files or a run that do not hold what they should.
    """
    kind, _, where = name.partition(":")
    files = where.split(",")
    if (kind, len(files)) not in (("lpips", 2), ("classifier", 1)) or not all(files):
        raise ValueError(
            f"task.perceptual.name is {name!r}; expected lpips:VGG16.pth,HEADS.pth or classifier:DIR, a run of `ldm train`"
        )
    check_weight("perceptual", weight)
    if context.load is None:
        return None
    network, params = context.load(name)

    def distance(params, x, y):
        if kind == "lpips":
            return network.apply({"params": params}, x, y)
        return classifier_distance(network, params, x, y)

    x = jnp.zeros((1, *context.space.shape))
    jax.eval_shape(distance, params, x, x)  # says what is wrong with the resolution

    def loss(params, frozen, seen):
        del params
        return distance(frozen, seen.x, seen.y)

    return Term("perceptual", "error", loss, weight, frozen=params)
