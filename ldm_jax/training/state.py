"""What training carries from step to step.

    state = (step, params[name], variables[name], opt_state[name], ema[half_life][name], key)

Networks are named, so that one state serves a denoiser with its text encoder, an autoencoder with its discriminator, a GAN,
or a teacher and a student.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.runs import checkpoint

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """`step` i32[]; `key` u32[2], the data of a typed key: the noise of step n is drawn from fold_in(key, n).

    `variables`: arrays that change from step to step and follow no gradient, such as the running statistics of a batch norm.
    """

    step: jax.Array
    params: dict[str, Any]
    variables: dict[str, Any]
    opt_state: dict[str, Any]
    ema: dict[str, dict[str, Any]]
    key: jax.Array


class Averages(NamedTuple):
    """The EMAs to keep: half-lives in images, and the ramp of ema.update."""

    half_lives: tuple[float, ...] = ()
    ramp: float = 0.0


def create(
    key: jax.Array,
    params: dict[str, Any],
    optimizers: dict[str, optax.GradientTransformation],
    averages: Averages,
    variables: dict[str, Any] | None = None,
) -> TrainState:
    """State at step 0. The averages start as the parameters themselves."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables or {},
        opt_state={name: optimizers[name].init(params[name]) for name in optimizers},
        # jnp.copy: a donated buffer must not stand twice in the state.
        ema={checkpoint.average(h): jax.tree.map(jnp.copy, params) for h in averages.half_lives},
        key=jax.random.key_data(key),
    )


def step_key(state: TrainState) -> jax.Array:
    """The key of this step's noise. It depends on (the run's key, the step) alone, so that a resumed run draws the same noise."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
