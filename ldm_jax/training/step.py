"""One step of training: gradient, update, averages, metrics. Every task's step is made here.

    grad(params, state, frozen, batch, key) -> (grads, metrics, variables)        value_and_grad(loss) for one loss
    loss(params, state, frozen, batch, key) -> (loss f32[], metrics, variables)

`params` are differentiated. `state` is the TrainState before the step, whose EMA, step and variables a loss may read (a consistency
target is the EMA's output; a weight may grow with the step). `variables` are new entries of TrainState.variables; an entry that is not
named stays as it is.

Two players. A gradient function may return the gradients of several losses, each for some networks, all at the parameters before
the step: grads = {'generator': ..., 'critic': ...}, each network with its optimizer (the autoencoder and its discriminator). Players
that move in turn, each against the other after its move, are a sequence of gradient functions: make_step(context, (critic,
generator), ...), or (critic,) * n + (generator,) for n critic steps on each batch. For n critic steps on n batches the generator's
optimizer is optax.conditionally_mask(tx, lambda step: step % n == n - 1).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.training import ema
from ldm_jax.training.state import Batch, Metrics, TrainState, step_key
from ldm_jax.training.task import Context

Variables = dict[str, Any]
Loss = Callable[[Any, TrainState, Any, Batch, jax.Array], tuple[jax.Array, Metrics, Variables]]
Grad = Callable[[Any, TrainState, Any, Batch, jax.Array], tuple[dict[str, Any], Metrics, Variables]]
# finish(state, rows, key) -> (variables, parameters that are set)
Finish = Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[Variables, dict[str, Any]]]


def value_and_grad(loss: Loss) -> Grad:
    """The gradient function of one loss for all networks."""

    def grad(params, state, frozen, batch, key):
        def of_params(params):
            total, metrics, variables = loss(params, state, frozen, batch, key)
            return total, (metrics, variables)

        grads, (metrics, variables) = jax.grad(of_params, has_aux=True)(params)
        return grads, metrics, variables

    return grad


def accumulated(grad: Grad, accumulate: int) -> Grad:
    """The gradient function that takes `accumulate` equal parts of the batch one after another, to need less memory.

    Gradients are the mean over the parts. A metric that is a scalar is the mean too; of one that has a value for each row, the rows
    are joined. Variables go from part to part: each part sees those that the part before it returned.
    """
    if accumulate == 1:
        return grad

    def over_parts(params, state, frozen, batch, key):
        # Row r goes to part r % accumulate: with [B] split over devices, every part then lies on all of them.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)
        keys = jax.random.split(key, accumulate)

        def body(carry, part):
            total, variables = carry
            grads, metrics, changed = grad(params, state._replace(variables=variables), frozen, *part)
            return (jax.tree.map(lambda a, b: a + b / accumulate, total, grads), variables | changed), metrics

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        shapes = jax.eval_shape(lambda part: grad(params, state, frozen, *part)[0], first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, variables), metrics = jax.lax.scan(body, (zeros, state.variables), (parts, keys))
        metrics = jax.tree.map(lambda m: jnp.mean(m) if m.ndim == 1 else m.reshape(-1, *m.shape[2:]), metrics)
        return grads, metrics, variables

    return over_parts


def merged(tree: Any, changes: Any) -> Any:
    """A tree of dicts in which the entries of `changes`, a part of such a tree, replace those of the tree."""
    if not isinstance(changes, dict):
        return changes
    return {**tree, **{name: merged(tree[name], value) for name, value in changes.items()}}


def make_step(
    context: Context,
    grad: Grad | Sequence[Grad],
    optimizers: dict[str, optax.GradientTransformation],
    finish: Finish | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """step(state, frozen, batch) -> (state, metrics) of a gradient function, or of several that take turns on each batch.

    `finish(state, rows, key) -> (variables, params)` is for what needs the whole batch, however many parts it is taken in. It is called
    once for each turn, after its gradients and before its update. `rows` are the metrics that have a value for each row. They are
    not logged. `params` is a part of the parameters' tree that is set rather than trained (a codebook that follows its latents),
    in the averages too. Its optimizer must leave it where it is.

    Metrics: those of the gradient functions, 'learning_rate', and the norm of each network's gradient: 'grad_norm', or
    'grad_norm_NAME' where there is more than one network.
    """
    turns = [accumulated(turn, context.accumulate) for turn in (grad if isinstance(grad, Sequence) else (grad,))]
    averages, batch_size = context.averages, context.batch_size

    def update(state: TrainState, grads: dict[str, Any]) -> tuple[TrainState, Metrics]:
        params, opt_state, norms = dict(state.params), dict(state.opt_state), {}
        for name, value in grads.items():
            updates, opt_state[name] = optimizers[name].update(value, state.opt_state[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
            norms["grad_norm" if len(optimizers) == 1 else f"grad_norm_{name}"] = optax.tree.norm(value)
        return state._replace(params=params, opt_state=opt_state), norms

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        key, metrics, fixed = step_key(state), {"learning_rate": context.schedule(state.step)}, {}
        for i, turn in enumerate(turns):
            key_i = jax.random.fold_in(key, i) if i else key
            grads, of_turn, variables = turn(state.params, state, frozen, batch, key_i)
            rows = {name: of_turn.pop(name) for name in list(of_turn) if jnp.ndim(of_turn[name])} if finish else {}
            state = state._replace(variables=state.variables | variables)
            if rows:
                variables, of_rows = finish(state, rows, key_i)
                state = state._replace(variables=state.variables | variables, params=merged(state.params, of_rows))
                fixed |= of_rows
            state, norms = update(state, grads)
            metrics |= of_turn | norms
        images = state.step.astype(jnp.float32) * batch_size
        averaged = ema.update(state.ema, state.params, images, batch_size, averages.ramp)
        averaged = {half_life: merged(params, fixed) for half_life, params in averaged.items()}
        return state._replace(ema=averaged, step=state.step + 1), metrics

    return step
