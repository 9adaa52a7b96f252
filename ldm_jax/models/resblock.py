"""The residual block of diffusion U-Nets and autoencoders, and the 2 x resampling of a feature map.

    h = conv2(act(norm2(conv1(act(norm1(x))) + proj(temb)))),   y = (shortcut(x) + h) / rescale

(Ho et al. 2020, appendix B.) With `time_scale_shift='scale_shift'` the embedding modulates the second norm instead:
norm2(h) (1 + s) + t (Dhariwal & Nichol 2021, section 3.1). With `resample` the block halves or doubles the resolution before conv1, as
in ADM ('down', 'up') or as in NCSN++ ('fir_down', 'fir_up'). The names of parameters follow diffusers' ResnetBlock2D: norm1, conv1,
time_emb_proj, norm2, conv2, conv_shortcut.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ldm_jax.kernels.conv import average_pool, upsample_nearest
from ldm_jax.kernels.norm import activation
from ldm_jax.models.fir import fir_downsample, fir_upsample
from ldm_jax.models.layers import Conv, Dense, GroupNorm, default_init

RESAMPLE = {
    "none": lambda x: x,
    "down": average_pool,
    "up": upsample_nearest,
    "fir_down": fir_downsample,
    "fir_up": fir_upsample,
}


class ResBlock(nn.Module):
    """x[B, H, W, C], temb[B, E] or None -> [B, H', W', features].

    `zero_init` starts conv2 at zero, so that a new block computes its shortcut (ADM). temb None means that there is no time input.
    `groups` is the number of groups of both norms (None: GroupNorm's rule); `groups_in` is that of norm1 where it differs.
    `conv_shortcut` puts a 1 x 1 convolution on the shortcut even where the number of channels stays the same.
    """

    features: int
    groups: int | None = 32
    groups_in: int | None = None
    eps: float = 1e-5
    act: str = "silu"
    time_scale_shift: str = "default"
    resample: str = "none"
    conv_shortcut: bool = False
    rescale: float = 1.0
    dropout: float = 0.0
    zero_init: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None, train: bool = False) -> Array:
        if self.time_scale_shift not in ("default", "scale_shift"):
            raise ValueError(
                f"resnet_time_scale_shift is {self.time_scale_shift!r}: expected 'default' or 'scale_shift'"
            )
        resample = RESAMPLE[self.resample]
        h = GroupNorm(self.groups_in or self.groups, self.eps, self.act, name="norm1")(x)
        x, h = resample(x), resample(h)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        modulation = None
        if temb is not None:
            width = self.features * (2 if self.time_scale_shift == "scale_shift" else 1)
            temb = Dense(width, dtype=self.dtype, kernel_init=default_init, name="time_emb_proj")(
                activation(self.act)(temb)
            )
            if self.time_scale_shift == "scale_shift":
                modulation = tuple(jnp.split(temb, 2, axis=-1))
            else:
                h = h + temb[:, None, None].astype(h.dtype)
        h = GroupNorm(self.groups, self.eps, self.act, name="norm2")(h, modulation)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        init = nn.initializers.zeros if self.zero_init else default_init
        h = Conv(self.features, dtype=self.dtype, kernel_init=init, name="conv2")(h)
        if self.conv_shortcut or x.shape[-1] != self.features:
            x = Conv(self.features, 1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        y = x + h
        return y if self.rescale == 1.0 else y / self.rescale
