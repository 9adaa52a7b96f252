"""Langevin dynamics at a fixed noise level, alone (NCSN) or as the corrector of a reverse-SDE step.

    x <- x + epsilon score + sqrt(2 epsilon) z,    score = -eps / sigma,

keeps the distribution of x_t at that level, up to O(epsilon). A finer grid does not reduce the error of epsilon: the order of
both samplers is 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.brownian import fold
from ldm_jax.diffusion.samplers.ode import renoise
from ldm_jax.diffusion.samplers.sampler import Sampler, State, noise, start
from ldm_jax.diffusion.samplers.sde import by_euler_maruyama, by_reverse_diffusion

PREDICTORS = {"reverse_diffusion": by_reverse_diffusion, "euler_maruyama": by_euler_maruyama}


def _norm(x: Array) -> Array:
    """The norm of each row, [B, 1, ...]."""
    return jnp.sqrt(jnp.sum(x**2, tuple(range(1, x.ndim)), keepdims=True))


def predictor_corrector(
    predictor: Literal["reverse_diffusion", "euler_maruyama"] = "reverse_diffusion",
    snr: float = 0.16,
    corrections: int = 1,
) -> Sampler:
    """Predictor-corrector: `corrections` Langevin steps at t, then the predictor's step to s.

    Song et al. 2021 (arXiv:2011.13456), algorithms 2-5: epsilon = 2 (alpha_t / alpha_s)^2 (snr |z| / |score|)^2, the norms
    taken over each row (over the batch in the paper), so that a row depends on itself alone; the first factor is their 1 - beta
    on VP, 1 on VE, and 0 where a step leaves alpha = 0. As in their code the corrector comes first, so that nothing is
    evaluated at s. snr is 0.16 for VE in the paper, 0.01 for VP. Order 0: with snr = 0 that of the predictor, else
    a bias O(snr^2) stays. corrections + 1 evaluations, stochastic, unit noise per step. For score networks at hundreds of
    steps. Rows need many entries: |score| of few entries may vanish. Raises ValueError for another predictor, a negative snr or
    corrections < 1.
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor is {predictor!r}, expected one of {sorted(PREDICTORS)}")
    if not snr >= 0:
        raise ValueError(f"snr is {snr}, expected a number >= 0")
    if not corrections >= 1:
        raise ValueError(f"corrections is {corrections}, expected at least 1")

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        def correct(i, x):
            z, score = noise(fold(keys, i + 1), x), -denoise(x, t).eps / process.sigma(t)
            size = _norm(score)
            root = process.alpha(t) / process.alpha(s) * snr * _norm(z) / jnp.where(size > 0, size, jnp.inf)
            return x + 2 * root**2 * score + 2 * root * z

        x = jax.lax.fori_loop(0, corrections, correct, carry.x)
        return State(PREDICTORS[predictor](process, denoise(x, t), x, t, s, noise(fold(keys, 0), x)))

    return Sampler(start, step, order=0, evaluations=corrections + 1, stochastic=True)


def annealed_langevin(steps: int = 5, step_size: float = 0.2) -> Sampler:
    """Annealed Langevin dynamics: at every s, `steps` times x <- x - (r / 2) sigma_s eps + sqrt(r) sigma_s z, r = step_size.

    Song & Ermon 2019 (NCSN, arXiv:1907.05600), algorithm 1, on VE: their alpha_i = epsilon sigma_i^2 / sigma_L^2 is r
    sigma_i^2 (2e-5 / 0.01^2 = 0.2, with 100 steps a level; NCSNv2, arXiv:2006.09011, 5 steps on a finer grid). The levels are
    times[1:]; x goes from level to level without change, on any process. Order 0: the bias of r remains, and the lag behind
    levels that fall too fast. `steps` evaluations a step, at s (one, at t, and no noise, into sigma_s = 0), stochastic, unit
    noise per step. For score networks of the NCSN kind. Raises ValueError for steps < 1 or unless 0 < step_size < 2.
    """
    if not steps >= 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if not 0 < step_size < 2:
        raise ValueError(f"step_size is {step_size}, expected a number in (0, 2)")

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        sigma = process.sigma(s)

        def move(i, x):
            return x - 0.5 * step_size * sigma * denoise(x, s).eps + step_size**0.5 * sigma * noise(fold(keys, i), x)

        return State(
            jax.lax.cond(
                sigma > 0,
                lambda x: jax.lax.fori_loop(0, steps, move, x),
                lambda x: renoise(process, denoise(x, t), s),
                carry.x,
            )
        )

    return Sampler(start, step, order=0, evaluations=steps, stochastic=True)
