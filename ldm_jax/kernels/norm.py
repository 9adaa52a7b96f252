"""Group normalization that reads the image once for its moments and once for the result: one scale and one shift a channel.

    y[b, n, c] = act(x[b, n, c] a[b, c] + s[b, c]),   a = scale / sqrt(var_g + eps),   s = bias - mean_g a

(Wu & He 2018, "Group Normalization", eq. 1-3.) The mean and variance of a group follow from the moments of its channels. The backward
pass, which autodiff derives, reads the image as often. The moments are those of the difference to one pixel of each channel, because
E[x^2] - E[x]^2 alone loses its digits where |mean| >> std. Statistics are float32, whatever the compute dtype.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "mish": jax.nn.mish,
    "none": lambda x: x,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The elementwise function of this name; ValueError for a name that is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float = 1e-5, act: str = "none") -> Array:
    """`x[B, ..., C]` normalized over space and over each of `groups` groups of channels; `scale` and `bias` are f32[C] or f32[B, C].

    The result has the dtype of `x`. With a `scale` and `bias` for each image a time embedding can modulate (ADM's scale_shift). `act`
    is a name in ACTIVATIONS. Raises ValueError when `groups` does not divide C.
    """
    c = x.shape[-1]
    if groups < 1 or c % groups:
        raise ValueError(f"group_norm: {groups} groups do not divide {c} channels")
    return _group_norm(x, scale, bias, groups, eps, act)


# With checkpoint only x is stored for the backward pass; otherwise the normalized image and the slope of the activation are, too.
@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def _group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, act: str) -> Array:
    b, c = x.shape[0], x.shape[-1]
    rows = x.reshape(b, -1, c).astype(jnp.float32)
    n = rows.shape[1]
    pivot = jax.lax.stop_gradient(rows[:, :1])
    centred = rows - pivot
    sum1, sum2 = centred.sum(1), jnp.square(centred).sum(1)
    mean_c = pivot[:, 0] + sum1 / n
    var_c = sum2 / n - jnp.square(sum1 / n)

    def fold(per_channel: Array) -> Array:
        in_groups = per_channel.reshape(b, groups, c // groups).mean(-1, keepdims=True)
        return jnp.broadcast_to(in_groups, (b, groups, c // groups)).reshape(b, c)

    mean = fold(mean_c)
    var = fold(var_c + jnp.square(mean_c - mean))
    a = jax.lax.rsqrt(jnp.maximum(var, 0.0) + eps) * scale
    s = bias - mean * a
    y = activation(act)(rows * a[:, None] + s[:, None])
    return y.astype(x.dtype).reshape(x.shape)
