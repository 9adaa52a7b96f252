"""Sums over a row and safe quotients, which every guidance needs."""

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.process import Process, per_row


def dot(a: Array, b: Array) -> Array:
    """Inner product of each row, [B, 1, ...]."""
    return jnp.sum(a * b, tuple(range(1, a.ndim)), keepdims=True)


def over(a: Array, b: Array, otherwise: float = 0.0) -> Array:
    """a / b where b > 0, else `otherwise`."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), otherwise)


def root(a: Array) -> Array:
    """sqrt(a), of derivative 0 where a = 0, because dps differentiates through guidance."""
    return jnp.where(a > 0, jnp.sqrt(jnp.where(a > 0, a, 1)), 0)


def levels(process: Process, t: Array, like: Array) -> tuple[Array, Array]:
    """(alpha(t), sigma(t)), with the axes of `like` [B, ...] after the first."""
    return per_row(process.alpha(t), like), per_row(process.sigma(t), like)
