"""Pictures on the way from one prompt to another, or from one seed to another, or both.

Noise turns along the great circle (Song et al. 2021, DDIM, arXiv:2010.02502, appendix D.5); text states move on the straight line.
"""

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.editing import slerp
from ldm_jax.pipelines.drawable import Drawable
from ldm_jax.pipelines.request import Request
from ldm_jax.pipelines.start import Start, conds_of, fits
from ldm_jax.sampling import keys
from ldm_jax.sampling.settings import Settings


def begin(pipeline: Drawable, request: Request, settings: Settings) -> Start:
    """`num` rows between the two ends. Raises ValueError for what does not fit, another number of prompts than 2 among it."""
    fits(pipeline, 0)
    prompts, num = request.prompts, request.num
    if prompts is not None and not isinstance(prompts, str) and len(prompts) != 2:
        raise ValueError(f"{len(prompts)} prompts to go between, expected 2")
    one, two = request.seeds or (request.seed, request.seed)
    shape, size = pipeline.frame.shape(request.size)
    # Classes have nothing between them: both ends have the first one.
    labels = None if pipeline.takes.classes is None else list(request.labels or [0])[:1]
    ends = conds_of(pipeline, request._replace(labels=labels, first=0), settings, 2, size)
    w = jnp.linspace(0.0, 1.0, num)

    def between(value: Array) -> Array:
        along = w.reshape(-1, *[1] * (value.ndim - 1))
        if value.dtype == bool:  # which tokens are read: on the way those of either end, states of others being 0
            return ((along < 1) & value[:1]) | ((along > 0) & value[1:])
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return jnp.repeat(value[:1], num, 0)
        return (1 - along) * value[:1] + along * value[1:]

    conds = [{name: between(value) for name, value in cond.items()} for cond in ends]
    eps = slerp(*(jnp.repeat(keys.noise(keys.numbered(seed, 1), shape), num, 0) for seed in (one, two)), w)
    course = pipeline.course(settings, size)
    # One path's noise for all: frames differ by what is interpolated alone.
    steps = jnp.repeat(keys.step_keys(keys.numbered(one, 1)), num, 0)
    return Start(eps * course.noise_scale, course, conds, steps)
