"""Editing by instruction: InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800).

    x = x(none) + s_I (x(image) - x(none)) + s_T (x(image, text) - x(image))        (equation 3)

The network sees [x_t, encode(image)]; 'none' has the empty prompt and zeros for the picture. With s_T <= 1 or s_I < 1 there is no
guidance, as published: x(image, text) alone.
"""

import jax.numpy as jnp

from ldm_jax.pipelines.drawable import Drawable
from ldm_jax.pipelines.request import Request
from ldm_jax.pipelines.start import Start, asked, away_from, count_of, encoded, fits
from ldm_jax.sampling import keys
from ldm_jax.sampling.settings import Settings


def begin(pipeline: Drawable, request: Request, settings: Settings) -> Start:
    """`images` as the instructions `prompts` change them.

    guidance is that of the text, image_guidance that of the picture: more keeps more of it. Raises ValueError for a network that takes
    no picture, for another method of guidance than cfg, and for what does not fit.
    """
    fits(pipeline, pipeline.frame.channels)
    if settings.guidance_method != "cfg" or settings.guidance_options:
        raise ValueError(
            f"guidance method {settings.guidance_method!r} goes between two conditions; editing by instruction goes between three, "
            "text, picture and nothing: expected 'cfg', without options"
        )
    count = count_of(request.prompts, request.images, request.num)
    # The network takes the picture's latent unscaled, as in training.
    around, size = encoded(pipeline, request.images, request.size, count, scaled=False)
    shape, size = pipeline.frame.shape(size)
    what = asked(pipeline, request, count, size)
    conds = [pipeline.condition(what) | {"channels": around}]
    if pipeline.guided(settings) and request.image_guidance >= 1:
        away = pipeline.condition(away_from(pipeline, request, what))
        conds += [away | {"channels": around}, away | {"channels": jnp.zeros_like(around)}]
    course = pipeline.course(settings, size)
    rows = keys.numbered(request.seed, count, request.first)
    eps = keys.initial(request.latents, rows, shape)
    return Start(eps * course.noise_scale, course, conds, keys.step_keys(rows))
