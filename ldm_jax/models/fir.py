"""Resampling by two through a low-pass filter; no pixels are dropped or repeated.

    down   y[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8
    up     y[2i] = (x[i-1] + 3 x[i]) / 4,   y[2i+1] = (3 x[i] + x[i+1]) / 4

along each axis, with zeros outside of the image. This is the filter (1, 3, 3, 1) (Zhang 2019, "Making convolutional networks
shift-invariant again"; NCSN++: Song et al. 2021, appendix H.1). In the upsampling half of the filter's taps meet inserted zeros, and
are left out here.
"""

import jax.numpy as jnp
from jax import Array


def fir_downsample(x: Array) -> Array:
    """Halve `x[B, H, W, C]` along H and W; an odd size is rounded down."""
    for axis in (1, 2):
        size = x.shape[axis] // 2
        padded = jnp.pad(x, [(1, 1) if k == axis else (0, 0) for k in range(4)])
        a, b, c, d = (padded[(slice(None),) * axis + (slice(k, k + 2 * size - 1, 2),)] for k in range(4))
        x = (a + d + 3.0 * (b + c)) / 8.0
    return x


def fir_upsample(x: Array) -> Array:
    """Double `x[B, H, W, C]` along H and W."""
    for axis in (1, 2):
        padded = jnp.pad(x, [(1, 1) if k == axis else (0, 0) for k in range(4)])
        before, after = (padded[(slice(None),) * axis + (slice(k, k + x.shape[axis]),)] for k in (0, 2))
        pairs = jnp.stack([(before + 3.0 * x) / 4.0, (3.0 * x + after) / 4.0], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x
