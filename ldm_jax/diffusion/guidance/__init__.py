"""Guidance makes a Denoiser out of Denoisers, so that every sampler works with every guidance.

Two estimates of one x_t differ by (dx, deps) with alpha dx + sigma deps = 0, so any multiple of a difference may be
added to an estimate and the sum still explains x_t. Most guidance is of this form, `cond + push`: the push is a
weighted sum of differences between branches, exactly zero at the scale called neutral. The rest shifts the score by
g = grad log p(y | x_t), which gives eps - sigma g and x + (sigma^2 / alpha) g, or clips x and recomputes eps from it. Only CFG++
gives a Clean that does not explain x_t.

`pair(x_t, t) -> (Clean, Clean)` holds the conditional and the unconditional estimate, in this order, and a triple one
more: denoiser.make_pair and make_branches, or any functions side by side, `lambda x_t, t: (*pair(x_t, t), third(x_t,
t))`. A negative prompt is the `uncond` of make_pair. A scale is a number, a traced scalar, [B], or a function of t that
returns one of these (`within`, `dynamic`): one compiled program serves every value.
"""

from collections.abc import Callable

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.guidance.branches import apg, autoguidance, cfg, cfg_pp, cfg_zero, dual, interval, third_branch
from ldm_jax.diffusion.guidance.gradients import classifier, dps, pigdm
from ldm_jax.diffusion.guidance.scales import SHAPES, Scale, check_rescale, check_scale, dynamic, powered_cosine, within
from ldm_jax.diffusion.guidance.thresholds import dynamic_threshold, static_threshold

__all__ = ["GUIDANCES", "SHAPES", "Scale", "check_rescale", "check_scale", "dynamic", "powered_cosine", "within"]

GUIDANCES: dict[str, Callable[..., Denoiser]] = {
    "cfg": cfg,
    "autoguidance": autoguidance,
    "cfg_pp": cfg_pp,
    "cfg_zero": cfg_zero,
    "apg": apg,
    "third_branch": third_branch,
    "dual": dual,
    "interval": interval,
    "classifier": classifier,
    "dps": dps,
    "pigdm": pigdm,
    "static_threshold": static_threshold,
    "dynamic_threshold": dynamic_threshold,
}
