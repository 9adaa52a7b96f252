"""Guidance makes a Denoiser out of Denoisers, so that every sampler works with every guidance.

`pair(x_t, t) -> (Clean, Clean)` holds the conditional and the unconditional estimate, in this order; see
denoiser.make_pair.
"""

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser, Pair
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import per_row


def cfg(pair: Pair, scale: Array, t_lo: float = 0.0, t_hi: float = 1.0, rescale: Array = 0.0) -> Denoiser:
    """Classifier-free guidance, x = x_c + (scale - 1) (x_c - x_u), and likewise for eps.

    scale is a number, a traced scalar or [B]; 1 is the conditional network itself, exactly. Ho & Salimans 2022
    (arXiv:2207.12598), equation 6, with scale = 1 + their w. Outside t_lo <= t <= t_hi the scale is 1: Kynkaanniemi et
    al. 2024 (arXiv:2404.07724), equation 5; the pair is still evaluated there.

    rescale in [0, 1] (a number, traced scalar or [B]) pulls the guided prediction's standard deviation over a row
    back to the conditional one's: Lin et al. 2023 (arXiv:2305.08891), equations 14-16, in their prediction,
    v = alpha eps - sigma x, whatever the network's own is.
    """

    def denoise(x_t: Array, t: Array) -> Clean:
        cond, uncond = pair(x_t, t)
        t = jnp.asarray(t, x_t.dtype)
        extra = per_row(jnp.where((t >= t_lo) & (t <= t_hi), jnp.asarray(scale, x_t.dtype) - 1, 0), x_t)
        dx, deps = cond.x - uncond.x, cond.eps - uncond.eps
        x, eps = cond.x + extra * dx, cond.eps + extra * deps
        if isinstance(rescale, int | float) and rescale == 0:
            return Clean(x, eps, cond.log_var)
        # Both branches explain one x_t, so alpha dx = -sigma deps: the pair itself tells alpha / sigma. Where the
        # branches agree nothing is rescaled and any ratio will do.
        axes = tuple(range(1, x_t.ndim))
        alpha, sigma = (jnp.sqrt(jnp.sum(d**2, axes, keepdims=True)) for d in (deps, dx))
        norm = jnp.sqrt(alpha**2 + sigma**2)
        alpha, sigma = (jnp.where(norm > 0, c / jnp.where(norm > 0, norm, 1), 0) for c in (alpha, sigma))
        v, v_cond = alpha * eps - sigma * x, alpha * cond.eps - sigma * cond.x
        std, std_cond = jnp.std(v, axes, keepdims=True), jnp.std(v_cond, axes, keepdims=True)
        ratio = jnp.where(std > 0, std_cond / jnp.where(std > 0, std, 1), 1)
        dv = per_row(rescale, x_t) * (ratio - 1) * v
        return Clean(x - sigma * dv, eps + alpha * dv, cond.log_var)

    return denoise
