"""Between pictures and what the network takes: reading, encoding, decoding, masks, depths.

    z = (encode(x) - shift) * scale,    x = decode(z / scale + shift)

with the autoencoder's scaling_factor and shift_factor, or z = (encode(x) - mean) * scale / std where the file has channel statistics.
The latent of an image is the mean of its posterior: its spread is far below the noise of the first step, and an edit is then
a function of the picture alone.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from ldm_jax.models import autoencoder_kl, autoencoder_tiny
from ldm_jax.models.autoencoder_kl import AutoencoderKL, Posterior
from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.models.dinov2 import bicubic
from ldm_jax.pipelines import fitting
from ldm_jax.pipelines.components import Part
from ldm_jax.sampling.model import Space
from ldm_jax.weights.autoencoders import affine


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


def check_tile(tile: int, vae: nn.Module | None, whose: str) -> None:
    """Raise ValueError for an autoencoder that is not tiled, None among them, and for pixels that it does not divide."""
    if type(vae) not in TILED:
        raise ValueError(f"tile is {tile}, but {whose} has none; expected an AutoencoderKL or an AutoencoderTiny")
    if tile < 1 or tile % factor(vae):
        raise ValueError(f"tile is {tile}, expected a multiple of {factor(vae)} pixels")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(module: nn.Module, params: Any, images: Array, tile: int | None) -> Array:
    if tile is None:
        out = module.apply({"params": params}, images, method="encode")
    else:
        out = TILED[type(module)].tiled_encode(module, params, images, tile)
    # A VQ model's or AutoencoderTiny's is the latent itself.
    return (out.mean if isinstance(out, Posterior) else out).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(module: nn.Module, params: Any, z: Array, tile: int | None) -> Array:
    if tile is None:
        images = module.apply({"params": params}, z, method="decode")
    else:
        images = TILED[type(module)].tiled_decode(module, params, z, tile)
    return images.astype(jnp.float32)


class Encode(NamedTuple):
    """(params, images f32[B, H, W, 3] in [-1, 1]) -> z f32[B, h, w, C] of an autoencoder, hashable; params as in `parameters`."""

    module: nn.Module
    tile: int | None

    def __call__(self, params: Any, images: Array) -> Array:
        return (_encode(self.module, params["autoencoder"], images, self.tile) - params["shift"]) * params["scale"]


class Decode(NamedTuple):
    """(params, z f32[B, h, w, C]) -> images f32[B, H, W, 3], near [-1, 1], of an autoencoder, hashable."""

    module: nn.Module
    tile: int | None

    def __call__(self, params: Any, z: Array) -> Array:
        return _decode(self.module, params["autoencoder"], z / params["scale"] + params["shift"], self.tile)


def space(module: nn.Module, shape: tuple[int, ...], tile: int | None = None) -> Space:
    """The latents of a published autoencoder, in tiles of `tile` pixels where that is given; its parameters are `parameters`."""
    return Space(shape, Encode(module, tile), Decode(module, tile), bounded=False)


def parameters(vae: Part) -> dict[str, Any]:
    """Parameters of the space of an autoencoder: the network's, and the scale and the shift of its latents."""
    scale, shift = affine(vae.config, vae.module)
    return {"autoencoder": vae.params, "scale": scale, "shift": shift}


def unscaled(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with which a space encodes without scale and shift, as InstructPix2Pix takes its picture."""
    return params | {"scale": np.float32(1), "shift": np.float32(0)}


def encode(space: Space, params: Any, images: np.ndarray) -> Array:
    """Pictures f32[N, H, W, 3] in [0, 1] -> x f32[N, *shape] as the network takes it.

    One picture at a time: the encoder's feature maps are the largest arrays of a pipeline.
    """
    return jnp.concatenate([space.encode(params, jnp.asarray(image[None]) * 2 - 1) for image in images])


def decode(space: Space, params: Any, x: Array) -> np.ndarray:
    """x f32[N, *shape] -> pictures f32[N, H, W, 3] in [0, 1], one at a time."""
    images = (space.decode(params, row[None]) for row in x)
    return np.concatenate([np.asarray(jnp.clip(image / 2 + 0.5, 0, 1)) for image in images])


def shrink(mask: np.ndarray, by: int) -> np.ndarray:
    """f32[N, H, W, C] -> every `by`-th pixel: a mask at the resolution of the latents (nearest, as published)."""
    return mask[:, ::by, ::by]


def depth_map(depth: Sequence[np.ndarray] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Depths f32[N, H', W'] of any scale -> f32[N, *size, 1] in [-1, 1], each picture's own range, as a depth U-Net takes it."""
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
