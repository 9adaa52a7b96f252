"""From the state at times[0] to the state at times[-1]: guided estimate, threshold, one lax.scan of a sampler.

    branches = network([x_t] * n, conds)                                one call for all branches
    clean    = finish(threshold(transforms(guide(branches))))           a Clean(x, eps)
    x        = sample(sampler, clean, process, x, times, keys)

One set of conditions is drawn as it is. Two are guided by any method of settings.METHODS: the first one is what is asked for, the
second what it is guided away from. Three are guided by text and picture (InstructPix2Pix, guidance.dual). The functions here are
traced: call them in a jitted function, or hand a Plan to draw.draw.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion import editing
from ldm_jax.diffusion.denoiser import Denoiser, make_branches, make_denoiser
from ldm_jax.diffusion.guidance import check_rescale, check_scale, dual
from ldm_jax.diffusion.prediction import Clean, target, to_clean
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers import Sampler, sample
from ldm_jax.sampling.model import Cond, Model
from ldm_jax.sampling.settings import Guidance, guide, scheduled, thresholded


class Held(NamedTuple):
    """What is kept while the rest is drawn: clean z [B, ...], keep in [0, 1] that broadcasts to it, and the noise eps of its path."""

    z: Array
    keep: Array
    eps: Array


class Scales(NamedTuple):
    """Numbers that may change without a compilation: the scale of guidance (by text), that of the picture where there are three
    branches, and how far the spread of the result is pulled back."""

    guidance: Array | float = 1.0
    image: Array | float = 1.0
    rescale: Array | float = 0.0


UNGUIDED = Scales()


def check_scales(scales: Scales) -> None:
    """Raise ValueError for a scale that is no number of at most 1000, and for a rescale outside [0, 1]."""
    check_scale("guidance", scales.guidance)
    check_scale("image_guidance", scales.image)
    check_rescale("rescale", scales.rescale)


def rescaled(clean: Clean, cond: Clean, rescale: Array | float, kind: str, process: Process, x_t: Array, t: Array):
    """The Clean whose network output has its spread over a row pulled back to that of the first branch, `cond`.

    Lin et al. 2023 (arXiv:2305.08891), equations 14-16, in whatever the network predicts, as the published pipelines compute it;
    `rescale` of guidance.cfg does so for v, as the paper.
    """
    output, reference = (target(kind, process, c.x, c.eps, t) for c in (clean, cond))
    spread, expected = (jnp.std(o, tuple(range(1, o.ndim)), keepdims=True) for o in (output, reference))
    output = output * (1 - rescale + rescale * expected / spread)
    return to_clean(kind, process, output, x_t, t)


def estimate(model: Model, how: Guidance, params: Any, conds: Sequence[Cond], scales: Scales) -> Denoiser:
    """The denoiser that the sampler calls: guided, transformed, with its threshold and what the model does last.

    how.rescale None takes scales.rescale for what the network predicts; a number is handed to the method of guidance.
    """
    process, kind = model.process, model.prediction

    def apply(params: Any, x_t: Array, t: Array, cond: Cond) -> Array:
        output = model.apply(params, x_t, t, cond)
        # A learned variance that the sampler has no use for: a published DiT that is drawn from with DDIM.
        return output if model.learned_variance else output[..., : x_t.shape[-1]]

    network, learned = (apply, params, process, kind), {"learned_variance": model.learned_variance}
    branches = [{name: value for name, value in cond.items() if name != "target"} for cond in conds]
    if len(conds) == 1:
        denoise = make_denoiser(*network, *branches, **learned)
    else:
        denoise = _guided(model, how, make_branches(*network, *branches, **learned), len(conds), scales)
    for transform in model.transforms:
        denoise = transform(denoise, params, conds[0])
    denoise = thresholded(how, denoise, process)
    return denoise if model.finish is None else model.finish(denoise)


def _guided(model: Model, how: Guidance, branches: Callable[..., tuple], count: int, scales: Scales) -> Denoiser:
    process, kind = model.process, model.prediction

    def guided(estimates: Callable[[Array, Array], tuple]) -> Denoiser:
        if count == 2:
            return guide(how, estimates, scales.guidance, process, kind)
        text, image = (scheduled(how, scale) for scale in (scales.guidance, scales.image))
        return dual(estimates, text, image, how.t_lo, how.t_hi, how.rescale or 0.0)

    if how.rescale is not None:
        return guided(branches)

    def denoise(x_t: Array, t: Array) -> Clean:
        estimates = branches(x_t, t)
        clean = guided(lambda x_t, t: estimates)(x_t, t)
        return rescaled(clean, estimates[0], scales.rescale, kind, process, x_t, t)

    return denoise


def backwards(
    model: Model,
    how: Guidance,
    sampler: Sampler,
    params: Any,
    x: Array,
    times: Array,
    keys: Array,
    conds: Sequence[Cond],
    scales: Scales = UNGUIDED,
    held: Held | None = None,
    *,
    last: bool = False,
    tick: Callable[[Array], None] | None = None,
) -> Array:
    """The state [B, ...] at times[-1] of x [B, ...] at times[0], along times f[n + 1].

    params  what model.apply takes; conds: one, two or three dicts of arrays with leading axis B
    keys    key[B], for samplers that draw noise
    held    a region that keeps to the path of a clean z, and comes out as z
    last    whether the estimate is taken once more at times[-1], where the grid ends with noise left
    tick    called from the compiled program at each estimate
    """
    denoise = estimate(model, how, params, conds, scales)

    def counted(x_t: Array, t: Array) -> Clean:
        jax.debug.callback(tick, t)
        return denoise(x_t, t)

    step = sampler
    if held is not None:
        # The state to begin with is the caller's: published inpainting begins with noise alone.
        step = editing.preserve(sampler, *held)._replace(init=sampler.init)
    z = sample(step, denoise if tick is None else counted, model.process, x, times, keys)
    if last:
        left = model.process.sigma(times[-1]) > 0
        z = jax.lax.cond(left, lambda z: denoise(z, times[-1]).x, lambda z: z, z)
    return z if held is None else held.keep * held.z + (1 - held.keep) * z


def finite(x: Array) -> Array:
    """bool[B]: which rows of x [B, ...] hold no NaN and no infinity."""
    return jnp.isfinite(x).all(tuple(range(1, x.ndim)))
