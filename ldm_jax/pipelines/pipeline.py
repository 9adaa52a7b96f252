"""A pipeline as one value: what it draws from, and the ways of drawing as its methods.

A new way of drawing is one file with a `begin`, one row of WAYS, and one method.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.pipelines import from_picture, image_to_image, inpaint, instruct, interpolate, invert, text_to_image
from ldm_jax.pipelines.drawable import NAMED, PLAIN, Drawable
from ldm_jax.pipelines.request import Prompts, Request
from ldm_jax.pipelines.start import Start, carry, pictures
from ldm_jax.sampling.settings import Settings, check_fit, check_guidance


class Way(NamedTuple):
    """A way of drawing: its function, the fields of Request that it reads besides SHARED, and its defaults of these."""

    begin: Callable[[Drawable, Request, Settings], Start]
    reads: tuple[str, ...]
    defaults: Mapping[str, Any]


# What every way reads: how to draw, and what the result is.
SHARED = (
    *("prompts", "negative", "labels", "num", "size", "sampler", *PLAIN),
    *("options", *(field for pair in NAMED[1:] for field in pair), "decode", "batch_size", "quiet"),
)
RANDOM = ("seed", "first", "latents")

WAYS: dict[str, Way] = {
    "text_to_image": Way(text_to_image.begin, (*RANDOM, "sizes", "clip_skip", "end"), {}),
    "draw": Way(text_to_image.begin, RANDOM, {"num": 1}),
    "interpolate": Way(interpolate.begin, ("seed", "seeds"), {"num": 8}),
    "image_to_image": Way(
        image_to_image.begin, (*RANDOM, "images", "strength", "start", "depth", "sizes"), {"strength": 0.8}
    ),
    "invert": Way(invert.begin, ("images",), {"sampler": "ddim"}),
    "vary": Way(invert.begin, ("seed", "first", "images", "source", "sizes", "clip_skip"), {"sampler": "ddim"}),
    "inpaint": Way(inpaint.begin, (*RANDOM, "images", "masks", "strength", "sizes"), {"strength": 1.0}),
    "from_picture": Way(from_picture.begin, (*RANDOM, "images"), {}),
    "edit": Way(instruct.begin, (*RANDOM, "images", "image_guidance"), {}),
}


def complete(pipeline: Drawable, way: str, request: Request) -> tuple[Request, Settings]:
    """The request with the defaults of this way, and its settings, checked. TypeError for a field that the way does not read,
    ValueError for settings that are wrong or do not fit the pipeline."""
    reads, plain = {*SHARED, *WAYS[way].reads}, Request._field_defaults
    for field, value in request._asdict().items():
        default = plain[field]
        if field not in reads and value is not default and not (np.isscalar(value) and value == default):
            raise TypeError(f"{way}() got an unexpected keyword argument {field!r}")
    defaults = {key: value for key, value in WAYS[way].defaults.items() if getattr(request, key) is None}
    request = request._replace(**defaults)
    settings = pipeline.settings(request)
    check_guidance(settings)
    takes = pipeline.takes
    conditional = takes.prompts or takes.classes is not None or takes.image
    check_fit(settings, pipeline.frame.channels, conditional, pipeline.space.bounded)
    return request, settings


def run(pipeline: Drawable, way: str, request: Request) -> np.ndarray:
    """f32[N, H, W, 3] in [0, 1]; x f32[N, ...] without request.decode; of `invert` the noise. ValueError for what does not fit."""
    request, settings = complete(pipeline, way, request)
    if way == "invert":
        return invert.invert(pipeline, request, settings)
    start = WAYS[way].begin(pipeline, request, settings)
    return pictures(pipeline, carry(pipeline, start, request, settings), request.decode)


class Pipeline(Drawable):
    """A Drawable with the ways of drawing as methods. Their options are the fields of Request: steps, guidance, sampler, seed, latents,
    size, num, ...; each returns pictures f32[N, H, W, 3] in [0, 1], with decode=False what the autoencoder decodes.

    All raise ValueError for what does not fit, and TypeError for an option that they do not read.
    """

    def text_to_image(self, prompts: Prompts, negative: Prompts | None = None, **options: Any) -> np.ndarray:
        """One picture for each prompt, or `num` of one. `end` stops at that fraction of the way (with decode=False)."""
        return run(self, "text_to_image", Request(prompts=prompts, negative=negative, **options))

    def draw(self, num: int = 1, labels: Sequence[int] | None = None, **options: Any) -> np.ndarray:
        """`num` pictures without words: of classes, repeated in order (None: every class in turn), or of nothing.

        guidance is for networks with a null class.
        """
        if self.takes.prompts:
            raise ValueError(f"{self.name} takes prompts: use text_to_image")
        return run(self, "draw", Request(num=num, labels=labels, **options))

    def interpolate(
        self, prompts: tuple[str, str] | str | None, seeds: tuple[int, int] | int = 0, **options: Any
    ) -> np.ndarray:
        """`num` pictures (8) on the way from one prompt to another, from one seed to another, or both."""
        seeds = tuple(seeds) if isinstance(seeds, (tuple, list)) else (seeds, seeds)
        return run(self, "interpolate", Request(prompts=prompts, seeds=seeds, **options))

    def image_to_image(
        self, prompts: Prompts | None, images: Any, negative: Prompts | None = None, **options: Any
    ) -> np.ndarray:
        """Pictures that begin with `images`; strength (0.8), depth, or `start` for latents that another network left there."""
        return run(self, "image_to_image", Request(prompts=prompts, images=images, negative=negative, **options))

    def invert(self, prompts: Prompts | None, images: Any, **options: Any) -> np.ndarray:
        """The noise f32[N, h, w, C], of about unit variance, from which the same prompts draw `images` again without guidance."""
        return run(self, "invert", Request(prompts=prompts, images=images, **options))

    def vary(self, prompts: Prompts | None, images: Any, source: Prompts = "", **options: Any) -> np.ndarray:
        """Variations of `images`: inverted under `source`, what they show, and drawn anew under `prompts`."""
        return run(self, "vary", Request(prompts=prompts, images=images, source=source, **options))

    def inpaint(
        self, prompts: Prompts | None, images: Any, masks: Any, negative: Prompts | None = None, **options: Any
    ) -> np.ndarray:
        """`images` drawn anew where `masks` are white; strength 1 begins with noise alone, less with the noised picture."""
        asked = Request(prompts=prompts, images=images, masks=masks, negative=negative, **options)
        return run(self, "inpaint", asked)

    def from_picture(self, prompts: Prompts | None, images: Any, **options: Any) -> np.ndarray:
        """Pictures from noise under `images` as their condition, of a run that has one: enlarged, or seen by an image encoder."""
        return run(self, "from_picture", Request(prompts=prompts, images=images, **options))

    def edit(self, prompts: Prompts, images: Any, negative: Prompts | None = None, **options: Any) -> np.ndarray:
        """`images` as the instructions `prompts` change them (InstructPix2Pix); more image_guidance (1.5) keeps more of the picture."""
        return run(self, "edit", Request(prompts=prompts, images=images, negative=negative, **options))
