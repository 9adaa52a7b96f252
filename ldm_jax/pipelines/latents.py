"""Between pictures and what the denoiser sees: initial noise, encoding, decoding, masks.

    z = (encode(x) - shift) * scale,    x = decode(z / scale + shift)

with the autoencoder's scaling_factor and shift_factor, or z = (encode(x) - mean) * scale / std where the file has channel statistics.
The latent of an image is the mean of its posterior: its spread is far below the noise of the first step, and an edit is then
a function of the picture alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from ldm_jax.diffusion import seeds
from ldm_jax.models import autoencoder_kl, autoencoder_tiny
from ldm_jax.models.autoencoder_kl import AutoencoderKL, Posterior
from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.models.dinov2 import bicubic
from ldm_jax.pipelines import fitting
from ldm_jax.pipelines.components import Part
from ldm_jax.weights.autoencoders import affine


def noise(seed: int, count: int, shape: tuple[int, ...], first: int = 0) -> Array:
    """Unit noise f32[count, *shape]; row i is that of image first + i, and depends on the seed and that number alone."""
    keys = jax.vmap(lambda i: jax.random.fold_in(seeds.key(seed), i))(first + jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def step_keys(seed: int, count: int, first: int = 0, use: int = 1) -> Array:
    """key[count] for the noise that a stochastic sampler draws, apart from that of `noise`; another `use`, other noise."""
    keys = jax.vmap(lambda i: jax.random.fold_in(seeds.key(seed), i))(first + jnp.arange(count))
    return jax.vmap(lambda key: jax.random.fold_in(key, use))(keys)


def initial(latents: Any, seed: int, count: int, shape: tuple[int, ...], first: int = 0) -> Array:
    """f32[count, *shape]: `latents`, one row or one for every image; None: `noise`. ValueError for another shape."""
    if latents is None:
        return noise(seed, count, shape, first)
    latents = jnp.asarray(latents, jnp.float32)
    if latents.shape[1:] != shape or latents.shape[0] not in (1, count):
        raise ValueError(f"latents have shape {latents.shape}, expected {(count, *shape)}")
    return jnp.broadcast_to(latents, (count, *shape))


def pixels(
    images: Any,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """f32[N, H, W, channels] in [0, 1] from PIL images, u8 arrays or float arrays in [0, 1]; one or several.

    PIL images and u8 arrays are scaled and cut to `size` (H, W); floats must have it. PIL images are read by the rule of
    data/decode.py, those of one channel as masks. ValueError for anything else.
    """
    rows = []
    for image in fitting.rows_of(images, channels):
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
        if isinstance(image, Image.Image):
            image = image.convert("RGB" if channels == 3 else "L")
            if size is not None:
                image = fitting.covering(image, tuple(size), resample)
            image = np.asarray(image, np.float32) / 255
        image = np.asarray(image, np.float32)
        image = image[..., None] if image.ndim == 2 else image
        if image.ndim != 3 or image.shape[-1] != channels or (size is not None and image.shape[:2] != tuple(size)):
            raise ValueError(f"an image has shape {image.shape}, expected {(*(size or ('H', 'W')), channels)}")
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"an image has values from {image.min():g} to {image.max():g}, expected floats in [0, 1]")
        rows.append(image)
    if not rows or any(row.shape != rows[0].shape for row in rows):
        raise ValueError(f"images of shapes {[row.shape for row in rows]}, expected one shape")
    return np.stack(rows)


def repeated(what: str, rows: np.ndarray, count: int) -> np.ndarray:
    """rows [count, ...] from [count, ...] or [1, ...]; ValueError for another number."""
    if rows.shape[0] not in (1, count):
        raise ValueError(f"{what}: {rows.shape[0]} for {count} images; expected 1 or {count}")
    return np.broadcast_to(rows, (count, *rows.shape[1:]))


def factor(vae: nn.Module) -> int:
    """Pixels a latent is wide."""
    widths = vae.encoder_block_out_channels if isinstance(vae, AutoencoderTiny) else vae.block_out_channels
    return 2 ** (len(widths) - 1)


# Whose tiles are diffusers'.
TILED = {AutoencoderKL: autoencoder_kl, AutoencoderTiny: autoencoder_tiny}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(vae: nn.Module, params: Any, x: Array, tile: int | None) -> Array:
    if tile is None:
        out = vae.apply({"params": params}, x, method="encode")
    else:
        out = TILED[type(vae)].tiled_encode(vae, params, x, tile)
    # A VQ model's or AutoencoderTiny's is the latent itself.
    return (out.mean if isinstance(out, Posterior) else out).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(vae: nn.Module, params: Any, z: Array, tile: int | None) -> Array:
    if tile is None:
        image = vae.apply({"params": params}, z, method="decode")
    else:
        image = TILED[type(vae)].tiled_decode(vae, params, z, tile)
    image = image.astype(jnp.float32)
    return jnp.clip(image / 2 + 0.5, 0, 1)


def encode(vae: Part, params: Any, images: np.ndarray, scaled: bool = True, tile: int | None = None) -> Array:
    """Pictures f32[N, H, W, 3] in [0, 1] -> latents f32[N, h, w, C] as the denoiser sees them (or as encoded).

    One picture at a time, in tiles of `tile` pixels: the encoder's feature maps are the largest arrays of a pipeline.
    """
    z = jnp.concatenate([_encode(vae.module, params, jnp.asarray(image[None]) * 2 - 1, tile) for image in images])
    scale, shift = affine(vae.config, vae.module)
    return (z - shift) * scale if scaled else z


def decode(vae: Part, params: Any, z: Array, tile: int | None = None) -> np.ndarray:
    """Latents f32[N, h, w, C] -> pictures f32[N, H, W, 3] in [0, 1], one at a time, in tiles of `tile` pixels."""
    scale, shift = affine(vae.config, vae.module)
    return np.concatenate([np.asarray(_decode(vae.module, params, row[None], tile)) for row in z / scale + shift])


def shrink(mask: np.ndarray, by: int) -> np.ndarray:
    """f32[N, H, W, C] -> every `by`-th pixel: a mask at the resolution of the latents (nearest, as published)."""
    return mask[:, ::by, ::by]


def depth_map(depth: Sequence[np.ndarray] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Depths f32[N, H', W'] of any scale -> f32[N, *size, 1] in [-1, 1], each picture's own range: what a depth U-Net is told."""
    depth = jnp.asarray(np.asarray(depth, np.float32))
    depth = depth[None] if depth.ndim == 2 else depth
    if depth.ndim != 3:
        raise ValueError(f"depth has shape {depth.shape}, expected [N, H, W]")
    # torch's bicubic kernel (a = -3/4), without antialiasing.
    rows, columns = bicubic(depth.shape[1], size[0]), bicubic(depth.shape[2], size[1])
    small = jnp.einsum("hi,bij,wj->bhw", rows, depth, columns)
    low, high = small.min((1, 2), keepdims=True), small.max((1, 2), keepdims=True)
    if not (np.isfinite(small).all() and (high > low).all()):
        raise ValueError("the depth is constant or not finite, expected a map with a range")
    return np.asarray(2 * (small - low) / (high - low) - 1)[..., None]
