"""Latents that turn and shrink as their images do. They are easier to model.

    error(tau x, decode(tau z)),   tau a turn by 0, 90, 180 or 270 degrees and a scaling by 1/4, 1/2, 3/4 or 1

(Kouzelis et al. 2025, EQ-VAE, arXiv:2502.09509, section 3, their implicit regularization. They draw scales from an interval, and
their error contains the perceptual and the adversarial term. Here it is a separate term, beside the loss of the image as it is.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ldm_jax.training.terms.reconstruction import ERRORS
from ldm_jax.training.terms.term import Term

SCALES = (0.25, 0.5, 0.75, 1.0)


def turned(x: jax.Array, quarters: jax.Array) -> jax.Array:
    """x[B, S, S, C] turned by `quarters` i32[] times 90 degrees."""
    return jax.lax.switch(quarters, [lambda x, k=k: jnp.rot90(x, k, axes=(1, 2)) for k in range(4)], x)


def scaled(x: jax.Array, side: int) -> jax.Array:
    """x[B, S, S, C] -> [B, side, side, C] by linear interpolation, averaged over what a pixel covers."""
    return jax.image.resize(x, (x.shape[0], side, side, x.shape[-1]), "linear")


def equivariance(
    decode: Callable[[jax.Array], jax.Array],
    error: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    z: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """The mean of error(tau x - decode(tau z)), f32[], for one tau drawn by `key` for the batch x[B, S, S, C], z[B, s, s, D]."""
    k_turn, k_scale = jax.random.split(key)
    factor = x.shape[1] // z.shape[1]
    sides = sorted({max(1, round(z.shape[1] * scale)) for scale in SCALES})
    quarters = jax.random.randint(k_turn, (), 0, 4)
    x, z = turned(x, quarters), turned(z, quarters)

    def at(side: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        # Recomputed on the backward pass: otherwise all branches would keep their activations for it.
        return jax.checkpoint(lambda x, z: jnp.mean(error(scaled(x, side * factor) - decode(scaled(z, side)))))

    return jax.lax.switch(jax.random.randint(k_scale, (), 0, len(sides)), [at(side) for side in sides], x, z)


def make(weight: float, error: str) -> Term:
    """The term with an error in reconstruction.ERRORS."""

    def loss(params, frozen, seen):
        del params, frozen
        return equivariance(seen.decode, ERRORS[error], seen.x, seen.z, jax.random.fold_in(seen.key, 1))

    return Term("equivariance", "latent", loss, weight)
