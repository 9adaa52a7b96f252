"""Ancestral samplers: a deterministic step to less noise than that of s, then fresh noise up to s.

A step t -> s of any method first solves the probability-flow ODE to a level d below s, then adds noise by the forward
process, x_s = (alpha_s / alpha_d) x_d + fresh z. The distribution of x_s is exact wherever that of x_d is, so the weak order is the
order of the ODE method. Noise is unit noise per step, not the path of an SDE: a finer grid does not refine it.

In y = x_t / c against tau = sigma / c, c = alpha + k sigma (see ode.py), d is where

    tau_d = tau_s sqrt(1 - eta^2 (1 - tau_s^2 / tau_t^2))    k = 0: fresh^2 = eta^2 sigma_s^2 (1 - SNR_t / SNR_s), DDIM's
    tau_d = tau_s (1 - eta (1 - tau_s / tau_t))              k = 1: the rectified-flow variant

Both are published: k-diffusion's ancestral step, and ComfyUI's and diffusers' (LTX) for rectified flow. eta = 0 is the
ODE method.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import Clean, posterior_mean, step_log_var
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.exponential import level, moments, time_at
from ldm_jax.diffusion.samplers.ode import renoise, slope, straight, time_of_tau
from ldm_jax.diffusion.samplers.sampler import Sampler, State, noise, start

Variance = Literal["large", "small", "learned"]


def ddpm(variance: Variance = "large", last_noise: bool = False) -> Sampler:
    """DDPM: x_s = E[x_s | x_t, x] + std z, the mean of q(x_s | x_t, x) = alpha_s x + sigma_s sqrt(SNR_t / SNR_s) eps.

    Ho et al. 2020 (arXiv:2006.11239), equations 6-7 and 11, for any process. std^2 is
        large      beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, under VP 1 - alpha_t^2 / alpha_s^2
        small      beta sigma_s^2 / sigma_t^2, the variance of q(x_s | x_t, x): the same sampler as ddim(eta=1)
        learned    between them as Clean.log_var says, prediction.step_log_var (Nichol & Dhariwal 2021, arXiv:2102.09672)
    and 0 where sigma_s = 0, unless last_noise: then `small` is 1e-20 there and the rest as always, which is what diffusers'
    DDPM adds to an image where its last step is not from its table's first entry. Weak order 1, one evaluation, stochastic,
    unit noise per step. The sampler that DDPM and ADM networks were published with, at 250 to 1000 steps; in few steps
    `large` is over-dispersed. Raises ValueError for another variance, and in its first step for `learned` when the denoiser
    gives no log_var.
    """
    if variance not in ("large", "small", "learned"):
        raise ValueError(f"variance is {variance!r}, expected 'large', 'small' or 'learned'")

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        clean = denoise(carry.x, t)
        if variance == "learned":
            if clean.log_var is None:
                raise ValueError("variance is 'learned', expected a denoiser whose Clean has log_var, got None")
            v = clean.log_var
        else:
            v = jnp.full((1,) * carry.x.ndim, 1.0 if variance == "large" else -1.0, carry.x.dtype)
        fresh = jnp.exp(0.5 * step_log_var(process, v, t, s))
        if last_noise:
            tiny = 1e-10 ** (0.5 * (1 - v)) * process.sigma(t) ** (0.5 * (1 + v))
        else:
            tiny = 0
        fresh = jnp.where(process.sigma(s) > 0, fresh, tiny)
        return State(posterior_mean(process, clean, t, s) + fresh * noise(keys, carry.x))

    return Sampler(start, step, order=1, evaluations=1, stochastic=True)


def descend(process: Process, t: Array, s: Array, eta: float) -> tuple[Array, Array, Array]:
    """(tau_d, lift, fresh): the level below s, and x_s = lift y_d + fresh z from y_d = x_d / c_d, as the module says.

    lift = alpha_s c_d / alpha_d = alpha_s / (1 - k tau_d), since alpha = c (1 - k tau).
    """
    (_, tau_t), (_, tau_s) = straight(process, t), straight(process, s)
    ratio = tau_s / tau_t
    share = 1 - eta * (1 - ratio) if process.affine else jnp.sqrt(1 - eta**2 * (1 - ratio**2))
    tau = tau_s * share
    lift = process.alpha(s) / (1 - process.affine * tau)
    return tau, lift, jnp.sqrt(jnp.maximum(process.sigma(s) ** 2 - (lift * tau) ** 2, 0))


def check(eta: float, s_noise: float) -> None:
    """ValueError unless 0 <= eta <= 1 and s_noise >= 0."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number in [0, 1]")
    if not s_noise >= 0:
        raise ValueError(f"s_noise is {s_noise}, expected a number >= 0")


# (denoise, process, clean, t, s, tau_d, lift) -> what a second evaluation changes about Euler's x_s.
Correction = Callable[[Denoiser, Process, Clean, Array, Array, Array, Array], Array]


def _ancestral(correction: Correction | None, eta: float, s_noise: float, order: int) -> Sampler:
    """Euler to d, the correction of a method of order 2 if there is one, and fresh noise."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number in [0, 1]")
    if not s_noise >= 0:
        raise ValueError(f"s_noise is {s_noise}, expected a number >= 0")

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        clean = denoise(carry.x, t)
        tau, lift, fresh = descend(process, t, s, eta)
        x = process.alpha(s) * clean.x + lift * tau * clean.eps
        if correction is not None:
            x = x + correction(denoise, process, clean, t, s, tau, lift)
        return State(x + s_noise * fresh * noise(keys, x) if eta > 0 else x)

    return Sampler(start, step, order=order, evaluations=order, stochastic=eta > 0)


def euler_ancestral(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Euler's step to d, then noise: x_s = alpha_s x + lift tau_d eps + fresh z, with tau_d, lift, fresh of `descend`.

    k-diffusion's (Crowson 2022) with the noise of Song et al. 2021 (DDIM, arXiv:2010.02502, equation 16) and, on the flow and
    other processes with k = 1, the rectified-flow variant. For k = 0 it is ddim(eta), of which eta = 1, DDPM with the smaller
    variance, is the default here. Weak order 1, one evaluation, stochastic for eta > 0, unit noise per step. Varied images at
    20 to 40 steps. Raises ValueError unless 0 <= eta <= 1 and s_noise >= 0.
    """
    return _ancestral(None, eta, s_noise, order=1)


def dpm_2_ancestral(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """dpm_2's step to d, then noise: y_d = y_t + (tau_d - tau_t) d_m, d_m = dy/dtau at tau_m = sqrt(tau_t tau_d).

    k-diffusion's, after algorithm 2 of Karras et al. 2022 (arXiv:2206.00364), and on the flow ComfyUI's rectified-flow
    variant. eta = 0 is dpm_2; eta = 1 has tau_m = tau_s for k = 0. Weak order 2, two evaluations, stochastic for eta > 0,
    unit noise per step; a step into sigma = 0 is euler_ancestral's, with one. Varied images where two evaluations a step
    are affordable. Raises ValueError unless 0 <= eta <= 1 and s_noise >= 0.
    """

    def correction(denoise, process, clean, t, s, tau, lift):
        _, tau_t = straight(process, t)
        middle = time_of_tau(process, jnp.where(tau > 0, jnp.sqrt(tau_t * tau), tau_t))

        def change():
            second = denoise(renoise(process, clean, middle), middle)
            return lift * (tau - tau_t) * (slope(process, second) - slope(process, clean))

        return jax.lax.cond(tau > 0, change, lambda: jnp.zeros_like(clean.x))

    return _ancestral(correction, eta, s_noise, order=2)


def dpmpp_2s_ancestral(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """DPM-Solver++(2S)'s step to d, then noise: alpha_s (x + M_0(h) (x_m - x)), x_m at lambda_m = lambda_t + h / 2.

    k-diffusion's, after Lu et al. 2022 (arXiv:2211.01095), algorithm 1, with h = lambda_d - lambda_t; on the flow ComfyUI's
    rectified-flow variant. eta = 0 is dpmpp_2s. Weak order 2, two evaluations, stochastic for eta > 0, unit noise per step;
    a step that leaves alpha = 0 or enters sigma = 0 is euler_ancestral's, with one. For guided sampling at 15 to 30 steps.
    Raises ValueError unless 0 <= eta <= 1 and s_noise >= 0.
    """

    def correction(denoise, process, clean, t, s, tau, lift):
        # alpha / sigma = 1 / tau - k. The level halfway to d is never below s.
        level_t, level_d = level(process, t), jnp.log(1 / tau - process.affine)
        finite = jnp.isfinite(level_t) & jnp.isfinite(level_d)
        middle = time_at(process, jnp.where(finite, 0.5 * (level_t + level_d), 0))

        def change():
            second = denoise(renoise(process, clean, middle), middle)
            return process.alpha(s) * moments("x", level_d - level_t, 1)[0] * (second.x - clean.x)

        return jax.lax.cond(finite, change, lambda: jnp.zeros_like(clean.x))

    return _ancestral(correction, eta, s_noise, order=2)
