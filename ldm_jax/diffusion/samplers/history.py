"""What a multistep method remembers: the last J values of its integrand and where they were met."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class History(NamedTuple):
    """x [B, ...] now; values [J, B, ...] of earlier steps, the latest first, met at places f[J] (lambda or tau); how many
    steps were taken."""

    x: Array
    values: Array
    places: Array
    steps: Array

    @property
    def filled(self) -> Array:
        """bool[J]: which entries hold a value met at a finite place."""
        return (jnp.arange(len(self.places)) < self.steps) & jnp.isfinite(self.places)


def empty(x: Array, size: int) -> History:
    """No steps taken yet; room for `size` values."""
    return History(x, jnp.zeros((size, *x.shape), x.dtype), jnp.zeros(size, x.dtype), jnp.zeros((), jnp.int32))


def remember(history: History, x: Array, value: Array, place: Array) -> History:
    """One step later: the state x, and the value met on the way, which pushes out the oldest."""
    size = len(history.places)
    return History(
        x,
        jnp.concatenate([value[None], history.values])[:size],
        jnp.concatenate([place[None], history.places])[:size],
        history.steps + 1,
    )
