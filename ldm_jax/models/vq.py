"""The VQ autoencoder of latent diffusion: a latent pixel is one of N codebook entries.

    k = argmin_j |z - e_j|,   z_q = z + sg(e_k - z)
    loss = |sg(z) - e_k|^2 + beta |z - sg(e_k)|^2

where sg is the stop-gradient. The gradient of the decoder passes straight through to z, the first term of the loss moves the codebook
entry, and the second keeps the encoder near it (van den Oord et al. 2017, eq. 2 and 3; VQ-f4 of Rombach et al. 2022, section 3.1 and
appendix G). Instead of the first term the codebook may be a moving average of its latents, updated once a step (`codebook`, `update`):

    n_k <- gamma n_k + (1 - gamma) |Z_k|,   m_k <- gamma m_k + (1 - gamma) sum of Z_k,   e_k = m_k / n_k

where Z_k is the set of the batch's latents whose nearest entry is k (van den Oord et al. 2017, appendix A.1). The structure, the
options and the names of parameters are those of diffusers' VQModel. Diffusion models work on the latents before quantization;
`decode` quantizes. Images are NHWC in [-1, 1].
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.autoencoder_kl import check_image, halves
from ldm_jax.models.layers import Conv

# The constant of the Laplace smoothing, as in DeepMind's code for the paper.
EPS = 1e-5


class Codebook(NamedTuple):
    """The moving averages n f32[N] and m f32[N, D], and for how many images in a row no latent chose an entry, i32[N]."""

    count: Array
    total: Array
    unused: Array


def codebook(embedding: Array) -> Codebook:
    """The Codebook whose entries are f32[N, D], as if each entry were the average of one latent."""
    size = embedding.shape[0]
    # jnp.array makes a copy: a training state that is donated must not hold the buffer of the embedding twice.
    return Codebook(jnp.ones(size), jnp.array(embedding, jnp.float32), jnp.zeros(size, jnp.int32))


def update(
    book: Codebook, z: Array, indices: Array, key: Array, decay: float = 0.99, revive_after: int = 0
) -> tuple[Codebook, Array]:
    """The Codebook after a batch of latents z f32[B, h, w, D] whose nearest entries are i32[B, h, w], and its new entries f32[N, D].

    The counts are smoothed, n_k <- (n_k + EPS) / (sum n + N EPS) sum n, so that no entry is divided by zero. If no latent of
    `revive_after` images in a row chose an entry (0: this rule is off), the entry is replaced by a latent of this batch, drawn by
    `key`, and counts as new. Different entries get different latents, as long as there are enough. These are the random restarts of
    Jukebox (Dhariwal et al. 2020, section 3.1) and SoundStream (Zeghidour et al. 2021, section 3.3), which have a threshold on n_k
    instead; such a threshold would depend on the batch size.
    """
    size = book.count.shape[0]
    flat, nearest = z.reshape(-1, z.shape[-1]).astype(jnp.float32), indices.ravel()
    chosen = jnp.zeros(size).at[nearest].add(1.0)
    count = decay * book.count + (1.0 - decay) * chosen
    total = decay * book.total + (1.0 - decay) * jnp.zeros_like(book.total).at[nearest].add(flat)
    unused = jnp.where(chosen > 0, 0, book.unused + z.shape[0])

    dead = (unused >= revive_after) & (revive_after > 0)
    rows = jax.random.permutation(key, flat.shape[0])[(jnp.cumsum(dead) - 1) % flat.shape[0]]
    count = jnp.where(dead, 1.0, count)
    total = jnp.where(dead[:, None], flat[rows], total)
    smoothed = (count + EPS) / (1.0 + size * EPS / count.sum())
    return Codebook(count, total, jnp.where(dead, 0, unused)), total / smoothed[:, None]


def usage(indices: Array, size: int) -> tuple[Array, Array]:
    """(the share of `size` entries that indices i32[...] use, in [0, 1]; their perplexity exp(-sum p log p) <= size), both f32[]."""
    p = jnp.zeros(size).at[indices.ravel()].add(1.0) / indices.size
    return (p > 0).mean(), jnp.exp(jax.scipy.special.entr(p).sum())


class Quantized(NamedTuple):
    """Quantized latents f32[B, h, w, D], whose gradient goes to the latents before quantization; indices i32[B, h, w]; the two terms of
    the loss f32[B]."""

    z: Array
    indices: Array
    codebook: Array
    commitment: Array

    def loss(self, beta: float = 0.25) -> Array:
        """codebook + beta commitment, f32[B], a mean over the latent. The code of Rombach et al., and diffusers' commit_loss after it,
        has commitment + beta codebook instead."""
        return self.codebook + beta * self.commitment


class VectorQuantizer(nn.Module):
    """A codebook `embedding` f32[size, dim], initialized uniformly in [-1 / size, 1 / size]."""

    size: int
    dim: int

    def setup(self) -> None:
        def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            return jax.random.uniform(key, shape, dtype, -1.0 / self.size, 1.0 / self.size)

        self.embedding = self.param("embedding", uniform, (self.size, self.dim), jnp.float32)

    def lookup(self, indices: Array) -> Array:
        """i32[...] -> f32[..., dim]."""
        return self.embedding[indices].astype(jnp.float32)

    def __call__(self, z: Array) -> Quantized:
        """z f32[B, h, w, dim]."""
        codes = jax.lax.stop_gradient(self.embedding.astype(jnp.float32))
        # |z|^2 is the same for all entries. The product has full precision: with bf16 or tf32 another entry may be nearest.
        products = jnp.matmul(jax.lax.stop_gradient(z), codes.T, precision=jax.lax.Precision.HIGHEST)
        indices = jnp.argmin(jnp.square(codes).sum(1) - 2.0 * products, -1).astype(jnp.int32)
        e = self.lookup(indices)

        def error(a: Array, b: Array) -> Array:
            return jnp.square(a - b).mean((1, 2, 3))

        fixed_e, fixed_z = jax.lax.stop_gradient(e), jax.lax.stop_gradient(z)
        return Quantized(z + jax.lax.stop_gradient(e - z), indices, error(e, fixed_z), error(z, fixed_e))


class VQModel(nn.Module):
    """`encode`, `decode`, and both in a row; downsamples by f = 2 ** (len(block_out_channels) - 1).

    The options are those of diffusers' VQModel. By default all levels have the plain block type, and `vq_embed_dim` (D) is
    latent_channels. With `lookup_from_codebook` and force_not_quantize, `decode` takes indices. `scaling_factor` is not applied here:
    code that trains diffusion models reads it. `remat` and `dtype` are as in AutoencoderKL.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512)
    layers_per_block: int = 2
    latent_channels: int = 3
    num_vq_embeddings: int = 8192
    vq_embed_dim: int | None = None
    norm_num_groups: int = 32
    act_fn: str = "silu"
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False
    scaling_factor: float = 0.18215
    remat: bool = False
    dtype: str = "float32"

    def setup(self) -> None:
        self.encoder, self.decoder = halves(self, self.latent_channels)
        dim = self.vq_embed_dim or self.latent_channels
        self.quant_conv = Conv(dim, 1, padding=0, dtype=self.dtype)
        self.quantize = VectorQuantizer(self.num_vq_embeddings, dim)
        self.post_quant_conv = Conv(self.latent_channels, 1, padding=0, dtype=self.dtype)

    def encode(self, x: Array) -> Array:
        """Images f32[B, H, W, in_channels] in [-1, 1] -> latents before quantization, f32[B, H / f, W / f, D].

        ValueError when the channels are not `in_channels` or f does not divide H and W.
        """
        check_image(self, x)
        return self.quant_conv(self.encoder(x)).astype(jnp.float32)

    def quantized(self, z: Array) -> Quantized:
        """The nearest codebook entries of latents f32[B, h, w, D]."""
        return self.quantize(z.astype(jnp.float32))

    def decode(self, z: Array, force_not_quantize: bool = False) -> Array:
        """Latents f32[B, h, w, D] -> images f32[B, h f, w f, out_channels], about [-1, 1]. Unless `force_not_quantize`, the latents are
        quantized first. With `force_not_quantize` and `lookup_from_codebook`, z is indices i32[B, h, w]."""
        if force_not_quantize and self.lookup_from_codebook:
            if z.ndim != 3 or not jnp.issubdtype(z.dtype, jnp.integer):
                raise ValueError(f"VQModel.decode: z is {z.dtype}{list(z.shape)}, expected indices i32[B, h, w]")
            z = self.quantize.lookup(z)
        dim = self.vq_embed_dim or self.latent_channels
        if z.ndim != 4 or z.shape[-1] != dim:
            raise ValueError(f"VQModel.decode: z is {z.shape}, expected [B, h, w, {dim}]")
        return self._image(z if force_not_quantize else self.quantized(z).z)

    def _image(self, z: Array) -> Array:
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, x: Array) -> tuple[Array, Quantized]:
        """(reconstruction, Quantized latents), for training."""
        quantized = self.quantized(self.encode(x))
        return self._image(quantized.z), quantized
