"""The levels of a diffusion U-Net: res-blocks with attention between two resamplings, on the way down, in the middle, on the way up."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


def doubled(x: Array) -> tuple[int, int]:
    """(2 H, 2 W) of x [B, H, W, C]."""
    return 2 * x.shape[1], 2 * x.shape[2]


class Context(nn.Module):
    """What every block is given: makers of its layers. `attend` is None, or called with (x) or (x, text, mask)."""

    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module] | None
    cross: bool

    def _layer(self, i: int, x: Array, temb: Array, text: Array | None, mask: Array | None, train: bool) -> Array:
        x = self.resnet(name=f"resnets_{i}")(x, temb, train)
        return self._attention(i, x, text, mask)

    def _attention(self, i: int, x: Array, text: Array | None, mask: Array | None) -> Array:
        if self.attend is None:
            return x
        block = self.attend(name=f"attentions_{i}")
        return block(x, text, mask) if self.cross else block(x)


class DownLevel(Context):
    """`layers` res-blocks with attention, then a halving; returns x and the feature maps in order."""

    layers: int = 1
    resample: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x, temb, text, mask, train):
        maps = []
        for i in range(self.layers):
            x = self._layer(i, x, temb, text, mask, train)
            maps.append(x)
        if self.resample is not None:
            x = self.resample(name="downsamplers_0")(x, temb, train)
            maps.append(x)
        return x, maps


class UpLevel(Context):
    """`len(maps)` res-blocks with attention, each after concatenating the last of `maps`, then a doubling to `size` (H, W)."""

    resample: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x, maps, temb, text, mask, train, size):
        for i, skip in enumerate(reversed(maps)):
            x = self._layer(i, jnp.concatenate([x, skip], -1), temb, text, mask, train)
        if self.resample is None:
            return x
        resample = self.resample(name="upsamplers_0")
        # A res-block always doubles; UNet.multiple says where only a doubling fits.
        return resample(x, temb, train) if size == doubled(x) else resample(x, temb, train, size)


class MidLevel(Context):
    """One res-block, then `layers` times attention and res-block."""

    layers: int = 1

    @nn.compact
    def __call__(self, x, temb, text, mask, train):
        x = self.resnet(name="resnets_0")(x, temb, train)
        for i in range(self.layers):
            x = self.resnet(name=f"resnets_{i + 1}")(self._attention(i, x, text, mask), temb, train)
        return x
