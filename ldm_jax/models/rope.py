"""Rotary position embedding along several axes (Su et al. 2021, arXiv:2104.09864, eq. 34; Flux's layout for images).

The D channels of a head are divided into one part for each axis of the position, and each part into pairs. Pair i of a part of d
channels is rotated by the angle p * theta ** (-2 i / d), where p is the position on that axis. So the product of a query and a key
depends only on the difference of their positions. A pair is two neighbouring channels (2 i, 2 i + 1).
"""

import jax
import jax.numpy as jnp
import numpy as np


def grid_positions(height: int, width: int) -> np.ndarray:
    """Row and column of each cell of a grid, row by row: f32[height * width, 2]."""
    return (
        np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    )


def axial_angles(positions: np.ndarray, parts: tuple[int, ...], theta: float) -> np.ndarray:
    """positions [T, A], channels for each of the A axes -> angles f32[T, sum(parts) / 2]. ValueError for odd parts."""
    if len(parts) != positions.shape[-1] or any(d < 2 or d % 2 for d in parts):
        raise ValueError(f"axial_angles: parts are {parts}; expected {positions.shape[-1]} even numbers")
    angles = [np.outer(positions[:, a], theta ** (-np.arange(0, d, 2) / d)) for a, d in enumerate(parts)]
    return np.concatenate(angles, axis=-1).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """x [B, T, H, D] rotated by angles f32[T, D / 2], in x's dtype."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
