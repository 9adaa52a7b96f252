"""What training carries from step to step, and what a task is.

    state = (step, params[name], variables[name], opt_state[name], ema[half_life][name], key)

Networks are named, so that one state serves a denoiser with its text encoder, an autoencoder with its discriminator, a GAN,
or a teacher and a student. A task is plain functions over that state; the loop knows nothing else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.runs import checkpoint
from ldm_jax.training import ema as ema_lib

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """`step` i32[]; `key` u32[2], the data of a typed key: the noise of step n is drawn from fold_in(key, n)."""

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


class Task(NamedTuple):
    """init(key) -> TrainState; step(state, frozen, batch) -> (state, metrics), pure and jittable.

    validate(params, frozen, batch, key) -> {metric: f32[B]} per example (empty: nothing to validate);
    pictures(params, frozen, batch, key) -> {name: f32[N, H, W, 3] in [-1, 1]} (None: no pictures);
    frozen: parameters that are used and not trained (a first stage, a teacher); not part of the checkpoint.
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
    validate: Callable[[Any, Any, Batch, jax.Array], Metrics]
    pictures: Callable[[Any, Any, Batch, jax.Array], dict[str, jax.Array]] | None
    frozen: Any


def create(
    key: jax.Array,
    params: dict[str, Any],
    optimizers: dict[str, optax.GradientTransformation],
    averages: Averages,
    variables: dict[str, Any] | None = None,
) -> TrainState:
    """State at step 0: the averages start as the parameters themselves."""
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
    """The key of this step's noise: a function of (run's key, step) alone, so that a resumed run draws the same."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def accumulated(
    grad: Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]],
    params: Any,
    batch: Batch,
    key: jax.Array,
    accumulate: int = 1,
) -> tuple[Any, Metrics]:
    """Mean gradient and metrics of `grad(params, batch, key)`, which gives both, over `accumulate` equal parts of the batch in turn.

    A metric is a scalar, of which the parts' mean is taken, or has a value for each row: these are joined, part after part.
    """
    if accumulate == 1:
        return grad(params, batch, key)
    # Row r goes to part r % accumulate: with [B] split over devices, every part then lies on all of them.
    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)
    keys = jax.random.split(key, accumulate)

    def body(total, part):
        out, metrics = grad(params, *part)
        return jax.tree.map(lambda a, b: a + b / accumulate, total, out), metrics

    grads, metrics = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), (parts, keys))
    return grads, jax.tree.map(lambda m: jnp.mean(m) if m.ndim == 1 else m.reshape(-1, *m.shape[2:]), metrics)


def gradients(
    loss: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
    key: jax.Array,
    accumulate: int = 1,
) -> tuple[Any, Metrics]:
    """`accumulated` gradient and metrics of `loss(params, batch, key)`, which gives the loss and the metrics."""
    return accumulated(jax.grad(loss, has_aux=True), params, batch, key, accumulate)


def apply_gradients(
    state: TrainState,
    grads: dict[str, Any],
    optimizers: dict[str, optax.GradientTransformation],
    averages: Averages,
    batch_size: int,
    advance: bool = True,
) -> tuple[TrainState, Metrics]:
    """Update the networks named in `grads` and, with `advance`, the EMAs and the step count.

    A task that alternates between networks calls this once for each, with advance=True on the last.
    """
    params, opt_state = dict(state.params), dict(state.opt_state)
    metrics = {}
    for name, grad in grads.items():
        updates, opt_state[name] = optimizers[name].update(grad, state.opt_state[name], state.params[name])
        params[name] = optax.apply_updates(state.params[name], updates)
        metrics["grad_norm" if len(grads) == 1 else f"grad_norm_{name}"] = optax.global_norm(grad)
    state = state._replace(params=params, opt_state=opt_state)
    if not advance:
        return state, metrics
    images = state.step.astype(jnp.float32) * batch_size
    averaged = ema_lib.update(state.ema, params, images, batch_size, averages.ramp)
    return state._replace(ema=averaged, step=state.step + 1), metrics


def make_step(
    loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Metrics]],
    optimizers: dict[str, optax.GradientTransformation],
    schedule: optax.Schedule,
    averages: Averages,
    batch_size: int,
    accumulate: int = 1,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """The step of a task with one loss(params, frozen, batch, key) for all its networks: gradient, update, averages, metrics."""

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        def of_batch(params, batch, key):
            return loss(params, frozen, batch, key)

        grads, metrics = gradients(of_batch, state.params, batch, step_key(state), accumulate)
        metrics["learning_rate"] = schedule(state.step)
        state, norms = apply_gradients(state, grads, optimizers, averages, batch_size)
        return state, metrics | norms

    return step
