"""The levels of NCSN++. Those on the way down take the image at their resolution; those on the way up add to the output there.

    down   image <- fir_downsample(image),   x <- resnet_down(x) + skip_conv(image)                    ('input skip', summed)
    up     out <- fir_upsample(out) + skip_conv(silu(skip_norm(x))),   x <- resnet_up(x)               ('output skip')

(Song et al. 2021, section 4.1 and appendix H.1.) The results of res-blocks and attentions are divided by sqrt(2), whatever the
options of the network are, and resampling goes through the filter of models/fir.py. The names of parameters are those of diffusers'
SkipDownBlock2D, AttnSkipDownBlock2D, SkipUpBlock2D and AttnSkipUpBlock2D. Their quirks are kept: the attention has 32 groups; on the
way up there is one, after all res-blocks; the first norm of a res-block on the way up has min(C_x + C_skip // 4, 32) groups, which is
32 in practice.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.fir import fir_downsample, fir_upsample
from ldm_jax.models.layers import Conv, GroupNorm, default_init

RESCALE = 2.0**0.5
ATTENTION_GROUPS = 32


class SkipLevel(nn.Module):
    """The options of both directions: constructors of res-blocks and of attention (or None); `last`: the resolution stays the same."""

    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module] | None
    last: bool
    dtype: str


class SkipDownLevel(SkipLevel):
    """(x, image) -> (x, feature maps in order, image). x and the image are halved unless `last`."""

    layers: int = 1

    @nn.compact
    def __call__(self, x: Array, image: Array, temb: Array, train: bool) -> tuple[Array, list[Array], Array]:
        maps = []
        for i in range(self.layers):
            x = self.resnet(name=f"resnets_{i}")(x, temb, train)
            x = x if self.attend is None else self.attend(name=f"attentions_{i}")(x)
            maps.append(x)
        if not self.last:
            x = self.resnet(resample="fir_down", conv_shortcut=True, name="resnet_down")(x, temb, train)
            image = fir_downsample(image)
            x = x + Conv(x.shape[-1], 1, padding=0, dtype=self.dtype, name="skip_conv")(image)
            maps.append(x)
        return x, maps, image


class SkipUpLevel(SkipLevel):
    """(x, maps, out or None) -> (x, out), doubled unless `last`. `out` f32[B, H, W, out_channels] is the sum of the outputs so far."""

    out_channels: int = 3
    eps: float = 1e-6
    zero_init: bool = False

    @nn.compact
    def __call__(
        self, x: Array, maps: list[Array], out: Array | None, temb: Array, train: bool
    ) -> tuple[Array, Array | None]:
        for i, skip in enumerate(reversed(maps)):
            groups_in = None if self.attend is None else min(x.shape[-1] + skip.shape[-1] // 4, 32)
            x = self.resnet(groups_in=groups_in, name=f"resnets_{i}")(jnp.concatenate([x, skip], -1), temb, train)
        x = x if self.attend is None else self.attend(name="attentions_0")(x)
        out = None if out is None else fir_upsample(out)
        if not self.last:
            init = nn.initializers.zeros if self.zero_init else default_init
            new = GroupNorm(None, self.eps, "silu", name="skip_norm")(x)
            new = Conv(self.out_channels, dtype=self.dtype, kernel_init=init, name="skip_conv")(new)
            new = new.astype(jnp.float32)
            out = new if out is None else out + new
            x = self.resnet(resample="fir_up", conv_shortcut=True, name="resnet_up")(x, temb, train)
        return x, out
