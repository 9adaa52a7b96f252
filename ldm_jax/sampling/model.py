"""What is drawn from: a network, its diffusion process, and the space of what it models.

    Model(apply, process, prediction, space)            apply(params, x_t [B, *shape], t [B], cond) -> output [B, *shape]

Nothing here says how many axes x has: (h, w, C) for images and their latents, (t, h, w, C) for video, (n, C) for sound. The last
axis holds the channels. Parameters are passed in, never closed over. Everything is hashable, so that a compiled program can be
stored under the model that it was compiled for.

An adapter (LoRA, ControlNet) is a function Model -> Model, which replaces `apply`. Guidance by another network (Dhariwal & Nichol
2021) is a function Denoiser -> Denoiser: an entry of `transforms`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Apply, Denoiser
from ldm_jax.diffusion.process import Process

Cond = Mapping[str, Array]
# (denoise, params, cond) -> denoise: params are all that the compiled program takes, cond is the condition of the first branch. Its
# entry 'target' i32[B], the class that a classifier guides to, is for transforms alone: no network sees it.
Transform = Callable[[Denoiser, Any, Cond], Denoiser]


def from_uint8(images: Array) -> Array:
    """u8[...] in [0, 255] -> f32[...] in [-1, 1], x = u / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: Array) -> Array:
    """f32[...] in [-1, 1] -> u8[...], clipped and rounded to the nearest."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def from_entry(data: Array) -> Array:
    """f32[...] of an entry of a batch: bytes are scaled to [-1, 1], floats are taken as they are."""
    return from_uint8(data) if data.dtype == jnp.uint8 else data


def as_it_is(data: Array) -> Array:
    """`show` of what is no picture: sound and other signals are written as the numbers that they are."""
    return data


def pixels(params: Any, x: Array) -> Array:
    """`encode` and `decode` of a space whose x is the data itself."""
    return x


class Space(NamedTuple):
    """What is modelled. `params`, the parameters of the autoencoder, are the first argument of `encode` and `decode`, which may be
    called inside a compiled function and outside of one.

    shape    of one x, of any rank, channels last
    encode   (params, data f32[B, ...] in [-1, 1]) -> x f32[B, *shape], without noise
    decode   (params, x f32[B, *shape]) -> data f32[B, ...], nominally in [-1, 1]
    show     data -> u8[B, ...], what is written to a file; of signals the data itself
    bounded  whether x lies in [-1, 1], as pixels do and latents do not
    entry    the entry of a batch that holds the data: 'image', 'video', or a name of the data source's own
    load     this entry -> data f32[B, ...]
    """

    shape: tuple[int, ...]
    encode: Callable[[Any, Array], Array] = pixels
    decode: Callable[[Any, Array], Array] = pixels
    show: Callable[[Array], Array] = to_uint8
    bounded: bool = True
    entry: str = "image"
    load: Callable[[Array], Array] = from_entry


def joined(x_t: Array, cond: Cond) -> tuple[Array, dict[str, Array]]:
    """(x_t with the entry 'channels' of cond [B, ..., D] joined to its channels, the rest of cond)."""
    cond = dict(cond)
    channels = cond.pop("channels", None)
    return x_t if channels is None else jnp.concatenate([x_t, channels], -1), cond


class Network(NamedTuple):
    """`apply` of a linen module: two of the same module are equal, and share their compiled programs.

    name    the entry of params that holds the module's parameters; None: params are the module's

    The entry 'channels' of cond [B, ..., D] is joined to the channels of x_t: a mask and what surrounds it, a depth, an image to edit.
    """

    module: Any
    name: str | None = None

    def __call__(self, params: Any, x_t: Array, t: Array, cond: Cond) -> Array:
        x_t, cond = joined(x_t, cond)
        params = params if self.name is None else params[self.name]
        return self.module.apply({"params": params}, x_t, t, cond)


class Model(NamedTuple):
    """All that turns noise into x, but for the parameters.

    apply             (params, x_t, t, cond) -> output, a hashable callable: Network, or what an adapter makes of one
    process           with the time input that the network takes
    prediction        what the network predicts, a name of diffusion.prediction.PREDICTIONS
    learned_variance  whether the sampler takes the second half of an output of twice the channels; it is cut off otherwise
    transforms        what is done to the guided estimate, in this order: (denoise, params, cond) -> denoise
    finish            what is done to the estimate last of all, denoise -> denoise: the clipping of a published scheduler's file
    """

    apply: Apply
    process: Process
    prediction: str
    space: Space | None = None
    learned_variance: bool = False
    transforms: tuple[Transform, ...] = ()
    finish: Callable[[Denoiser], Denoiser] | None = None
