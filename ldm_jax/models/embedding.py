"""Embeddings of the time and of positions.

Sinusoidal time embedding (Vaswani et al. 2017, sec. 3.5; Ho et al. 2020): with half = dim / 2 and
w_i = max_period ** (-i / (half - shift)),  [cos(t w), sin(t w)]  (or sine first).
Gaussian Fourier features of log sigma (Song et al. 2021, after Tancik et al. 2020):  [sin(2 pi t w), cos(2 pi t w)].
2-D position embedding (DiT, MAE): the 1-D embedding of the column in the first half, that of the row in the second.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.layers import Dense, Initializer


def timestep_embedding(
    t: jax.Array,
    dim: int,
    max_period: float = 10000.0,
    flip_sin_to_cos: bool = True,
    downscale_freq_shift: float = 0.0,
) -> jax.Array:
    """t f32[B] -> f32[B, dim], always computed in f32: t is of the order of 0..999, where bf16 does not tell neighbouring steps apart.

    With `flip_sin_to_cos` cosines come first. For an odd `dim` the last entry is zero. `downscale_freq_shift` is 0 in DiT, ADM and
    Stable Diffusion, and 1 in DDPM and in diffusers' port of DiT. Raises ValueError for a `dim` that is too small.
    """
    if dim < 2:
        raise ValueError(f"timestep_embedding: dim is {dim}; expected at least 2")
    half = dim // 2
    if half <= downscale_freq_shift:
        raise ValueError(f"timestep_embedding: dim {dim} leaves no frequency for a shift of {downscale_freq_shift}")
    frequencies = jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - downscale_freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


def gaussian_fourier_embedding(t: jax.Array, frequencies: jax.Array, flip_sin_to_cos: bool = False) -> jax.Array:
    """t f32[B] (usually the logarithm of a noise level) -> f32[B, 2 half]. `frequencies` f32[half] are drawn once and not trained."""
    angles = t.astype(jnp.float32)[:, None] * frequencies * (2 * np.pi)
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts, axis=-1)


def sincos_position_embedding(dim: int, height: int, width: int, base: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """The fixed position embedding f32[height * width, dim] of a grid, row by row.

    With `base` = 0 the positions are 0, 1, 2, ... Otherwise each grid is stretched to `base` cells a side, the size at which the
    network was trained, and positions are divided by `scale` (PixArt's interpolation scale). Raises ValueError unless dim % 4 == 0.
    """
    if dim % 4:
        raise ValueError(f"sincos_position_embedding: dim is {dim}; expected a multiple of 4")
    omega = 1.0 / 10000.0 ** (np.arange(dim // 4) / (dim / 4))

    def along(n: int) -> np.ndarray:
        position = np.arange(n) * ((base / n if base else 1.0) / scale)
        angles = np.outer(position, omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = along(height), along(width)
    grid = np.concatenate([np.tile(columns, (height, 1)), np.repeat(rows, width, axis=0)], axis=1)
    return grid.astype(np.float32)


class TimestepMLP(nn.Module):
    """Dense -> SiLU -> Dense on a time embedding: f32[B, K] -> [B, features]. Parameters linear_1, linear_2.

    A `condition` f32[B, D] is mapped to the embedding by a linear map without bias (cond_proj) and added to it, so that a condition of
    zeros adds nothing.
    """

    features: int
    hidden: int = 0
    dtype: str = "float32"
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        if condition is not None:
            project = Dense(x.shape[-1], False, dtype=self.dtype, kernel_init=self.kernel_init, name="cond_proj")
            x = x + project(condition)
        x = Dense(self.hidden or self.features, dtype=self.dtype, kernel_init=self.kernel_init, name="linear_1")(x)
        return Dense(self.features, dtype=self.dtype, kernel_init=self.kernel_init, name="linear_2")(nn.silu(x))
