"""The KL autoencoder of latent diffusion: it encodes an image as a Gaussian over latents, and decodes a latent to an image.

    q(z | x) = N(mean(x), exp(logvar(x))),   x_hat = decode(z)        (Rombach et al. 2022, section 3.1 and appendix G)

The structure, the order of layers, the options and the names of parameters are those of diffusers' AutoencoderKL, so that published
weights fit. Images are NHWC in [-1, 1]. Latents are not scaled here: whitening, or a scaling factor, is applied by the code that trains
on them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.layers import Conv, Downsample, GroupNorm, Upsample
from ldm_jax.models.resblock import ResBlock
from ldm_jax.models.spatial_attention import AttentionBlock
from ldm_jax.models.tiling import tiled

EPS = 1e-6
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: mean and log variance, both f32[B, h, w, C], logvar within [-30, 20]."""

    mean: Array
    logvar: Array

    def sample(self, key: Array) -> Array:
        """mean + exp(logvar / 2) eps, f32[B, h, w, C]."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def kl(self) -> Array:
        """KL(q || N(0, I)) in nats, summed over the latent of each image: f32[B]."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.reshape(terms.shape[0], -1).sum(1)


def from_moments(moments: Array) -> Posterior:
    """The Posterior of f32[B, h, w, 2 C]: the first half of the channels is its mean, the second its log variance."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


class Stage(nn.Module):
    """The res-blocks of one resolution, each followed by attention unless `attend` is None, then by a resampling layer or none."""

    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module] | None
    layers: int
    resample: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = self.resnet(name=f"resnets_{i}")(x)
            if self.attend is not None:
                x = self.attend(name=f"attentions_{i}")(x)
        return x if self.resample is None else self.resample()(x)


class Middle(nn.Module):
    """res-block, attention (or none), res-block, at the lowest resolution."""

    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.resnet(name="resnets_0")(x)
        if self.attend is not None:
            x = self.attend(name="attentions_0")(x)
        return self.resnet(name="resnets_1")(x)


class Half(nn.Module):
    """The options that the encoder and the decoder share, and the layers that both are made of.

    `attention` has one flag for each level.
    """

    out_channels: int
    attention: tuple[bool, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    act_fn: str
    mid_block_add_attention: bool
    remat: bool
    dtype: str

    def _blocks(self, width: int, attention: bool) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module] | None]:
        wrap = nn.remat if self.remat else (lambda module: module)
        shared = {"groups": self.norm_num_groups, "eps": EPS, "dtype": self.dtype}
        resnet = functools.partial(wrap(ResBlock), width, act=self.act_fn, **shared)
        return resnet, functools.partial(wrap(AttentionBlock), width, **shared) if attention else None

    def _middle(self, x: Array) -> Array:
        return Middle(*self._blocks(x.shape[-1], self.mid_block_add_attention), name="mid_block")(x)

    def _out(self, x: Array) -> Array:
        x = GroupNorm(self.norm_num_groups, EPS, "silu", name="conv_norm_out")(x)
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(x)


class Encoder(Half):
    """x[B, H, W, C] -> [B, H / f, W / f, out_channels] with f = 2 ** (levels - 1)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        widths = self.block_out_channels
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        for i, (width, attention) in enumerate(zip(widths, self.attention)):
            last = i == len(widths) - 1
            resample = None if last else functools.partial(Downsample, width, 0, self.dtype, name="downsamplers_0")
            blocks = self._blocks(width, attention)
            x = Stage(*blocks, self.layers_per_block, resample, name=f"down_blocks_{i}")(x)
        return self._out(self._middle(x))


class Decoder(Half):
    """z[B, h, w, C] -> [B, h f, w f, out_channels]; the mirror image of Encoder with one more res-block a level."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        widths = self.block_out_channels[::-1]
        x = self._middle(Conv(widths[0], dtype=self.dtype, name="conv_in")(z))
        for i, (width, attention) in enumerate(zip(widths, self.attention)):
            last = i == len(widths) - 1
            resample = None if last else functools.partial(Upsample, width, self.dtype, name="upsamplers_0")
            blocks = self._blocks(width, attention)
            x = Stage(*blocks, self.layers_per_block + 1, resample, name=f"up_blocks_{i}")(x)
        return self._out(x)


def halves(module: nn.Module, channels: int) -> tuple[Encoder, Decoder]:
    """The encoder (to `channels` channels) and the decoder of a `module` with the options of AutoencoderKL.

    Raises ValueError for an option that has no meaning.
    """
    levels = len(module.block_out_channels)

    def attention_of(kind: str, table: dict[str, bool]) -> tuple[bool, ...]:
        names = getattr(module, kind)
        names = (next(iter(table)),) * levels if names is None else tuple(names)
        if len(names) != levels:
            raise ValueError(f"{kind} has {len(names)} entries: expected {levels}, one for each block_out_channels")
        for name in names:
            if name not in table:
                raise ValueError(f"{kind} contains {name!r}: expected one of {', '.join(table)}")
        return tuple(table[name] for name in names)

    for width in module.block_out_channels:
        if width % module.norm_num_groups:
            raise ValueError(f"norm_num_groups {module.norm_num_groups} does not divide block_out_channels {width}")
    shared = {
        "block_out_channels": tuple(module.block_out_channels),
        "layers_per_block": module.layers_per_block,
        "norm_num_groups": module.norm_num_groups,
        "act_fn": module.act_fn,
        "mid_block_add_attention": module.mid_block_add_attention,
        "remat": module.remat,
        "dtype": module.dtype,
    }
    encoder = Encoder(channels, attention_of("down_block_types", DOWN), **shared)
    return encoder, Decoder(module.out_channels, attention_of("up_block_types", UP), **shared)


def check_image(module: nn.Module, x: Array) -> None:
    """ValueError unless x is [B, H, W, module.in_channels], and the encoder can halve H and W at every level but the last."""
    factor = 2 ** (len(module.block_out_channels) - 1)
    if x.ndim != 4 or x.shape[-1] != module.in_channels or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"{type(module).__name__}.encode: x is {x.shape}, expected [B, H, W, {module.in_channels}] "
            f"with H and W multiples of {factor}"
        )


class AutoencoderKL(nn.Module):
    """`encode`, `decode`, and both in a row; downsamples by 2 ** (len(block_out_channels) - 1).

    The options are those of diffusers' AutoencoderKL; by default all levels have the plain block type. `encode` and `decode` do not use
    `scaling_factor` and `shift_factor`: code that whitens latents reads them, (z - shift_factor) scaling_factor. Two options are not
    diffusers': `remat` recomputes each block in the backward pass, and `dtype` is the compute dtype ('float32' or 'bfloat16'), with
    parameters in float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    act_fn: str = "silu"
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    remat: bool = False
    dtype: str = "float32"

    def setup(self) -> None:
        self.encoder, self.decoder = halves(self, 2 * self.latent_channels)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * self.latent_channels, 1, padding=0, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, 1, padding=0, dtype=self.dtype)

    def moments(self, x: Array) -> Array:
        """The array that `encode` makes a Posterior of: f32[B, H / f, W / f, 2 latent_channels]. Raises as `encode` does."""
        check_image(self, x)
        h = self.encoder(x)
        return (self.quant_conv(h) if self.use_quant_conv else h).astype(jnp.float32)

    def encode(self, x: Array) -> Posterior:
        """Images f32[B, H, W, in_channels] in [-1, 1] -> Posterior of f32[B, H / f, W / f, latent_channels].

        ValueError when the channels are not `in_channels` or f does not divide H and W.
        """
        return from_moments(self.moments(x))

    def decode(self, z: Array) -> Array:
        """Unscaled latents f32[B, h, w, latent_channels] -> images f32[B, h f, w f, out_channels], about [-1, 1]."""
        if z.ndim != 4 or z.shape[-1] != self.latent_channels:
            raise ValueError(f"AutoencoderKL.decode: z is {z.shape}, expected [B, h, w, {self.latent_channels}]")
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: Array, key: Array | None = None) -> tuple[Array, Posterior]:
        """(reconstruction, posterior). The latent is the mean where `key` is None, else a sample."""
        posterior = self.encode(x)
        z = posterior.mean if key is None else posterior.sample(key)
        return self.decode(z), posterior


def inputs(module: nn.Module, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of an autoencoder with the options of AutoencoderKL, for one image of `shape` (H, W, C); see models.inputs."""
    side = 2 ** (len(module.block_out_channels) - 1)
    return {"x": jax.ShapeDtypeStruct((1, *(shape or (side, side, module.in_channels))), jnp.float32)}


def tiled_encode(module: AutoencoderKL, params: Any, x: Array, tile: int = 512, overlap: float = 0.25) -> Posterior:
    """`encode` in tiles of `tile` pixels a side, which gives other numbers than `encode`.

    diffusers takes the config's `sample_size` as the tile. The module has no such option; 512 is the `sample_size` of SD 1.
    Raises ValueError when `tile` is not a multiple of f, and as `tiled` does.
    """
    factor = 2 ** (len(module.block_out_channels) - 1)
    if tile % factor:
        raise ValueError(f"tiled_encode: tile is {tile}, expected a multiple of {factor}")

    def moments(x: Array) -> Array:
        return module.apply({"params": params}, x, method="moments")

    return from_moments(tiled(moments, x, tile, tile // factor, overlap))


def tiled_decode(module: AutoencoderKL, params: Any, z: Array, tile: int = 512, overlap: float = 0.25) -> Array:
    """`decode` in tiles of `tile` pixels (tile / f latents) a side; see tiled_encode."""
    factor = 2 ** (len(module.block_out_channels) - 1)
    if tile % factor:
        raise ValueError(f"tiled_decode: tile is {tile}, expected a multiple of {factor}")

    def decode(z: Array) -> Array:
        return module.apply({"params": params}, z, method="decode")

    return tiled(decode, z, tile // factor, tile, overlap)
