"""The random keys of item i: they depend on the seed and on i alone, so that neither the batch nor the number of devices changes it.

key_i = fold_in(key(seed), i),      initial noise ~ normal(fold_in(key_i, 0)),      noise of the steps from fold_in(key_i, 1)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion import seeds


def image_keys(seed: int, indices: np.ndarray) -> Array:
    """key[N], one for each index i[N], of a seed from 0 to 2**64 - 1. ValueError for another seed."""
    return jax.vmap(lambda i: jax.random.fold_in(seeds.key(seed), i))(jnp.asarray(indices, jnp.uint32))


def numbered(seed: int, count: int, first: int = 0) -> Array:
    """key[count] of the items first, first + 1, ..."""
    return image_keys(seed, first + np.arange(count))


def noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian noise f32[N, *shape] of the items with these keys[N], from which they begin."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def step_keys(keys: Array, use: int = 1) -> Array:
    """key[N] for the noise that a stochastic sampler draws, apart from that of `noise`. Another `use` (from 1) gives other noise."""
    return jax.vmap(lambda key: jax.random.fold_in(key, use))(keys)


def initial(latents: np.ndarray | Array | None, keys: Array, shape: tuple[int, ...]) -> Array:
    """f32[N, *shape]: `latents`, one row or one for each item; None: `noise`. ValueError for another shape."""
    if latents is None:
        return noise(keys, shape)
    latents = jnp.asarray(latents, jnp.float32)
    count = keys.shape[0]
    if latents.shape[1:] != tuple(shape) or latents.shape[0] not in (1, count):
        raise ValueError(f"latents have shape {latents.shape}, expected {(count, *shape)}")
    return jnp.broadcast_to(latents, (count, *shape))
