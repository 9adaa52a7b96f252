"""Singlestep exponential samplers: two or three evaluations within a step, and no memory of earlier steps.

Exponential Runge-Kutta methods in lambda = log(alpha / sigma), h = lambda_s - lambda_t, in terms of exponential.py: between
t and s the network is evaluated at lambda_t + r h, and the differences from its output at t are weighted by the moments M_k.
A step that leaves alpha = 0 or enters sigma = 0, where h is infinite, is DDIM's, with one evaluation.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process, per_row
from ldm_jax.diffusion.samplers.exponential import Kind, estimate, level, moments, scale, time_at
from ldm_jax.diffusion.samplers.ode import renoise
from ldm_jax.diffusion.samplers.sampler import Sampler, State, start


def advance(kind: Kind, process: Process, clean: Clean, s: Array, weight: Array, difference: Array) -> Array:
    """alpha_s x + sigma_s eps + scale_s weight difference; s and weight scalars or [B]."""
    return renoise(process, clean, s) + per_row(scale(kind, process, s) * weight, difference) * difference


def second(denoise: Denoiser, kind: Kind, process: Process, clean: Clean, t: Array, s: Array, r: float = 0.5) -> Array:
    """x_s by DPM-Solver-2 with its stage at r: w = M_0 / (2 r), of order 2; r = 1/2 is the exponential midpoint rule."""
    level_t, value = level(process, t), estimate(kind, clean)
    h = level(process, s) - level_t
    middle = time_at(process, level_t + r * h)
    difference = estimate(kind, denoise(renoise(process, clean, middle), middle)) - value
    return advance(kind, process, clean, s, moments(kind, h, 1)[0] / (2 * r), difference)


def third(denoise: Denoiser, kind: Kind, process: Process, clean: Clean, t: Array, s: Array) -> tuple[Array, Array]:
    """x_s by DPM-Solver-3 with its stages at 1/3 and 2/3, and by the DPM-Solver-2 that shares the first; s, t may be [B]."""
    level_t, value = level(process, t), estimate(kind, clean)
    h = level(process, s) - level_t
    one, two = (time_at(process, level_t + r * h) for r in (1 / 3, 2 / 3))
    first = estimate(kind, denoise(renoise(process, clean, one), one)) - value
    x_two = advance(kind, process, clean, two, 2 * moments(kind, 2 / 3 * h, 2)[1], first)
    last = estimate(kind, denoise(x_two, two)) - value
    m = moments(kind, h, 2)
    return (
        advance(kind, process, clean, s, 1.5 * m[1], last),
        advance(kind, process, clean, s, 1.5 * m[0], first),
    )


def _singlestep(kind: Kind, order: int) -> Sampler:
    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        clean = denoise(carry.x, t)

        def inner():
            if order == 2:
                return second(denoise, kind, process, clean, t, s)
            return third(denoise, kind, process, clean, t, s)[0]

        finite = jnp.isfinite(level(process, t)) & jnp.isfinite(level(process, s))
        return State(jax.lax.cond(finite, inner, lambda: renoise(process, clean, s)))

    return Sampler(start, step, order=order, evaluations=order)


def dpm_solver_2() -> Sampler:
    """DPM-Solver-2: eps at the middle of lambda, x_s = (alpha_s / alpha_t) x_t - sigma_s (exp(h) - 1) eps(lambda_t + h / 2).

    Lu et al. 2022 (arXiv:2206.00927), algorithm 1. Order 2, two evaluations, deterministic. For unguided sampling;
    dpm_solver_2m has the order at half the cost.
    """
    return _singlestep("eps", 2)


def dpm_solver_3() -> Sampler:
    """DPM-Solver-3: eps at 1/3 and 2/3 of the step in lambda, r_1 = 1/3 and r_2 = 2/3.

    Lu et al. 2022 (arXiv:2206.00927), algorithm 2. Order 3, three evaluations, deterministic. For unguided sampling at 15
    evaluations and more; it has no memory, so guidance may jump in t (an interval).
    """
    return _singlestep("eps", 3)


def dpmpp_2s() -> Sampler:
    """DPM-Solver++(2S): x at the middle of lambda, x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - exp(-h)) x(lambda_t + h / 2).

    Lu et al. 2022 (arXiv:2211.01095), algorithm 1 with r = 1/2. Order 2, two evaluations, deterministic. For guided
    sampling where the memory of dpmpp_2m is harmful: guidance that jumps in t, thresholding.
    """
    return _singlestep("x", 2)


def dpmpp_3s() -> Sampler:
    """DPM-Solver++(3S): dpm_solver_3 with x in place of eps.

    Lu et al. 2022 (arXiv:2211.01095), in the authors' code. Order 3, three evaluations,
    deterministic. For guided sampling at 20 evaluations and more.
    """
    return _singlestep("x", 3)
