"""Pictures from noise: of prompts (Rombach et al. 2022; Podell et al. 2023), of classes (DiT, ADM), or of neither (DDPM, NCSN++).

SDXL's base hands over to its refiner at a fraction of the way: `end` stops the one, `start` of image to image begins the other, both at
the first step whose network time is below round(N - fraction N), of N training steps.
"""

from ldm_jax.pipelines.drawable import Drawable
from ldm_jax.pipelines.request import Request
from ldm_jax.pipelines.start import Start, conds_of, count_of, fits
from ldm_jax.sampling import keys
from ldm_jax.sampling.settings import Settings


def begin(pipeline: Drawable, request: Request, settings: Settings) -> Start:
    """Noise at the top of the grid. Raises ValueError for what does not fit."""
    fits(pipeline, 0)
    if request.num is not None and request.num < 1:
        raise ValueError(f"num is {request.num}, expected at least 1")
    count = count_of(request.prompts, request.labels, request.num)
    shape, size = pipeline.frame.shape(request.size)
    conds = conds_of(pipeline, request, settings, count, size)
    course = pipeline.course(settings, size, end=request.end)
    rows = keys.numbered(request.seed, count, request.first)
    eps = keys.initial(request.latents, rows, shape)
    return Start(eps * course.noise_scale, course, conds, keys.step_keys(rows))
