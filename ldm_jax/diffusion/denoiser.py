"""From a network to a Denoiser: (x_t [B, ...], t scalar or [B]) -> Clean.

    Clean = to_clean(kind, F(c_in(t) x_t, time_input(t), cond))

c_in is 1 but for EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, equation 7). `call` is the one place
where a network is fed; training and sampling both go through it, so they cannot disagree.
"""

from collections.abc import Callable, Mapping
from typing import Any

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
    """Raw network output for x_t [B, ...] at t (scalar or [B]), input scaling and time mapping applied."""
    t = jnp.broadcast_to(jnp.asarray(t, x_t.dtype), x_t.shape[:1])
    return apply(params, x_t * per_row(input_scale(kind, process, t), x_t), process.time_input(t), cond)


def make_denoiser(
    apply: Apply, params: Any, process: Process, kind: str, cond: Mapping[str, Array] | None = None
) -> Denoiser:
    """The Denoiser of apply(params, x, t, cond) -> output, whose output is of the given prediction kind.

    cond holds arrays with leading axis B. A new cond or new params of the same shapes cost no recompilation when they
    are arguments of the jitted function around this.
    """
    cond = {} if cond is None else cond

    def denoise(x_t: Array, t: Array) -> Clean:
        return to_clean(kind, process, call(apply, params, process, kind, cond, x_t, t), x_t, t)

    return denoise


def make_pair(
    apply: Apply,
    params: Any,
    process: Process,
    kind: str,
    cond: Mapping[str, Array],
    uncond: Mapping[str, Array],
) -> Pair:
    """pair(x_t, t) -> (Clean given cond, Clean given uncond), both from ONE network call of batch 2B.

    A negative prompt is just another uncond. Arrays of uncond have leading axis B, or 1 to serve every row.
    Raises ValueError when the two hold different keys or shapes.
    """
    if set(cond) != set(uncond):
        raise ValueError(f"uncond holds {sorted(uncond)}, expected the keys of cond, {sorted(cond)}")
    both = {}
    for name, value in cond.items():
        other = jnp.asarray(uncond[name])
        if other.shape[1:] != value.shape[1:] or other.shape[0] not in (1, value.shape[0]):
            raise ValueError(f"uncond[{name!r}] has shape {other.shape}, expected that of cond, {value.shape}")
        both[name] = jnp.concatenate([value, jnp.broadcast_to(other, value.shape).astype(value.dtype)])

    def pair(x_t: Array, t: Array) -> tuple[Clean, Clean]:
        rows = x_t.shape[0]
        t = jnp.broadcast_to(jnp.asarray(t, x_t.dtype), (rows,))
        double = jnp.concatenate([x_t, x_t])
        output = call(apply, params, process, kind, both, double, jnp.concatenate([t, t]))
        return (
            to_clean(kind, process, output[:rows], x_t, t),
            to_clean(kind, process, output[rows:], x_t, t),
        )

    return pair
