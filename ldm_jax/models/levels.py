"""The levels of a diffusion U-Net: res-blocks with attention between two resamplings, on the way down, in the middle, on the way up.

Each is called with what its cross-attention sees: the text, its mask, and `more`, further keys and values by the path of a block within
the level (spatial_attention.KeyValues).
"""

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.spatial_attention import KeyValues

More = Mapping[str, Sequence[KeyValues]]


def below(name: str, more: More) -> More:
    """What of `more` is for the module `name`, by the rest of its path."""
    return {path.removeprefix(f"{name}/"): pairs for path, pairs in more.items() if path.startswith(f"{name}/")}


def added(x: Array, residual: Array, what: str) -> Array:
    """x + residual in x's dtype; ValueError unless they have one shape."""
    if residual.shape != x.shape:
        raise ValueError(f"UNet: {what} is {residual.shape}, expected {x.shape}")
    return x + residual.astype(x.dtype)


def doubled(x: Array) -> tuple[int, int]:
    """(2 H, 2 W) of x [B, H, W, C]."""
    return 2 * x.shape[1], 2 * x.shape[2]


class Context(nn.Module):
    """The makers of a level's layers. `attend` is None, or called with (x), or where `cross` with (x, text, mask, more)."""

    resnet: Callable[..., nn.Module]
    attend: Callable[..., nn.Module] | None
    cross: bool

    def _layer(
        self, i: int, x: Array, temb: Array, text: Array | None, mask: Array | None, train: bool, more: More
    ) -> Array:
        x = self.resnet(name=f"resnets_{i}")(x, temb, train)
        return self._attention(i, x, text, mask, more)

    def _attention(self, i: int, x: Array, text: Array | None, mask: Array | None, more: More) -> Array:
        if self.attend is None:
            return x
        block = self.attend(name=f"attentions_{i}")
        return block(x, text, mask, below(f"attentions_{i}", more)) if self.cross else block(x)


class DownLevel(Context):
    """`layers` res-blocks with attention, then a halving; returns x and the feature maps in order.

    `residual` is added where the published adapters (T2I-Adapter: Mou et al. 2023) were trained: to the last feature map before the
    halving in levels with cross-attention, after it in others.
    """

    layers: int = 1
    resample: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x, temb, text, mask, train, more: More, residual: Array | None):
        maps = []
        for i in range(self.layers):
            x = self._layer(i, x, temb, text, mask, train, more)
            if residual is not None and self.cross and i == self.layers - 1:
                x = added(x, residual, f"the residual of {self.name}")
            maps.append(x)
        if self.resample is not None:
            x = self.resample(name="downsamplers_0")(x, temb, train)
            maps.append(x)
        if residual is not None and not self.cross:
            x = maps[-1] = added(x, residual, f"the residual of {self.name}")
        return x, maps


class UpLevel(Context):
    """`len(maps)` res-blocks with attention, each after concatenating the last of `maps`, then a doubling to `size` (H, W)."""

    resample: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x, maps, temb, text, mask, train, size, more: More):
        for i, skip in enumerate(reversed(maps)):
            x = self._layer(i, jnp.concatenate([x, skip], -1), temb, text, mask, train, more)
        if self.resample is None:
            return x
        resample = self.resample(name="upsamplers_0")
        # A res-block always doubles; UNet.multiple says where only a doubling fits.
        return resample(x, temb, train) if size == doubled(x) else resample(x, temb, train, size)


class MidLevel(Context):
    """One res-block, then `layers` times attention and res-block."""

    layers: int = 1

    @nn.compact
    def __call__(self, x, temb, text, mask, train, more: More):
        x = self.resnet(name="resnets_0")(x, temb, train)
        for i in range(self.layers):
            x = self.resnet(name=f"resnets_{i + 1}")(self._attention(i, x, text, mask, more), temb, train)
        return x
