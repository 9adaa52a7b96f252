"""The tiny autoencoder (TAESD): a small encoder and decoder, distilled from those of a published network, for previews.

    block   y = relu(conv(act(conv(act(conv(x))))) + x)
    encode  z = E((x + 1) / 2),   decode  x = 2 D(3 tanh(z / 3)) - 1

(Boer Bohan 2023, https://github.com/madebyollin/taesd; there is no paper.) Its latents are the scaled ones that the diffusion model
works on, so its `scaling_factor` is 1. The structure, the options and the names of parameters are those of diffusers'
AutoencoderTiny; the k of `layers_k` also counts layers without parameters. Images are NHWC in [-1, 1].
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.kernels.conv import upsample_nearest
from ldm_jax.kernels.norm import activation
from ldm_jax.models.layers import Conv
from ldm_jax.models.tiling import overlaid


class TinyBlock(nn.Module):
    """Three convolutions and a residual, x[B, H, W, C] -> [B, H, W, C]."""

    act: str
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        for i in (0, 2, 4):
            h = h if i == 0 else activation(self.act)(h)
            h = Conv(x.shape[-1], dtype=self.dtype, name=f"conv_{i}")(h)
        return nn.relu(h + x)


class TinyEncoder(nn.Module):
    """Images in [0, 1] -> latents. `blocks` is the number of blocks at each resolution; between two the resolution is halved."""

    out_channels: int
    width: int
    blocks: tuple[int, ...]
    act: str
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k = 0
        for i, blocks in enumerate(self.blocks):
            down = i > 0
            conv = Conv(self.width, stride=1 + down, use_bias=not down, dtype=self.dtype, name=f"layers_{k}")
            x = conv(x)
            for _ in range(blocks):
                k += 1
                x = TinyBlock(self.act, self.dtype, name=f"layers_{k}")(x)
            k += 1
        return Conv(self.out_channels, dtype=self.dtype, name=f"layers_{k}")(x)


class TinyDecoder(nn.Module):
    """Latents -> images in [0, 1]. `blocks` is the number of blocks at each resolution; between two the resolution is doubled."""

    out_channels: int
    width: int
    blocks: tuple[int, ...]
    act: str
    dtype: str

    @nn.compact
    def __call__(self, z: Array) -> Array:
        x = activation(self.act)(Conv(self.width, dtype=self.dtype, name="layers_0")(z))
        k = 2
        for i, blocks in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            for _ in range(blocks):
                x = TinyBlock(self.act, self.dtype, name=f"layers_{k}")(x)
                k += 1
            if not last:
                x = upsample_nearest(x)
                k += 1
            features = self.out_channels if last else self.width
            x = Conv(features, use_bias=last, dtype=self.dtype, name=f"layers_{k}")(x)
            k += 1
        return x


class AutoencoderTiny(nn.Module):
    """`encode`, `decode`, and both in a row; encodes at 1 / f with f = 2 ** (len(num_encoder_blocks) - 1), decodes likewise.

    The options are those of diffusers' AutoencoderTiny. All levels of a half must have one width, because no layer changes it.
    `latent_magnitude` and `latent_shift` are those of scale_latents; `scaling_factor` and `shift_factor` are facts for whoever
    diffuses, and not applied here. Ours: `dtype` is the compute dtype.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    dtype: str = "float32"

    def setup(self) -> None:
        for half in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{half}_block_out_channels"), getattr(self, f"num_{half}_blocks")
            if len(widths) != len(blocks):
                raise ValueError(
                    f"num_{half}_blocks has {len(blocks)} entries: expected {len(widths)}, one for each "
                    f"{half}_block_out_channels"
                )
            if len(set(widths)) != 1:
                raise ValueError(f"{half}_block_out_channels is {widths}: expected one width at all levels")
        self.encoder = TinyEncoder(
            self.latent_channels,
            self.encoder_block_out_channels[0],
            tuple(self.num_encoder_blocks),
            self.act_fn,
            self.dtype,
        )
        self.decoder = TinyDecoder(
            self.out_channels,
            self.decoder_block_out_channels[0],
            tuple(self.num_decoder_blocks),
            self.act_fn,
            self.dtype,
        )

    def encode(self, x: Array) -> Array:
        """Images f32[B, H, W, in_channels] in [-1, 1] -> latents f32[B, H / f, W / f, latent_channels].

        ValueError when the channels are not `in_channels` or f does not divide H and W.
        """
        factor = 2 ** (len(self.num_encoder_blocks) - 1)
        if x.ndim != 4 or x.shape[-1] != self.in_channels or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"AutoencoderTiny.encode: x is {x.shape}, expected [B, H, W, {self.in_channels}] "
                f"with H and W multiples of {factor}"
            )
        return self.encoder((x + 1.0) / 2.0).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        """Latents f32[B, h, w, latent_channels] -> images f32[B, h f, w f, out_channels], about [-1, 1]."""
        if z.ndim != 4 or z.shape[-1] != self.latent_channels:
            raise ValueError(f"AutoencoderTiny.decode: z is {z.shape}, expected [B, h, w, {self.latent_channels}]")
        return 2.0 * self.decoder(3.0 * jnp.tanh(z / 3.0)).astype(jnp.float32) - 1.0

    def scale_latents(self, z: Array) -> Array:
        """Latents -> [0, 1], clipped, so that they fit into the bytes of an image file."""
        return jnp.clip(z / (2 * self.latent_magnitude) + self.latent_shift, 0.0, 1.0)

    def unscale_latents(self, stored: Array) -> Array:
        """The inverse of scale_latents."""
        return (stored - self.latent_shift) * (2 * self.latent_magnitude)

    def __call__(self, x: Array) -> Array:
        """decode(encode(x)). (diffusers' forward rounds the scaled latents to bytes in between.)"""
        return self.decode(self.encode(x))


def inputs(module: AutoencoderTiny, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `__call__` for one image of `shape` (H, W, C); see models.inputs."""
    side = 2 ** (len(module.num_encoder_blocks) - 1)
    return {"x": jax.ShapeDtypeStruct((1, *(shape or (side, side, module.in_channels))), jnp.float32)}


def tiled_encode(module: AutoencoderTiny, params: Any, x: Array, tile: int = 512, overlap: float = 0.125) -> Array:
    """`encode` in tiles of `tile` pixels a side, which gives other numbers than `encode`. Raises ValueError as `overlaid` does."""
    factor = 2 ** (len(module.num_encoder_blocks) - 1)
    return overlaid(lambda x: module.apply({"params": params}, x, method="encode"), x, tile, tile // factor, overlap)


def tiled_decode(module: AutoencoderTiny, params: Any, z: Array, tile: int = 512, overlap: float = 0.125) -> Array:
    """`decode` in tiles of `tile` pixels a side; see tiled_encode."""
    factor = 2 ** (len(module.num_decoder_blocks) - 1)
    return overlaid(lambda z: module.apply({"params": params}, z, method="decode"), z, tile // factor, tile, overlap)
