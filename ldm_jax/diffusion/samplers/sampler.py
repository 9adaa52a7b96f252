"""What a sampler is, and the one loop that runs them all.

A sampler is two pure functions, `init` and `step`; `sample` scans `step` over consecutive times of a grid. The memory of a
multistep method lies in the carry, whose field `x` is the state. A step takes a Denoiser and two times, and does not depend on what
the network predicts or how it is guided.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process


class State(NamedTuple):
    """The carry of a one-step method: x [B, ...] at the current time."""

    x: Array


class Sampler(NamedTuple):
    """init(process, x_T [B, ...], times f[n + 1], keys [B] or None) -> carry, any NamedTuple with a field or property x [B, ...];
    step(denoise, process, carry, t, s, keys [B] or None) -> carry at s, from that at t; keys differ at every step.

    order         of convergence on smooth problems: of x itself, or weak, of its mean and covariance, for SDE methods; 0 where
                  refining the grid alone does not reduce the error (Langevin, consistency; their docstrings say so)
    evaluations   calls of the Denoiser a step
    stochastic    whether step draws noise, and so needs a key
    """

    init: Callable[[Process, Array, Array, Array | None], Any]
    step: Callable[[Denoiser, Process, Any, Array, Array, Array | None], Any]
    order: float
    evaluations: int
    stochastic: bool = False


def start(process: Process, x_T: Array, times: Array, keys: Array | None) -> State:
    """The `init` of every one-step method."""
    return State(x_T)


def noise(keys: Array, like: Array) -> Array:
    """Unit Gaussian noise of like's shape [B, ...], row i from keys[i] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def row_keys(key: Array, rows: int) -> Array:
    """keys[B]: fold_in(key, i) for one key; keys[B] as they are. Typed keys and raw uint32 keys are both accepted."""
    single = key.ndim == (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)
    if single:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape[0] != rows:
        raise ValueError(f"keys has {key.shape[0]} rows, expected one key or {rows}")
    return key


def check_times(times: Array) -> np.ndarray | None:
    """The differences f[n] of a grid's times f[n + 1], or None where they are traced.

    Raises ValueError for fewer than two times, and, where they are concrete, if they leave [0, 1] or change direction.
    """
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times has shape {times.shape}, expected one axis of at least 2 entries (1 step)")
    if isinstance(times, jax.core.Tracer):
        return None
    values = np.asarray(times)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"times run from {values[0]:g} to {values[-1]:g}, expected them in [0, 1]")
    steps = np.diff(values)
    if not ((steps <= 0).all() or (steps >= 0).all()):
        raise ValueError("times turn back, expected one direction throughout: falling (sampling) or rising (inversion)")
    return steps


def _check(sampler: Sampler, times: Array, key: Array | None) -> None:
    if sampler.stochastic and key is None:
        raise ValueError("the sampler is stochastic: expected a key, got None")
    steps = check_times(times)
    if sampler.stochastic and steps is not None and (steps > 0).any():
        raise ValueError(
            "times rise, expected them to fall: only a deterministic sampler can be run from data to noise"
        )


def sample(
    sampler: Sampler,
    denoise: Denoiser,
    process: Process,
    x_T: Array,
    times: Array,
    key: Array | None = None,
    *,
    trajectory: bool = False,
) -> Array:
    """Carry x_T [B, ...], the state at times[0], along the grid times f[n + 1] to the state at times[-1], in one scan.

    The state's precision (f32 or f64) is that of x_T. There is no last denoise: a caller that needs one calls
    denoise(x, times[-1]). key is one key, folded with the index of the row, or keys[B]; a row depends on its key alone,
    never on the batch. Deterministic samplers need no key. A step with t == s changes nothing and evaluates nothing
    (grids.pad). The caller should be jitted; times, key and anything that denoise closes over may be traced. With
    trajectory=True the result is [n + 1, B, ...], every state from x_T on.

    Raises ValueError for a stochastic sampler without a key, for fewer than two times, and, where times are concrete,
    for times that leave [0, 1] or change direction; falling times sample, rising ones invert.
    """
    times = jnp.asarray(times)
    _check(sampler, times, key)
    times = times.astype(x_T.dtype)
    keys = None if key is None else row_keys(key, x_T.shape[0])

    def advance(carry, now):
        t, s, i = now
        here = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        carry = jax.lax.cond(
            t == s, lambda carry: carry, lambda carry: sampler.step(denoise, process, carry, t, s, here), carry
        )
        return carry, carry.x if trajectory else None

    carry = sampler.init(process, x_T, times, keys)
    carry, states = jax.lax.scan(advance, carry, (times[:-1], times[1:], jnp.arange(times.shape[0] - 1)))
    return jnp.concatenate([x_T[None], states]) if trajectory else carry.x
