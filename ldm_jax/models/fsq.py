"""Finite scalar quantization: a latent pixel is a point of a fixed grid with L_i values along channel i.

    half_i = (1 - 10^-3) (L_i - 1) / 2,   o_i = 1/2 for an even L_i, else 0
    z_i = (half_i tanh(y_i + tan(o_i / half_i)) - o_i) / floor(L_i / 2),   z_q = z + sg(code - z)
    code_i = round(floor(L_i / 2) z_i) / floor(L_i / 2),   index = sum_i floor(L_i / 2) (code_i + 1) prod_{j < i} L_j

where y is the output of the encoder and sg the stop-gradient (Mentzer et al. 2023, arXiv:2309.15505, section 3 and appendix A.1). No
codebook has to be learned, so none can collapse, and there is no loss on the latents. The shift is a tangent as in the paper's code.
(With arctanh, y = 0 would give exactly z = 0, but it is infinite at L = 2.) Images are NHWC in [-1, 1], codes in [-1, 1].
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.models.autoencoder_kl import check_image, halves
from ldm_jax.models.vq import Quantized

MARGIN = 1e-3


def bound(y: Array, levels: Sequence[int]) -> Array:
    """f32[..., d] -> latents within the cells of the grid, f32[..., d] in [-1, 1]. `levels`: how many values each channel has."""
    count = np.asarray(levels)
    half, offset = (1.0 - MARGIN) * (count - 1) / 2, np.where(count % 2, 0.0, 0.5)
    return (half * jnp.tanh(y + np.tan(offset / half)) - offset) / (count // 2)


def to_indices(z: Array, levels: Sequence[int]) -> Array:
    """Latents f32[..., d] -> the index of the nearest code, i32[...] in [0, prod levels). ValueError unless d is len(levels)."""
    if z.shape[-1] != len(levels):
        raise ValueError(f"fsq: z is {z.shape}, expected {len(levels)} channels for levels {tuple(levels)}")
    count = np.asarray(levels)
    digits = jnp.clip(jnp.round(z * (count // 2)) + count // 2, 0, count - 1).astype(jnp.int32)
    return (digits * np.cumprod([1, *levels[:-1]], dtype=np.int32)).sum(-1)


def to_codes(indices: Array, levels: Sequence[int]) -> Array:
    """i32[...] -> codes f32[..., d] in [-1, 1]."""
    count = np.asarray(levels, np.int32)
    digits = indices[..., None] // np.cumprod([1, *levels[:-1]], dtype=np.int32) % count
    return (digits / (count // 2) - 1.0).astype(jnp.float32)


class FSQModel(nn.Module):
    """`encode`, `decode`, and both in a row; downsamples by f = 2 ** (len(block_out_channels) - 1).

    It has the encoder, the decoder and the options of AutoencoderKL, and one latent channel for each number in `levels` (each at least
    2). No published class computes this. `num_vq_embeddings`, the number of codes, is the product of the levels.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None
    mid_block_add_attention: bool = True
    remat: bool = False
    dtype: str = "float32"

    @property
    def num_vq_embeddings(self) -> int:
        return math.prod(self.levels)

    def setup(self) -> None:
        if not self.levels or min(self.levels) < 2 or self.num_vq_embeddings >= 2**31:
            raise ValueError(f"levels is {self.levels}, expected numbers of at least 2 with a product below 2**31")
        self.encoder, self.decoder = halves(self, len(self.levels))

    def encode(self, x: Array) -> Array:
        """Images f32[B, H, W, in_channels] in [-1, 1] -> latents before rounding, f32[B, H / f, W / f, d] in [-1, 1].

        ValueError when the channels are not `in_channels` or f does not divide H and W.
        """
        check_image(self, x)
        return bound(self.encoder(x).astype(jnp.float32), self.levels)

    def quantized(self, z: Array) -> Quantized:
        """The nearest codes of latents f32[B, h, w, d], which may lie outside of [-1, 1]. Both losses are 0."""
        z = z.astype(jnp.float32)
        indices = to_indices(z, self.levels)
        none = jnp.zeros(z.shape[0])
        return Quantized(z + jax.lax.stop_gradient(to_codes(indices, self.levels) - z), indices, none, none)

    def decode(self, z: Array, force_not_quantize: bool = False) -> Array:
        """Latents f32[B, h, w, d] -> images f32[B, h f, w f, out_channels], about [-1, 1]. Unless `force_not_quantize`, the latents are
        rounded to codes first."""
        if z.ndim != 4 or z.shape[-1] != len(self.levels):
            raise ValueError(f"FSQModel.decode: z is {z.shape}, expected [B, h, w, {len(self.levels)}]")
        return self.decoder(z if force_not_quantize else self.quantized(z).z).astype(jnp.float32)

    def __call__(self, x: Array) -> tuple[Array, Quantized]:
        """(reconstruction, Quantized latents), for training."""
        quantized = self.quantized(self.encode(x))
        return self.decode(quantized.z, force_not_quantize=True), quantized
