"""The memory of a multistep method: the last J values of its integrand, and where they were evaluated."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class History(NamedTuple):
    """The state x [B, ...]; values [J, B, ...] of earlier steps, the latest first, at places f[J] (lambda or tau).

    `steps` counts the steps so far, `left` those to come (-1 where there is no grid).
    """

    x: Array
    values: Array
    places: Array
    steps: Array
    left: Array

    @property
    def filled(self) -> Array:
        """bool[J]: which entries hold a value at a finite place."""
        return (jnp.arange(len(self.places)) < self.steps) & jnp.isfinite(self.places)


def empty(x: Array, size: int, times: Array | None = None) -> History:
    """The memory before the first step of the grid times f[n + 1], with room for `size` values."""
    left = jnp.asarray(-1) if times is None else jnp.sum(times[:-1] != times[1:])  # the rest is padding
    return History(
        x,
        jnp.zeros((size, *x.shape), x.dtype),
        jnp.zeros(size, x.dtype),
        jnp.zeros((), jnp.int32),
        left.astype(jnp.int32),
    )


def remember(history: History, x: Array, value: Array, place: Array) -> History:
    """The memory after a step: the state x, and a new value, which replaces the oldest."""
    size = len(history.places)
    return History(
        x,
        jnp.concatenate([value[None], history.values])[:size],
        jnp.concatenate([place[None], history.places])[:size],
        history.steps + 1,
        history.left - 1,
    )


def check_final(final: tuple[int, ...]) -> None:
    """ValueError unless every entry of `final` is an order, at least 1."""
    if not all(order >= 1 for order in final):
        raise ValueError(f"final is {tuple(final)}, expected orders, each at least 1")


def within(left: Array, final: tuple[int, ...], size: int) -> Array:
    """bool[size]: which earlier values a step may use with `left` steps to take, itself among them.

    final holds the highest orders of the last steps of the grid: (2, 1) those of the last but one and of the last, what DPM-Solver's
    published code calls lower_order_final and takes below 15 steps; () leaves every step its order.
    """
    order = jnp.asarray(size + 1)
    for i, most in enumerate(reversed(final), 1):
        order = jnp.where(left == i, most, order)
    return jnp.arange(size) < order - 1
