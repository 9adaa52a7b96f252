"""Pictures from a picture: SDEdit, a depth, SDXL's refiner.

    x_t = alpha(t) z + sigma(t) eps at the last floor(strength n) steps of the grid, then on as from noise

(Meng et al. 2022, arXiv:2108.01073.)
"""

import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import corrupt
from ldm_jax.pipelines import fitting
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.drawable import Drawable
from ldm_jax.pipelines.request import Request
from ldm_jax.pipelines.start import Shown, Start, conds_of, count_of, encoded, fits, shown
from ldm_jax.sampling import keys
from ldm_jax.sampling.settings import Settings


def begin(pipeline: Drawable, request: Request, settings: Settings) -> Start:
    """The picture, noised to where `strength` says; or the latents that another network left at `start`.

    Latent consistency models run all of the steps over so much of the way. `latents` is the noise that is mixed in. Raises ValueError
    for what does not fit, and for a strength that runs no step.
    """
    deep, depth, start = fits(pipeline, 0, 1) == 1, request.depth, request.start
    if deep != (depth is not None):
        raise ValueError(f"{pipeline.name} {'needs' if deep else 'takes no'} depth")
    count = count_of(request.prompts, request.images, request.num)
    if start is None:
        z, size = encoded(pipeline, request.images, request.size, count)
    else:
        z = jnp.asarray(L.repeated("images", np.asarray(request.images, np.float32), count))
        size = tuple(n * pipeline.frame.factor for n in z.shape[1:3])
    shape, size = pipeline.frame.shape(size)
    under = Shown(shown(pipeline, request.images, size, count)[0]) if pipeline.takes.image else Shown()
    conds = conds_of(pipeline, request, settings, count, size, under)
    if deep:
        if start is None:
            picture = fitting.size_of(fitting.rows_of(request.images)[0])
            depth = fitting.over(np.asarray(depth, np.float32), picture, size, request.size is not None)
        near = jnp.asarray(L.repeated("depth", L.depth_map(depth, shape[:2]), count))
        conds = [cond | {"channels": near} for cond in conds]
    strength, distilled = (request.strength if start is None else 1.0), pipeline.kind.distilled
    course = pipeline.course(settings, size, strength=strength, start=start, distilled=distilled)
    rows = keys.numbered(request.seed, count, request.first)
    x = z
    if start is None:
        x = corrupt(course.model.process, z, keys.initial(request.latents, rows, shape), course.times[0])
    # Who goes on where another left off must not draw its noise once more.
    return Start(x, course, conds, keys.step_keys(rows, use=1 if start is None else 2))
