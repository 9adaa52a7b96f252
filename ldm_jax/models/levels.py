"""The levels of a diffusion U-Net: the res-blocks and attentions of one resolution, on the way down, in the middle and on the way up.

A level takes what its cross-attention attends to: the text, its mask, and `more`, which holds further keys and values
(spatial_attention.KeyValues) by the path of a block within the level.
"""

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.spatial_attention import KeyValues

More = Mapping[str, Sequence[KeyValues]]


def below(name: str, more: More) -> More:
    """The entries of `more` whose path begins with the module `name`, by the rest of the path."""
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
    """The constructors of a level's layers. An attention is called with (x, text, mask, more) where `cross` is set, else with (x)."""

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
    """`layers` res-blocks with attention, then a layer that halves the resolution. Returns x and the feature maps in order.

    `residual` is added where it was added when the published adapters (T2I-Adapter: Mou et al. 2023) were trained. In a level with
    cross-attention that is the last feature map before the halving, in any other level the last one of all.
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
    """`len(maps)` res-blocks with attention, then a layer that enlarges x to `size` (H, W).

    Each res-block takes x concatenated with one of `maps`, the last one first.
    """

    resample: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x, maps, temb, text, mask, train, size, more: More):
        for i, skip in enumerate(reversed(maps)):
            x = self._layer(i, jnp.concatenate([x, skip], -1), temb, text, mask, train, more)
        if self.resample is None:
            return x
        resample = self.resample(name="upsamplers_0")
        # A res-block can only double. UNet.multiple makes sure that a doubling fits where a level ends in one.
        return resample(x, temb, train) if size == doubled(x) else resample(x, temb, train, size)


class MidLevel(Context):
    """One res-block, then `layers` times an attention and a res-block."""

    layers: int = 1

    @nn.compact
    def __call__(self, x, temb, text, mask, train, more: More):
        x = self.resnet(name="resnets_0")(x, temb, train)
        for i in range(self.layers):
            x = self.resnet(name=f"resnets_{i + 1}")(self._attention(i, x, text, mask, more), temb, train)
        return x
