"""The error of a reconstruction y of an image x, pixel by pixel: a mean over pixels and channels, with e = x - y.

    l1   |e|            l2   e^2            charbonnier   sqrt(e^2 + 1e-4)       (Charbonnier et al. 1994; Lai et al. 2017)

With a learned variance s the sum E of all errors is scaled to the likelihood of a distribution of learned size (Rombach et al.'s code),

    nll = E exp(-s) + s
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ldm_jax.training.terms.term import Term

ERRORS = {
    "l1": lambda error: jnp.abs(error),
    "l2": lambda error: jnp.square(error),
    "charbonnier": lambda error: jnp.sqrt(jnp.square(error) + 1e-4),
}


def make(name: str) -> Term:
    """The term of an error in ERRORS."""

    def loss(params, frozen, seen):
        del params, frozen
        return jnp.mean(ERRORS[name](seen.x - seen.y), axis=(1, 2, 3))

    return Term("reconstruction", "error", loss)


def init_variance() -> dict[str, Array]:
    """s = 0."""
    return {"log_variance": jnp.zeros(())}


def nll(variance: dict[str, Any], error: Array) -> Array:
    """E exp(-s) + s of an error f32[]."""
    s = variance["log_variance"]
    return error * jnp.exp(-s) + s
