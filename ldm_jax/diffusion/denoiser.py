"""From a network to a Denoiser: (x_t [B, ...], t scalar or [B]) -> Clean.

    Clean = to_clean(kind, F(c_in(t) x_t, time_input(t), cond))

c_in is 1 except for EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, equation 7). Training and sampling both call networks
through `call`, so that their inputs cannot differ.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.prediction import Clean, input_scale, to_clean
from ldm_jax.diffusion.process import Process, per_row

Apply = Callable[[Any, Array, Array, Mapping[str, Array]], Array]
Denoiser = Callable[[Array, Array], Clean]
Pair = Callable[[Array, Array], tuple[Clean, Clean]]


def call(
    apply: Apply, params: Any, process: Process, kind: str, cond: Mapping[str, Array], x_t: Array, t: Array
) -> Array:
    """The raw output of the network for x_t [B, ...] at t (scalar or [B]), with input scaling and time mapping applied."""
    t = jnp.broadcast_to(jnp.asarray(t, x_t.dtype), x_t.shape[:1])
    return apply(params, x_t * per_row(input_scale(kind, process, t), x_t), process.time_input(t), cond)


def make_denoiser(
    apply: Apply,
    params: Any,
    process: Process,
    kind: str,
    cond: Mapping[str, Array] | None = None,
    *,
    learned_variance: bool = False,
) -> Denoiser:
    """The Denoiser of apply(params, x, t, cond) -> output, whose output is a prediction of this `kind`.

    cond holds arrays with leading axis B. A new cond or new params of the same shapes cost no recompilation when they
    are arguments of the jitted function around this. With learned_variance the output has twice the channels, the
    prediction and then v; see prediction.to_clean.
    """
    cond = {} if cond is None else cond

    def denoise(x_t: Array, t: Array) -> Clean:
        output = call(apply, params, process, kind, cond, x_t, t)
        return to_clean(kind, process, output, x_t, t, learned_variance)

    return denoise


def make_pair(
    apply: Apply,
    params: Any,
    process: Process,
    kind: str,
    cond: Mapping[str, Array],
    uncond: Mapping[str, Array],
    *,
    learned_variance: bool = False,
) -> Pair:
    """pair(x_t, t) -> (Clean under cond, Clean under uncond), both from ONE network call of batch 2B.

    A negative prompt is an `uncond` too. Everything else is as in make_branches with two branches.
    """
    return make_branches(apply, params, process, kind, cond, uncond, learned_variance=learned_variance)


def make_branches(
    apply: Apply,
    params: Any,
    process: Process,
    kind: str,
    *conds: Mapping[str, Array],
    learned_variance: bool = False,
) -> Callable[[Array, Array], tuple[Clean, ...]]:
    """branches(x_t, t) -> a Clean for each of conds, all from ONE network call of batch n B.

    This is the pair of guidance with more branches, such as a prompt, a negative prompt and a third condition. A branch
    that perturbs the network needs an entry of cond that says so for each row. Arrays of the first cond have
    leading axis B, those of the others B or 1, to serve every row; an entry may be a tree of such arrays. Raises ValueError for
    different keys, trees or shapes.
    """
    first, *others = conds
    for i, other in enumerate(others, 1):
        if set(other) != set(first):
            raise ValueError(f"branch {i} holds {sorted(other)}, expected the keys of branch 0, {sorted(first)}")
        for name, tree in first.items():
            if jax.tree.structure(other[name]) != jax.tree.structure(tree):
                raise ValueError(f"branch {i}'s {name!r} is made of other parts than that of branch 0")
            for value, leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(other[name])):
                shape = jnp.shape(leaf)
                if shape[1:] != value.shape[1:] or shape[0] not in (1, value.shape[0]):
                    raise ValueError(
                        f"branch {i}'s {name!r} has shape {shape}, expected that of branch 0, {value.shape}"
                    )

    def joined(value: Array, *others: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(x, value.shape).astype(value.dtype) for x in (value, *others)])

    every = {name: jax.tree.map(joined, *(cond[name] for cond in conds)) for name in first}
    together = make_denoiser(apply, params, process, kind, every, learned_variance=learned_variance)

    def branches(x_t: Array, t: Array) -> tuple[Clean, ...]:
        n = len(conds)
        t = jnp.broadcast_to(jnp.asarray(t, x_t.dtype), x_t.shape[:1])
        clean = together(jnp.concatenate([x_t] * n), jnp.concatenate([t] * n))
        parts = ([None] * n if field is None else jnp.split(field, n) for field in clean)
        return tuple(Clean(*fields) for fields in zip(*parts))

    return branches
