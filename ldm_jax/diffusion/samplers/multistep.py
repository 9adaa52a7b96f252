"""Multistep samplers: they remember what the network said at earlier steps instead of asking twice.

Exponential integrators in lambda = log(alpha / sigma), half the log-SNR. For data prediction the exact solution from
t to s is

    x_s = (sigma_s / sigma_t) x_t + sigma_s int_{lambda_t}^{lambda_s} exp(lambda) x(lambda) dlambda

(Lu et al. 2022, DPM-Solver++, arXiv:2211.01095, equation 8); methods differ in how they extrapolate x(lambda).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process, log_snr
from ldm_jax.diffusion.samplers.sampler import Sampler


class History(NamedTuple):
    """x [B, ...] now; the clean estimate and the time of the step before; how many steps were taken."""

    x: Array
    clean: Array
    t: Array
    steps: Array


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M): x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) D, D = x + h / (2 h_last) (x - x_last).

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2, h = lambda_s - lambda_t. Order 2, one evaluation, deterministic. The
    first step, a step after one that left alpha = 0, and a step into sigma(s) = 0 are of first order (D = x), for
    h / h_last has no finite value there. A grid that is uniform in t up to alpha = 0 costs a factor log n in the error,
    since its first steps do not shrink in lambda. The usual choice for guided sampling at 10 to 25 steps.
    """

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> History:
        return History(x_T, jnp.zeros_like(x_T), times[0], jnp.zeros((), jnp.int32))

    def step(denoise: Denoiser, process: Process, carry: History, t: Array, s: Array, keys: Array | None) -> History:
        clean = denoise(carry.x, t).x
        level_last, level_t, level_s = (0.5 * log_snr(process, u) for u in (carry.t, t, s))
        usable = (carry.steps > 0) & jnp.isfinite(level_last) & jnp.isfinite(level_s)
        h, h_last = level_s - level_t, level_t - level_last
        r = jnp.where(usable, 0.5 * h / jnp.where(usable, h_last, 1), 0)
        slow = process.sigma(s) / process.sigma(t)
        # -alpha_s (exp(-h) - 1), finite where h is not.
        fast = process.alpha(s) - process.alpha(t) * slow
        x = slow * carry.x + fast * (clean + r * (clean - carry.clean))
        return History(x, clean, t, carry.steps + 1)

    return Sampler(init, step, order=2, evaluations=1)
