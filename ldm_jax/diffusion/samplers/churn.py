"""Samplers that add noise again: an ODE method, with noise of the forward process from time to time.

    x_hat = a x_t + b z,    a = alpha_hat / alpha_t, b^2 = sigma_hat^2 - a^2 sigma_t^2,

takes x_t to a noisier level with the exact distribution (sde.transition), so the weak order is that of the ODE method, Heun's. Noise
is unit noise per draw, not the path of an SDE.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.brownian import fold
from ldm_jax.diffusion.samplers.exponential import level, time_at
from ldm_jax.diffusion.samplers.ode import trapezoid
from ldm_jax.diffusion.samplers.sampler import Sampler, State, noise, start
from ldm_jax.diffusion.samplers.sde import transition


class Churn(NamedTuple):
    """x [B, ...] and gamma = min(s_churn / n, sqrt(2) - 1), n the number of steps that move."""

    x: Array
    gamma: Array


def edm_stochastic(s_churn: float = 40.0, s_tmin: float = 0.05, s_tmax: float = 50.0, s_noise: float = 1.0) -> Sampler:
    """EDM's stochastic sampler: noise up to (sigma / alpha)_hat = (1 + gamma) sigma / alpha, then Heun's step from there to s.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 2, gamma = min(s_churn / n, sqrt(2) - 1) where s_tmin <= sigma / alpha <= s_tmax,
    else 0. The noisier level is that of a later time t_hat, on any process; never above t = 1. The defaults are those of the paper for
    ImageNet-64, except s_noise, which is 1.003 there: it corrects networks that remove too much noise, and makes the distribution
    inexact. s_churn = 0 is heun. Weak order 2, two evaluations (one into sigma_s = 0), stochastic, unit noise per step. For the best
    images at 50 steps and more. Raises ValueError for a negative number or unless s_tmin <= s_tmax.
    """
    for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_noise", s_noise)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}, expected a number >= 0")
    if not s_tmin <= s_tmax:
        raise ValueError(f"s_tmin, s_tmax are {s_tmin}, {s_tmax}, expected s_tmin <= s_tmax")

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Churn:
        moving = jnp.sum(times[1:] != times[:-1]).astype(x_T.dtype)
        return Churn(x_T, jnp.minimum(s_churn / jnp.maximum(moving, 1), math.sqrt(2) - 1))

    def step(denoise: Denoiser, process: Process, carry: Churn, t: Array, s: Array, keys: Array | None) -> Churn:
        x, t_hat = carry.x, t
        if s_churn > 0:
            noisiness = process.sigma(t) / process.alpha(t)
            inside = (noisiness >= s_tmin) & (noisiness <= s_tmax)
            raised = jnp.maximum(time_at(process, level(process, t) - jnp.log1p(carry.gamma)), t)
            t_hat = jnp.where(inside, raised, t)
            a, b = transition(process, t, t_hat)
            x = jnp.where(t_hat > t, a * x + b * s_noise * noise(keys, x), x)
        return Churn(trapezoid(denoise, process, denoise(x, t_hat), t_hat, s), carry.gamma)

    return Sampler(init, step, order=2, evaluations=2, stochastic=s_churn > 0)


def restart(low: float = 0.1, high: float = 2.0, repeats: int = 2, steps: int = 5) -> Sampler:
    """Restart: heun, and where the grid first meets sigma / alpha <= low, `repeats` times noise up to `high` and back.

    Xu et al. 2023 (arXiv:2306.14878), algorithm 2: the way back takes `steps` Heun steps on Karras's grid (rho = 7) from
    `high` to the time where the restart began. Weak order 2 (of the grid and of `steps` together), stochastic, unit noise
    per restart. Two evaluations a step (one into sigma_s = 0) and 2 steps repeats in all for the restarts, none if the
    grid ends above `low`. It has the speed of an ODE method, and contracts earlier errors as an SDE does. Several intervals are several
    samplers one after another. Raises ValueError unless 0 < low < high, repeats >= 1, steps >= 1.
    """
    if not 0 < low < high:
        raise ValueError(f"low, high are {low}, {high}, expected 0 < low < high")
    if not (repeats >= 1 and steps >= 1):
        raise ValueError(f"repeats, steps are {repeats}, {steps}, expected at least 1 of each")

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        x = trapezoid(denoise, process, denoise(carry.x, t), t, s)
        noisiness_t, noisiness_s = (process.sigma(u) / process.alpha(u) for u in (t, s))
        top = time_at(process, jnp.asarray(-math.log(high), x.dtype))
        roots = jnp.linspace(high ** (1 / 7), noisiness_s ** (1 / 7), steps + 1, dtype=x.dtype)
        times = time_at(process, -7 * jnp.log(roots)).at[0].set(top).at[-1].set(s)
        a, b = transition(process, s, top)

        def back(x, now):
            return trapezoid(denoise, process, denoise(x, now[0]), now[0], now[1]), None

        def again(i, x):
            return jax.lax.scan(back, a * x + b * noise(fold(keys, i), x), (times[:-1], times[1:]))[0]

        def restarted(x):
            return jax.lax.fori_loop(0, repeats, again, x)

        return State(jax.lax.cond((noisiness_t > low) & (noisiness_s <= low), restarted, lambda x: x, x))

    return Sampler(start, step, order=2, evaluations=2, stochastic=True)
