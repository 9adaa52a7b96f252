"""Thresholds: x clipped to the range of the data, and the eps that fits it. Pixels lie in a known range; latents do not."""

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.guidance.rows import levels, over
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process, per_row


def _with_x(process: Process, clean: Clean, x: Array, t: Array) -> Clean:
    """Another x, with the eps such that alpha x + sigma eps = x_t; at sigma = 0, where there is none, eps does not change."""
    alpha, sigma = levels(process, t, x)
    return clean._replace(x=x, eps=clean.eps + over(alpha, sigma) * (clean.x - x))


def static_threshold(
    denoise: Denoiser, process: Process, low: Array | float = -1.0, high: Array | float = 1.0
) -> Denoiser:
    """x clipped to [low, high], eps = (x_t - alpha x) / sigma re-derived from it.

    Ho et al. 2020 (arXiv:2006.11239), for data in [-1, 1]; Saharia et al. 2022 (Imagen, arXiv:2205.11487), section 2.3.
    Where nothing is clipped it is denoise itself, exactly. Raises ValueError unless low < high.
    """
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ValueError(f"clipping to [{low}, {high}], expected low < high")

    def clipped(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean = denoise(x_t, t)
        return _with_x(process, clean, jnp.clip(clean.x, per_row(low, x_t), per_row(high, x_t)), t)

    return clipped


def dynamic_threshold(
    denoise: Denoiser, process: Process, percentile: Array | float = 0.995, floor: Array | float = 1.0
) -> Denoiser:
    """x = floor clip(x, -s, s) / s with s = max(floor, the percentile of |x| over a row), eps re-derived as above.

    Saharia et al. 2022 (Imagen, arXiv:2205.11487), section 2.3, for large guidance scales on data in [-floor, floor].
    percentile is in (0, 1], between order statistics linearly. Where |x| <= floor it is denoise itself, exactly. Raises
    ValueError for a percentile out of range and a floor <= 0.
    """
    if isinstance(percentile, int | float) and not 0 < percentile <= 1:
        raise ValueError(f"percentile is {percentile}, expected a number in (0, 1]")
    if isinstance(floor, int | float) and not floor > 0:
        raise ValueError(f"floor is {floor}, expected a number > 0")

    def clipped(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean = denoise(x_t, t)
        size = jnp.quantile(jnp.abs(clean.x).reshape(x_t.shape[0], -1), jnp.asarray(percentile, x_t.dtype), axis=1)
        bound = per_row(floor, x_t)
        s = jnp.maximum(bound, per_row(size, x_t))
        return _with_x(process, clean, jnp.clip(clean.x, -s, s) * (bound / s), t)

    return clipped
