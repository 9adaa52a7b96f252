"""Images between files and networks, u8 in [0, 255] <-> f32 in [-1, 1], x = u / 127.5 - 1; and how near two of them are."""

import jax
import jax.numpy as jnp

from ldm_jax.sampling.model import from_entry as from_entry
from ldm_jax.sampling.model import from_uint8 as from_uint8
from ldm_jax.sampling.model import to_uint8 as to_uint8


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (clipped, as they are looked at): f32[B]."""
    error = jnp.mean(jnp.square(jnp.clip(x, -1, 1) - jnp.clip(y, -1, 1)), axis=(1, 2, 3))
    return 10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))
