"""One-step samplers of the probability-flow ODE, and DDIM.

With c = alpha + k sigma (k = process.affine), y = x_t / c and tau = sigma / c, the ODE  dx_t/dt = alpha' x + sigma' eps
becomes

    dy/dtau = eps - k x,

which is k-diffusion's and EDM's dx/dsigma = eps for k = 0 and rectified flow's dx/dt = eps - x for k = 1. No
derivative of the schedule is needed, so tables with kinks keep their order, and k = 1 is regular where alpha = 0.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.sampler import Sampler, State, noise, start


def straight(process: Process, t: Array) -> tuple[Array, Array]:
    """c = alpha + k sigma and tau = sigma / c at t."""
    sigma = process.sigma(t)
    c = process.alpha(t) + process.affine * sigma
    return c, sigma / c


def slope(process: Process, clean: Clean) -> Array:
    """dy/dtau = eps - k x."""
    return clean.eps - process.affine * clean.x if process.affine else clean.eps


def renoise(process: Process, clean: Clean, s: Array) -> Array:
    """alpha(s) x + sigma(s) eps: Euler's step to s, in whichever c."""
    return process.alpha(s) * clean.x + process.sigma(s) * clean.eps


def euler() -> Sampler:
    """Euler on dy/dtau: x_s = alpha_s x + sigma_s eps.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without its correction; Liu et al. 2022 on the flow. Order 1, one
    evaluation, deterministic. Equal to DDIM with eta = 0 on every process. The robust baseline for 20 steps and more.
    """

    def step(denoise, process, carry, t, s, keys):
        return State(renoise(process, denoise(carry.x, t), s))

    return Sampler(start, step, order=1, evaluations=1)


def heun() -> Sampler:
    """Heun's second-order method on dy/dtau: y_s = y_t + (tau_s - tau_t) (d_t + d_s) / 2.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1. Order 2, two evaluations, deterministic; as in the paper a step
    into sigma(s) = 0 is Euler's, with one evaluation. Use it when accuracy counts and evaluations are cheap.
    """

    def step(denoise, process, carry, t, s, keys):
        clean = denoise(carry.x, t)
        x_s = renoise(process, clean, s)
        (_, tau_t), (c_s, tau_s) = straight(process, t), straight(process, s)

        def correct(x_s):
            change = slope(process, denoise(x_s, s)) - slope(process, clean)
            return x_s + 0.5 * c_s * (tau_s - tau_t) * change

        return State(jax.lax.cond(process.sigma(s) > 0, correct, lambda x_s: x_s, x_s))

    return Sampler(start, step, order=2, evaluations=2)


def ddim(eta: float = 0.0) -> Sampler:
    """DDIM: x_s = alpha_s x + sqrt(sigma_s^2 - v) eps + sqrt(v) z with v = eta^2 sigma_s^2 (1 - SNR_t / SNR_s).

    Song et al. 2021 (arXiv:2010.02502), equations 12 and 16, for any alpha and sigma. eta = 0 is deterministic and of
    order 1; eta = 1 is DDPM's ancestral sampling with the smaller posterior variance (Ho et al. 2020, section 3.2). One
    evaluation. The usual choice for eps and v networks at 50 steps. Raises ValueError unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number in [0, 1]")

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        clean = denoise(carry.x, t)
        if eta == 0:
            return State(renoise(process, clean, s))
        alpha_s, sigma_s = process.alpha(s), process.sigma(s)
        # sigma_s alpha_t / (alpha_s sigma_t) = sqrt(SNR_t / SNR_s), 0 where alpha_t or sigma_s is.
        ratio = sigma_s * process.alpha(t) / (alpha_s * process.sigma(t))
        fresh = eta * sigma_s * jnp.sqrt(jnp.maximum(1 - ratio**2, 0))
        kept = jnp.sqrt(jnp.maximum(sigma_s**2 - fresh**2, 0))
        return State(alpha_s * clean.x + kept * clean.eps + fresh * noise(keys, carry.x))

    return Sampler(start, step, order=1, evaluations=1, stochastic=eta > 0)
