"""The noise of the SDE samplers: fresh unit noise at every step, or the increments of one Brownian path per row.

By default each step draws unit noise from another key, so that the noise changes with the grid. With depth > 0 a sampler that follows
an SDE takes W(t) - W(s) instead, W a standard Brownian motion on [0, 1] that the row's key alone determines, so that a finer grid
refines the same path and errors fall along it. W is a virtual Brownian tree: the Brownian bridge, halved `depth` times towards t, each
node's noise from a key folded with the way to it (Li et al. 2020, arXiv:2001.01328, section 4), and bridged within the last cell
(Jelincic et al. 2024, arXiv:2405.06464): increments have the exact distribution and add up exactly on every grid with at most one time
inside a cell of 2^-depth. Nothing is stored; a value costs depth + 2 draws of unit noise, one after another, which is little compared
with a network for depth <= 20.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.sampler import State, noise


class Walk(NamedTuple):
    """A carry `at` with a field x, and keys [B] of the Brownian path, None where steps draw fresh noise."""

    at: Any
    path: Array | None

    @property
    def x(self) -> Array:
        return self.at.x


def fold(keys: Array, data: Array | int) -> Array:
    """fold_in of every row's key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def draws(keys: Array, like: Array, n: int) -> list[Array]:
    """n independent unit noises of like's shape [B, ...]."""
    return [noise(keys, like)] if n == 1 else [noise(fold(keys, i), like) for i in range(n)]


def brownian(keys: Array, like: Array, t: Array, depth: int) -> Array:
    """W(t) of like's shape [B, ...], t a scalar in [0, 1]: the standard Brownian motion of each row's key, W(0) = 0."""

    def halve(_, cell):
        keys, low, width, left, right = cell
        middle = 0.5 * (left + right) + 0.5 * jnp.sqrt(width) * noise(fold(keys, 0), like)
        upper = t >= low + 0.5 * width
        return (
            fold(keys, 1 + upper.astype(jnp.uint32)),
            jnp.where(upper, low + 0.5 * width, low),
            0.5 * width,
            jnp.where(upper, middle, left),
            jnp.where(upper, right, middle),
        )

    t = jnp.asarray(t, like.dtype)
    cell = (fold(keys, 1), jnp.zeros_like(t), jnp.ones_like(t), jnp.zeros_like(like), noise(fold(keys, 0), like))
    keys, low, width, left, right = jax.lax.fori_loop(0, depth, halve, cell)
    share = (t - low) / width
    spread = jnp.sqrt(jnp.maximum(width * share * (1 - share), 0))
    return left + share * (right - left) + spread * noise(fold(keys, 0), like)


def increments(carry: Walk, keys: Array, times: tuple[Array, ...], depth: int) -> list[Array]:
    """(W(t) - W(s)) / sqrt(t - s) over consecutive falling times, unit noises [B, ...]; fresh ones where depth is 0."""
    if depth == 0:
        return draws(keys, carry.x, len(times) - 1)
    values = [brownian(carry.path, carry.x, t, depth) for t in times]
    return [
        (values[i] - values[i + 1]) / jnp.sqrt(jnp.where(t > s, t - s, jnp.inf))
        for i, (t, s) in enumerate(itertools.pairwise(times))
    ]


def walk(process: Process, x_T: Array, keys: Array | None, depth: int, at: Any = None) -> Walk:
    """The first carry: `at` (by default State(x_T)) and the keys of the path where depth > 0."""
    return Walk(State(x_T) if at is None else at, keys if depth else None)


def check_noise(eta: float, s_noise: float = 1.0, depth: int = 0) -> None:
    """ValueError for a negative eta or s_noise, or a depth outside 0..30 (cells of 2^-30)."""
    for name, value in (("eta", eta), ("s_noise", s_noise)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}, expected a number >= 0")
    if not 0 <= depth <= 30:
        raise ValueError(f"depth is {depth}, expected 0 (fresh noise) to 30 halvings of the path")
