"""The KL autoencoder of latent diffusion: an image to a Gaussian over latents, and a latent back to an image.

    q(z | x) = N(mean(x), exp(logvar(x))),   x_hat = decode(z)        (Rombach et al. 2022, section 3.1 and appendix G)

Structure, option names, order and parameter names are those of diffusers' AutoencoderKL, so that published weights fit.
Images are NHWC in [-1, 1]; latents are unscaled: whitening or a scaling factor belongs to whoever trains on them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.conv import Conv, Downsample, Upsample
from ldm_jax.models.norm import GroupNorm
from ldm_jax.models.resblock import ResBlock
from ldm_jax.models.spatial_attention import AttentionBlock

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


class Stage(nn.Module):
    """The res-blocks of one resolution, each followed by attention where asked, then a resampling layer or none."""

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


class Encoder(nn.Module):
    """x[B, H, W, C] -> [B, H / f, W / f, out_channels] with f = 2 ** (levels - 1)."""

    out_channels: int
    attention: tuple[bool, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    mid_block_add_attention: bool
    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module]
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        widths = self.block_out_channels
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        for i, (width, attention) in enumerate(zip(widths, self.attention)):
            last = i == len(widths) - 1
            x = Stage(
                functools.partial(self.resnet, width),
                functools.partial(self.attend, width) if attention else None,
                self.layers_per_block,
                None if last else functools.partial(Downsample, width, 0, self.dtype, name="downsamplers_0"),
                name=f"down_blocks_{i}",
            )(x)
        attend = functools.partial(self.attend, widths[-1]) if self.mid_block_add_attention else None
        x = Middle(functools.partial(self.resnet, widths[-1]), attend, name="mid_block")(x)
        x = GroupNorm(self.resnet.keywords["groups"], EPS, "silu", name="conv_norm_out")(x)
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """z[B, h, w, C] -> [B, h f, w f, out_channels]; the mirror image of Encoder with one more res-block a level."""

    out_channels: int
    attention: tuple[bool, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    mid_block_add_attention: bool
    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module]
    dtype: str

    @nn.compact
    def __call__(self, z: Array) -> Array:
        widths = self.block_out_channels[::-1]
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(z)
        attend = functools.partial(self.attend, widths[0]) if self.mid_block_add_attention else None
        x = Middle(functools.partial(self.resnet, widths[0]), attend, name="mid_block")(x)
        for i, (width, attention) in enumerate(zip(widths, self.attention)):
            last = i == len(widths) - 1
            x = Stage(
                functools.partial(self.resnet, width),
                functools.partial(self.attend, width) if attention else None,
                self.layers_per_block + 1,
                None if last else functools.partial(Upsample, width, self.dtype, name="upsamplers_0"),
                name=f"up_blocks_{i}",
            )(x)
        x = GroupNorm(self.resnet.keywords["groups"], EPS, "silu", name="conv_norm_out")(x)
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """`encode`, `decode`, and both in a row; downsamples by 2 ** (len(block_out_channels) - 1).

    Options as in diffusers' AutoencoderKL; block types default to the plain one at every level. Ours: `remat` recomputes each
    block on the backward pass, `dtype` is the compute dtype ('float32' or 'bfloat16') over float32 parameters.
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
    remat: bool = False
    dtype: str = "float32"

    def setup(self) -> None:
        levels = len(self.block_out_channels)

        def attention_of(kind: str, names: tuple[str, ...] | None, known: dict[str, bool]) -> tuple[bool, ...]:
            names = (next(iter(known)),) * levels if names is None else tuple(names)
            if len(names) != levels:
                raise ValueError(f"{kind} has {len(names)} entries: expected {levels}, one for each block_out_channels")
            for name in names:
                if name not in known:
                    raise ValueError(f"{kind} contains {name!r}: expected one of {', '.join(known)}")
            return tuple(known[name] for name in names)

        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide block_out_channels {width}")
        wrap = nn.remat if self.remat else (lambda module: module)
        resnet = functools.partial(
            wrap(ResBlock), groups=self.norm_num_groups, eps=EPS, act=self.act_fn, dtype=self.dtype
        )
        attend = functools.partial(wrap(AttentionBlock), groups=self.norm_num_groups, eps=EPS, dtype=self.dtype)
        shared = (
            tuple(self.block_out_channels),
            self.layers_per_block,
            self.mid_block_add_attention,
            resnet,
            attend,
            self.dtype,
        )
        down = attention_of("down_block_types", self.down_block_types, DOWN)
        up = attention_of("up_block_types", self.up_block_types, UP)
        self.encoder = Encoder(2 * self.latent_channels, down, *shared)
        self.decoder = Decoder(self.out_channels, up, *shared)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * self.latent_channels, 1, padding=0, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, 1, padding=0, dtype=self.dtype)

    def encode(self, x: Array) -> Posterior:
        """Images f32[B, H, W, in_channels] in [-1, 1] -> Posterior of f32[B, H / f, W / f, latent_channels].

        ValueError when the channels are not `in_channels` or f does not divide H and W.
        """
        factor = 2 ** (len(self.block_out_channels) - 1)
        if x.ndim != 4 or x.shape[-1] != self.in_channels or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"AutoencoderKL.encode: x is {x.shape}, expected [B, H, W, {self.in_channels}] with H and W multiples of {factor}"
            )
        h = self.encoder(x)
        if self.use_quant_conv:
            h = self.quant_conv(h)
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z: Array) -> Array:
        """Unscaled latents f32[B, h, w, latent_channels] -> images f32[B, h f, w f, out_channels], about [-1, 1]."""
        if z.ndim != 4 or z.shape[-1] != self.latent_channels:
            raise ValueError(f"AutoencoderKL.decode: z is {z.shape}, expected [B, h, w, {self.latent_channels}]")
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: Array, key: Array | None = None) -> tuple[Array, Posterior]:
        """(reconstruction, posterior); the latent is the mean without a key and a sample with one."""
        posterior = self.encode(x)
        z = posterior.mean if key is None else posterior.sample(key)
        return self.decode(z), posterior
