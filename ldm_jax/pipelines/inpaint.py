"""Drawing anew where a mask is white, by a network trained for it or by any other.

C + 1 more channels  the network sees [x_t, mask, encode(picture outside the mask)]          (Rombach et al. 2022, section 4.5)
its own condition    so does a run that is conditioned on masked pictures, which says it itself (Drawable.condition)
none                 outside the mask every step is replaced by the picture's own path       (editing.preserve; Song et al. 2021)
"""

import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import corrupt
from ldm_jax.pipelines import fitting
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.drawable import Drawable
from ldm_jax.pipelines.request import Request
from ldm_jax.pipelines.start import Shown, Start, conds_of, count_of, encoded, fits, framed
from ldm_jax.sampling import keys
from ldm_jax.sampling.backwards import Held
from ldm_jax.sampling.settings import Settings


def begin(pipeline: Drawable, request: Request, settings: Settings) -> Start:
    """`images` drawn anew where `masks` are white. strength 1 begins with noise alone, less with the noised picture.

    Raises ValueError for what does not fit.
    """
    frame = pipeline.frame
    masked, itself = fits(pipeline, 0, 1 + frame.channels), pipeline.takes.mask
    count = count_of(request.prompts, request.images, request.num)
    whole = fitting.rows_of(request.images)
    rows, size = framed(pipeline, whole, request.size)
    cut_to = size if frame.resizes else request.size
    shape, size = frame.shape(size)
    masks = fitting.masked(fitting.rows_of(request.masks, 1), whole, cut_to, frame.multiple)
    pixels = L.pixels(rows, size)
    z, _ = encoded(pipeline, pixels, size, count)
    pixels = L.repeated("images", pixels, count)
    mask = L.repeated("masks", (L.pixels(masks, size, 1) >= 0.5).astype(np.float32), count)
    small = jnp.asarray(L.shrink(mask, frame.factor))
    conds = conds_of(pipeline, request, settings, count, size, Shown(pixels, mask))
    draws = keys.numbered(request.seed, count, request.first)
    eps, held = keys.initial(request.latents, draws, shape), None
    if masked:
        # The hole is grey, 0 of [-1, 1], as in training.
        around, _ = encoded(pipeline, 0.5 + (pixels - 0.5) * (mask < 0.5), size, count)
        conds = [cond | {"channels": jnp.concatenate([small, around], -1)} for cond in conds]
    elif not itself:
        held = Held(z, 1 - small, eps)
    course = pipeline.course(settings, size, strength=request.strength)
    if request.strength == 1:
        x = eps * course.noise_scale
    else:
        x = corrupt(course.model.process, z, eps, course.times[0])
    return Start(x, course, conds, keys.step_keys(draws), held)
