"""From pictures back to the noise that draws them, and variations of a picture on this way.

Inversion runs the grid upwards without noise (Song et al. 2021, DDIM, arXiv:2010.02502, section 4.3).
"""

import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import corrupt
from ldm_jax.pipelines import text_to_image
from ldm_jax.pipelines.drawable import Drawable
from ldm_jax.pipelines.prompts import texts
from ldm_jax.pipelines.request import Request
from ldm_jax.pipelines.start import Start, carry, conds_of, count_of, encoded, fits
from ldm_jax.sampling import keys
from ldm_jax.sampling.settings import Settings


def invert(pipeline: Drawable, request: Request, settings: Settings) -> np.ndarray:
    """The noise f32[N, h, w, C], of about unit variance, from which the same prompts draw `images` again without guidance.

    The error is that of the steps, up and down. Raises ValueError for a sampler that draws noise, and for what does not fit.
    """
    fits(pipeline, 0)
    # Unguided: guidance on the way up is not undone on the way down.
    settings = settings._replace(guidance=1.0, guidance_method="cfg", guidance_options={}, guidance_schedule="constant")
    settings = settings._replace(schedule_options={}, threshold="none", threshold_options={}, rescale=0.0)
    count = count_of(request.prompts, request.images, request.num)
    z, size = encoded(pipeline, request.images, request.size, count)
    conds = conds_of(pipeline, request, settings, count, size)
    course = pipeline.course(settings, size)
    if course.sampler().stochastic:
        raise ValueError(
            f"sampler {settings.name or pipeline.sampler!r} draws noise; inversion needs one that does not"
        )
    process, last = course.model.process, course.times[-1]
    x = corrupt(process, z, jnp.zeros_like(z), last) if process.sigma(last) > 0 else z
    upwards = course._replace(times=course.times[::-1], model=course.model._replace(transforms=()), last=False)
    start = Start(x, upwards, conds, keys.step_keys(keys.numbered(0, count)))
    return np.asarray(carry(pipeline, start, request, settings) / course.noise_scale)


def begin(pipeline: Drawable, request: Request, settings: Settings) -> Start:
    """Variations: `images` are inverted under `source`, what they show, and drawn anew under `prompts`."""
    count = count_of(request.prompts, request.images, request.num)
    source = texts("source", request.source, count) if pipeline.takes.prompts else None
    eps = invert(pipeline, request._replace(prompts=source, num=count, negative=None), settings)
    size = tuple(n * pipeline.frame.factor for n in eps.shape[1:3])
    return text_to_image.begin(pipeline, request._replace(latents=eps, size=size, num=count), settings)
