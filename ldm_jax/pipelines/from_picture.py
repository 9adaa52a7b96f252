"""Pictures from noise, under a picture as their condition: super-resolution (Saharia et al. 2022, SR3), what an image encoder sees.

The model says what it makes of the picture (Drawable.condition); nothing of it is in the state that drawing begins with.
"""

from ldm_jax.pipelines.drawable import Drawable
from ldm_jax.pipelines.request import Request
from ldm_jax.pipelines.start import Shown, Start, conds_of, count_of, fits, shown
from ldm_jax.sampling import keys
from ldm_jax.sampling.settings import Settings


def begin(pipeline: Drawable, request: Request, settings: Settings) -> Start:
    """Noise at the top of the grid, under `images`. ValueError for a model without such a condition, and for what does not fit."""
    fits(pipeline, 0)
    if not pipeline.takes.image:
        raise ValueError(f"{pipeline.name} is not conditioned on a picture; image_to_image begins with one")
    count = count_of(request.prompts, request.images, request.num)
    pixels, size = shown(pipeline, request.images, request.size, count)
    shape, size = pipeline.frame.shape(size)
    conds = conds_of(pipeline, request, settings, count, size, Shown(pixels))
    course = pipeline.course(settings, size)
    draws = keys.numbered(request.seed, count, request.first)
    eps = keys.initial(request.latents, draws, shape)
    return Start(eps * course.noise_scale, course, conds, keys.step_keys(draws))
