"""What a user asks of a pipeline, as one value. None stands for the default of the pipeline and of the way of drawing."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Prompts = str | Sequence[str]
Size = tuple[int, int]


class Sizes(NamedTuple):
    """SDXL's numbers: sizes (H, W) of the picture before cropping and as asked for (None: that of the result), the crop's top
    left corner, and for the refiner the aesthetic score, and that of what is guided away from."""

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    aesthetic: float = 6.0
    negative_aesthetic: float = 2.5


RESULT_SIZES = Sizes()


class Request(NamedTuple):
    """What is asked for; each way of drawing reads the fields that concern it (pipeline.WAYS).

    What is shown:
    prompts         one, or one for each image; None for a network that takes none
    negative        prompts guided away from, one or N; None: none
    labels          classes, repeated in order; None: every class in turn
    num             how many images; None: as many as prompts, labels or pictures
    size            (H, W) in pixels; None: what the network was trained for, or the size of the pictures
    sizes           SDXL's numbers; clip_skip: how many of the last layers of the text encoders are left out

    Pictures (PIL, u8, or floats in [0, 1]; one or N):
    images          what to begin with, to edit, or to fill in
    masks           f32[N or 1, H, W, 1] in [0, 1], u8 or PIL: drawn anew where 1/2 or more
    depth           f32[N or 1, H', W'] of any scale, for a network that is conditioned on one
    source          what `images` show, for variations
    strength        how much of the grid is run from a picture, in (0, 1]: a small one keeps the picture, 1 keeps next to nothing
    start, end      fractions of the way, in (0, 1]: `images` are latents that another network left at `start`; stop at `end`

    How it is drawn:
    sampler         update rule, a name of `ldm samplers`, and its `options`; grid: a spacing of the steps, and its `grid_options`
    steps           of the sampler
    guidance        the scale of guidance; image_guidance: that of the picture, where an instruction edits it
    t_lo, t_hi      guidance acts at t_lo <= t <= t_hi alone
    rescale         how far the spread of the guided estimate is pulled back, in [0, 1] (Lin et al. 2023)
    guidance_method, guidance_schedule, threshold     names of sampling/settings.py, and options of each

    Randomness:
    seed            image i is drawn from (seed, i) alone; seeds: the two that interpolation goes between
    first           the number of the first image: several calls draw what one would
    latents         initial noise f32[N or 1, *shape] of unit variance; None: drawn from the seed

    The result:
    decode          pictures f32[N, H, W, 3] in [0, 1]; False: latents
    batch_size      images at a time, which changes no image; quiet: no progress bar
    """

    prompts: Prompts | None = None
    negative: Prompts | None = None
    labels: Sequence[int] | None = None
    num: int | None = None
    size: Size | None = None
    sizes: Sizes = RESULT_SIZES
    clip_skip: int = 0
    images: Any = None
    masks: Any = None
    depth: Any = None
    source: Prompts = ""
    strength: float | None = None
    start: float | None = None
    end: float = 1.0
    sampler: str | None = None
    options: Mapping[str, Any] | None = None
    grid: str | None = None
    grid_options: Mapping[str, Any] | None = None
    steps: int | None = None
    guidance: float | None = None
    image_guidance: float = 1.5
    t_lo: float | None = None
    t_hi: float | None = None
    rescale: float | None = None
    guidance_method: str | None = None
    guidance_options: Mapping[str, Any] | None = None
    guidance_schedule: str | None = None
    schedule_options: Mapping[str, Any] | None = None
    threshold: str | None = None
    threshold_options: Mapping[str, Any] | None = None
    seed: int = 0
    seeds: tuple[int, int] | None = None
    first: int = 0
    latents: Any = None
    decode: bool = True
    batch_size: int = 8
    quiet: bool = True
