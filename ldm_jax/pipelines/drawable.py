"""What the ways of drawing need of a model, the same of a published pipeline and of a run of `ldm train`.

    condition(Asked) -> cond                     texts and classes as arrays
    course(settings, ...) -> Course              a grid of times, and the process, sampler and scale of noise that go with it
    space.encode, space.decode                   between pictures and what is modelled

published.py makes one of a pipeline's parts; a run is made one by whoever knows runs. The ways of drawing know neither.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from ldm_jax.diffusion.samplers import Sampler
from ldm_jax.pipelines.kinds import Kind
from ldm_jax.pipelines.request import RESULT_SIZES, Size, Sizes
from ldm_jax.sampling.model import Model, Space
from ldm_jax.sampling.settings import Settings

# Where nobody gives a scale: that of CFG++ lies in [0, 1] (Chung et al. 2024), far from those of the other methods.
CFG_PP_SCALE = 0.6


class Takes(NamedTuple):
    """What a network takes besides x_t and t.

    prompts   whether it is conditioned on text
    classes   how many classes there are; None: it takes none. null: the number of the class that means none; None: there is none
    channels  channels of its input besides those of x that the way of drawing gives: a mask and what surrounds it, a depth, a picture
    scale     whether it takes the scale of its guidance, and is not guided besides (latent consistency models)
    image     whether a picture is part of its condition, which is then Asked.images; mask: and a mask, Asked.masks
    reduces   how many times smaller the condition is than this picture (super-resolution)
    """

    prompts: bool = False
    classes: int | None = None
    null: int | None = None
    channels: int = 0
    scale: bool = False
    image: bool = False
    mask: bool = False
    reduces: int = 1


class Frame(NamedTuple):
    """Sizes of pictures: x is [h, w, channels], each latent `factor` pixels wide.

    multiple  of pixels, what height and width have to be multiples of
    latent    (h, w) that the network was trained for; None: it does not say
    fixed     why no other size can be drawn; None: others can
    resizes   whether pictures are scaled to the size that the network was trained for unless another one is asked for
    """

    factor: int
    multiple: int
    latent: tuple[int, int] | None
    channels: int
    fixed: str | None = None
    resizes: bool = False

    def shape(self, size: Size | None) -> tuple[tuple[int, int, int], Size]:
        """((h, w, C) of x, (H, W) of its picture) for pictures of `size` (H, W), None: what the network was trained for.

        Raises ValueError for a size that is not a multiple of what the networks halve, with the nearest one that is.
        """
        if size is None:
            if self.latent is None:
                raise ValueError("size: the denoiser's config.json has no sample_size, so a size is needed")
            return (*self.latent, self.channels), tuple(n * self.factor for n in self.latent)
        step = self.multiple
        if len(size) != 2 or any(n < step or n % step for n in size):
            near = tuple(max(round(n / step), 1) * step for n in size)
            raise ValueError(f"size is {size}, expected (height, width), multiples of {step}; the nearest is {near}")
        latent = size[0] // self.factor, size[1] // self.factor
        if self.fixed and latent != self.latent:
            only = tuple(n * self.factor for n in self.latent)
            raise ValueError(f"size is {tuple(size)}, expected {only}: {self.fixed}")
        return (*latent, self.channels), tuple(size)


class Asked(NamedTuple):
    """What N images are conditioned on.

    prompts  N texts; None: nothing is said. labels: i32[N]; None: no class
    size     (H, W) of the pictures in pixels; sizes, clip_skip: see Request
    away     whether these are what is guided away from
    images   f32[N, H, W, 3] in [0, 1] and masks f32[N, H, W, 1], 1 where the picture is drawn anew, of a model whose condition they are
    """

    count: int
    prompts: list[str] | None
    labels: np.ndarray | None
    size: Size
    sizes: Sizes = RESULT_SIZES
    clip_skip: int = 0
    away: bool = False
    images: np.ndarray | None = None
    masks: np.ndarray | None = None


class Course(NamedTuple):
    """How one drawing goes from noise to data.

    times        f32[n + 1], falling; model: with the process and the time input that go with them
    sampler      a hashable callable that makes the Sampler; name: how `ldm samplers` calls it
    noise_scale  what unit noise is multiplied by to become the state at times[0]
    last         whether the estimate is taken once more at times[-1], where noise is left
    """

    times: np.ndarray
    model: Model
    sampler: Callable[[], Sampler]
    noise_scale: float
    last: bool = False


class Drawable(NamedTuple):
    """A model that is ready to draw.

    name          how messages call it; kind: what is said of its class
    takes, frame  what the network takes, and the sizes of its pictures
    params        of the network, on the device; with `offload` in the host's memory, and on the device while it is used
    space         what is modelled, with its parameters
    condition     (Asked) -> cond, arrays with leading axis N
    embed_scale   (guidance, count) -> the entry of cond for a network that takes its scale; {} for others
    course        (settings, size, strength=, start=, end=, distilled=) -> Course: the last part of the grid, from a picture (strength),
                  or what lies between two fractions of the way
    guided        settings -> whether the unconditional estimate is needed; unguided: at which scales it is not, for messages
    defaults      Settings where nobody gives any; an empty name or grid is that of the scheduler's file
    sampler       the name of the update rule by default
    rescales      whose spread `rescale` pulls back: 'output', of what the network predicts, as published pipelines do; or 'v'
    class_names   {number: name}
    parts         what it was made of
    """

    name: str
    kind: Kind
    takes: Takes
    frame: Frame
    params: Any
    space: Space
    space_params: Any
    condition: Callable[[Asked], dict[str, Array]]
    embed_scale: Callable[[float, int], dict[str, Array]]
    course: Callable[..., Course]
    guided: Callable[[Settings], bool]
    unguided: str
    defaults: Settings
    sampler: str
    rescales: str = "output"
    class_names: Mapping[int, str] = {}
    offload: bool = False
    parts: Any = None

    def settings(self, request: Any) -> Settings:
        """The settings that a request asks for: its fields over the defaults. The options of a name go with that name."""
        base, asked = self.defaults, {}
        for name, options in NAMED:
            value, more = getattr(request, FIELDS.get(name, name)), getattr(request, options)
            if value is not None:
                asked[name] = value
                same = value == (getattr(base, name) or (self.sampler if name == "name" else ""))
                asked[options] = dict(more or {}) if more or not same else getattr(base, options)
            elif more:
                asked[options] = dict(more)
        asked |= {key: getattr(request, key) for key in PLAIN if getattr(request, key) is not None}
        if asked.get("guidance_method") == "cfg_pp" != base.guidance_method:
            asked.setdefault("guidance", CFG_PP_SCALE)
        return base._replace(**asked)


# Fields of Settings and the fields that hold their options; a request calls the sampler's name `sampler`.
NAMED: Sequence[tuple[str, str]] = (
    ("name", "options"),
    ("grid", "grid_options"),
    ("guidance_method", "guidance_options"),
    ("guidance_schedule", "schedule_options"),
    ("threshold", "threshold_options"),
)
FIELDS = {"name": "sampler"}
PLAIN = ("steps", "guidance", "t_lo", "t_hi", "rescale")
