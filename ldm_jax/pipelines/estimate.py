"""The estimate of a pipeline for whoever writes a sampler: (x_t, t) -> Clean(x, eps), conditioned and guided as the pipeline draws.

    x = sample(sampler, denoiser(pipeline, request), process, x_T, times, key)

is what the pipeline itself computes. Times, process and x are those of the pipeline: t = 0 data, t = 1 noise.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.pipelines.drawable import Asked, Drawable
from ldm_jax.pipelines.request import Request, Size
from ldm_jax.pipelines.start import away_from, conds_of, count_of, fits
from ldm_jax.sampling.backwards import Scales, check_scales, estimate
from ldm_jax.sampling.model import Cond, Model
from ldm_jax.sampling.settings import Guidance, Settings, guidance_of

# What a denoiser reads of a Request: what is shown, and how it is guided.
READS = ("prompts", "negative", "labels", "num", "size", "sizes", "clip_skip", "guidance", "t_lo", "t_hi", "rescale")
READS += (
    "guidance_method",
    "guidance_options",
    "guidance_schedule",
    "schedule_options",
    "threshold",
    "threshold_options",
)


def conditions(pipeline: Drawable, request: Request, settings: Settings, size: Size) -> list[Cond]:
    """The conditions of request.num images (None: as many as prompts or labels), one branch or two.

    Without prompts and labels: one branch, the condition that nothing is said. ValueError where the network has none, and for what
    does not fit.
    """
    takes = pipeline.takes
    if request.prompts is not None or request.labels is not None or not (takes.prompts or takes.classes is not None):
        count = count_of(request.prompts, request.labels, request.num)
        return conds_of(pipeline, request, settings, count, size)
    if request.negative is not None:
        raise ValueError("negative goes with prompts: without any nothing is guided")
    if not takes.prompts and takes.null is None:
        raise ValueError(f"{pipeline.name} needs labels: it has no null class")
    count = request.num or 1
    nothing = Asked(count, None, None if takes.classes is None else np.zeros(count, np.int32), size)
    nothing = nothing._replace(sizes=request.sizes, clip_skip=request.clip_skip)
    return [pipeline.condition(away_from(pipeline, request, nothing)) | pipeline.embed_scale(settings.guidance, count)]


@functools.lru_cache(maxsize=16)
def _program(model: Model, how: Guidance) -> Callable[..., Clean]:
    @jax.jit
    def compiled(params, conds, scales, x_t, t):
        return estimate(model, how, params, conds, scales)(x_t, t)

    return compiled


def denoiser(pipeline: Drawable, request: Request) -> Denoiser:
    """denoise(x_t f32[B, *shape], t scalar or [B]) -> Clean(x, eps), with the guidance of the request over that of the pipeline.

    Made for one prompt or label, or for none, it takes any B; else B is their number. Compiled once for each shape of x_t, whatever
    is asked for. Raises ValueError for what does not fit.
    """
    fits(pipeline, 0)
    settings = pipeline.settings(request)
    shape, size = pipeline.frame.shape(request.size)
    conds = conditions(pipeline, request, settings, size)
    how, scales = guidance_of(settings), Scales(settings.guidance, rescale=settings.rescale)
    check_scales(scales)
    if pipeline.rescales == "output":
        how = how._replace(rescale=None)
    if len(conds) == 1 or (how.rescale is None and settings.rescale == 0):
        how = how._replace(rescale=0.0)
    params = jax.device_put(pipeline.params) if pipeline.offload else pipeline.params
    model = pipeline.course(settings, size).model
    if "target" not in conds[0]:  # no class for a classifier to guide to
        model = model._replace(transforms=())
    compiled = _program(model, how)
    scales = Scales(*(jnp.float32(scale) for scale in scales))
    leaves = jax.tree.leaves(conds)
    count = len(leaves[0]) if leaves else 1

    def denoise(x_t: Array, t: Array) -> Clean:
        x_t = jnp.asarray(x_t)
        if x_t.shape[1:] != shape:
            raise ValueError(f"x_t has shape {x_t.shape}, expected [B, {', '.join(map(str, shape))}]")
        if count not in (1, len(x_t)):
            raise ValueError(f"x_t has {len(x_t)} rows, but the denoiser was made for {count} prompts or labels")
        rows = jax.tree.map(lambda value: jnp.broadcast_to(value, (len(x_t), *value.shape[1:])), conds)
        return compiled(params, rows, scales, x_t, t)

    return denoise
