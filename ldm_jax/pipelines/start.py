"""Where a drawing starts, and how it is carried from there to pictures: what all ways of drawing share.

A way of drawing is a function begin(pipeline, request, settings) -> Start. `carry` is the one place that draws.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.pipelines import fitting
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.components import on_device
from ldm_jax.pipelines.drawable import Asked, Course, Drawable
from ldm_jax.pipelines.prompts import texts
from ldm_jax.pipelines.request import Prompts, Request, Size
from ldm_jax.sampling.backwards import Held, Scales
from ldm_jax.sampling.draw import Plan, draw
from ldm_jax.sampling.model import Cond
from ldm_jax.sampling.settings import Settings, guidance_of


class Start(NamedTuple):
    """The state x f32[N, ...] at course.times[0], and all that it goes on with.

    conds  one, two or three dicts of arrays with leading axis N: what is asked for, and what it is guided away from
    keys   [N], for samplers that draw noise; held: a region that is kept
    """

    x: Array
    course: Course
    conds: list[Cond]
    keys: Array
    held: Held | None = None


def carry(pipeline: Drawable, start: Start, request: Request, settings: Settings) -> np.ndarray:
    """x f32[N, ...] at the end of the course."""
    course, how = start.course, guidance_of(settings)
    if pipeline.rescales == "output":
        how = how._replace(rescale=None)
    with on_device(pipeline.params, pipeline.offload) as params:
        return draw(
            Plan(course.model, course.sampler, how, last=course.last),
            params,
            start.x,
            course.times,
            start.keys,
            start.conds,
            scales=Scales(settings.guidance, request.image_guidance, settings.rescale),
            held=start.held,
            batch_size=request.batch_size,
            quiet=request.quiet,
        )


def pictures(pipeline: Drawable, x: Array, decode: bool = True) -> np.ndarray:
    """x f32[N, ...] -> pictures f32[N, H, W, 3] in [0, 1]; x itself without decode."""
    if not decode:
        return np.asarray(x)
    with on_device(pipeline.space_params, pipeline.offload) as params:
        return L.decode(pipeline.space, params, x)


def fits(pipeline: Drawable, *channels: int) -> int:
    """How many channels the network takes besides those of x. ValueError unless it is one of these."""
    if pipeline.takes.channels not in channels:
        raise ValueError(
            f"{pipeline.name}: its network takes {pipeline.takes.channels} channels besides a latent's, expected "
            f"{' or '.join(map(str, channels))} here; inpaint gives it a mask, edit a picture, image_to_image a depth"
        )
    return pipeline.takes.channels


def count_of(prompts: Prompts | None, images: Any, num: int | None) -> int:
    """How many pictures are asked for: `num`, or as many as the longer of prompts and images. ValueError for none."""
    many = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
    several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
    count = max(many, len(images) if several else 1) if num is None else num
    if count < 1 or many < 1:
        raise ValueError(f"{count} images of {many} prompts: expected at least one of each")
    return count


def labels_of(pipeline: Drawable, request: Request, count: int) -> np.ndarray | None:
    """i32[count]: image first + i has label first + i of those asked for, repeated in order (None: every class in turn).

    None for a network without classes. ValueError for a class that is not there.
    """
    classes, labels = pipeline.takes.classes, request.labels
    if classes is None:
        if labels is not None:
            raise ValueError("labels: this network has no classes")
        return None
    labels = range(classes) if labels is None else labels
    if bad := [y for y in labels if not 0 <= y < classes]:
        raise ValueError(f"label {bad[0]}: expected 0..{classes - 1}")
    return np.resize(np.asarray(list(labels), np.int32), request.first + count)[request.first :]


class Shown(NamedTuple):
    """Pictures that are a condition, f32[N, H, W, 3] in [0, 1], and masks f32[N, H, W, 1]; None: none."""

    images: np.ndarray | None = None
    masks: np.ndarray | None = None


NO_PICTURE = Shown()


def asked(pipeline: Drawable, request: Request, count: int, size: tuple[int, int], shown: Shown = NO_PICTURE) -> Asked:
    """What `count` images of `size` (H, W) pixels are asked to show. ValueError for what the network does not take, or lacks."""
    takes = pipeline.takes
    for what, needed, value in (("picture", takes.image, shown.images), ("mask", takes.mask, shown.masks)):
        if needed and value is None:
            raise ValueError(f"{pipeline.name} is conditioned on a {what}, and needs one")
    prompts = None
    if pipeline.takes.prompts:
        if request.prompts is None:
            raise ValueError(f"{pipeline.name} takes prompts, and needs one")
        prompts = texts("prompts", request.prompts, count)
    elif request.prompts is not None:
        raise ValueError(f"{pipeline.name} takes no prompt")
    labels = labels_of(pipeline, request, count)
    return Asked(count, prompts, labels, size, request.sizes, request.clip_skip, False, *shown)


def away_from(pipeline: Drawable, request: Request, what: Asked) -> Asked:
    """What the images are guided away from: the negative prompts, or nothing at all. ValueError where there is nothing."""
    takes = pipeline.takes
    if not takes.prompts and takes.null is None and not takes.image:
        scale = pipeline.settings(request).guidance
        raise ValueError(f"guidance is {scale}, but {pipeline.name} has no null class to guide away from")
    negative = None if request.negative is None else texts("negative", request.negative, what.count)
    labels = what.labels
    if labels is not None and takes.null is not None:
        labels = np.full(what.count, takes.null, np.int32)
    return what._replace(prompts=negative, labels=labels, away=True)


def conds_of(
    pipeline: Drawable,
    request: Request,
    settings: Settings,
    count: int,
    size: tuple[int, int],
    shown: Shown = NO_PICTURE,
) -> list[dict[str, Array]]:
    """The conditions of `count` images: these alone, or these and what they are guided away from.

    A network that takes its guidance scale is not guided besides.
    """
    what = asked(pipeline, request, count, size, shown)
    embedded = pipeline.embed_scale(settings.guidance, count)
    cond = pipeline.condition(what) | embedded
    if embedded or not pipeline.guided(settings):
        return [cond]
    return [cond, pipeline.condition(away_from(pipeline, request, what))]


def framed(pipeline: Drawable, images: Any, size: Size | None) -> tuple[list, tuple[int, int]]:
    """(pictures, (H, W)): without a size cut to multiples that the networks take, with a warning; or scaled to the size of a run."""
    frame = pipeline.frame
    if size is None and frame.resizes:
        size = frame.shape(None)[1]
    if size is not None:
        frame.shape(size)
    return fitting.framed(fitting.rows_of(images), size, frame.multiple)


def shown(pipeline: Drawable, images: Any, size: Size | None, count: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(f32[count, H, W, 3] in [0, 1] of pictures that are a condition, their (H, W)); size=None as in `framed`.

    Where the model makes pictures smaller (takes.reduces), one that is so small already stands for itself: its pixels are repeated.
    """
    rows, by = fitting.rows_of(images), pipeline.takes.reduces
    whole = pipeline.frame.shape(size)[1] if size is not None or pipeline.frame.resizes else None
    if by > 1 and whole is not None:
        rows = [
            np.asarray(row).repeat(by, 0).repeat(by, 1) if tuple(by * n for n in fitting.size_of(row)) == whole else row
            for row in rows
        ]
    rows, size = framed(pipeline, rows, size)
    return L.repeated("images", L.pixels(rows, size), count), size


def encoded(
    pipeline: Drawable, images: Any, size: Size | None, count: int, scaled: bool = True
) -> tuple[Array, tuple[int, int]]:
    """(x f32[count, h, w, C] of pictures, their (H, W)); size=None as in `framed`; scaled=False: without the latents' scale."""
    rows, size = framed(pipeline, images, size)
    with on_device(pipeline.space_params, pipeline.offload) as params:
        z = L.encode(pipeline.space, params if scaled else L.unscaled(params), L.pixels(rows, size))
    return jnp.asarray(L.repeated("images", np.asarray(z), count)), size
