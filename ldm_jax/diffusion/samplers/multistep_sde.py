"""Multistep samplers of the reverse SDE: earlier clean estimates in place of stages, one evaluation a step.

    x_s = alpha_s x + kept eps + alpha_s sum_j w_j (x_j - x) + fresh z,    kept, fresh from sde.split,

w from the moments M_k((1 + eta) h) (exponential.py). The weak order is 2 where a line is used: x_j - x contains the noise of
the step before in place of the noise of the step itself, which no stage has seen, and over the steps this makes
the trapezoid rule. More estimates lower the error but not its order, which exceeds 2 only as eta goes to 0. Steps that
leave alpha = 0 or enter sigma = 0 have w = 0, and their places are never nodes of the interpolation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.brownian import Walk, check_noise, increments, walk
from ldm_jax.diffusion.samplers.exponential import combine, level, moments, weights
from ldm_jax.diffusion.samplers.history import History, check_final, empty, remember, within
from ldm_jax.diffusion.samplers.multistep import Rule, exact, halved, reach, taylor
from ldm_jax.diffusion.samplers.sampler import Sampler, noise
from ldm_jax.diffusion.samplers.sde import renoised, split


def _dpmpp(size: int, rule: Rule, eta: float, s_noise: float, depth: int, final: tuple[int, ...] = ()) -> Sampler:
    """DPM-Solver++ SDE through `size` earlier clean estimates."""
    check_noise(eta, s_noise, depth)
    check_final(final)

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Walk:
        return walk(process, x_T, keys, depth, empty(x_T, size, times))

    def step(denoise: Denoiser, process: Process, carry: Walk, t: Array, s: Array, keys: Array | None) -> Walk:
        past = carry.at
        clean, level_t = denoise(past.x, t), level(process, t)
        h, usable = reach(level_t, level(process, s), past.filled & within(past.left, final, size))
        nodes = jnp.where(usable, past.places - level_t, 0) / h
        w = weights(nodes, usable, rule(moments("x", (1 + eta) * h, size + 1), usable))
        z = s_noise * increments(carry, keys, (t, s), depth)[0] if eta > 0 else jnp.zeros_like(past.x)
        x = renoised(process, clean, t, s, z, eta) + process.alpha(s) * combine(w, past.values, clean.x)
        return Walk(remember(past, x, clean.x, level_t), carry.path)

    return Sampler(init, step, order=2, evaluations=1, stochastic=eta > 0)


def dpmpp_2m_sde(eta: float = 1.0, s_noise: float = 1.0, depth: int = 0, final: tuple[int, ...] = ()) -> Sampler:
    """DPM-Solver++(2M) SDE, midpoint: w_1 = -M_0 h / (2 h_last), M_0 = 1 - exp(-(1 + eta) h).

    Lu et al. 2022 (arXiv:2211.01095), section 5, as in k-diffusion and diffusers (solver_type 'midpoint'). eta scales the
    SDE's g^2, 0 is dpmpp_2m; s_noise multiplies z; depth > 0 follows one Brownian path per row (brownian.py). Weak order 2, one
    evaluation, stochastic. The usual SDE sampler of latent models at 20 to 30 steps. final: orders of the last steps at most
    (history.within). Raises ValueError for a negative eta or s_noise, or a depth outside 0..30.
    """
    return _dpmpp(1, taylor, eta, s_noise, depth, final)


def dpmpp_2m_sde_heun(eta: float = 1.0, s_noise: float = 1.0, depth: int = 0, final: tuple[int, ...] = ()) -> Sampler:
    """DPM-Solver++(2M) SDE, heun: w_1 = -M_1 h / h_last, the line through two estimates integrated exactly.

    solver_type 'heun' of dpmpp_2m_sde (Lu et al. 2022, arXiv:2211.01095) in k-diffusion and diffusers; eta = 0 is
    res_multistep. Weak order 2, one evaluation, stochastic. In dpmpp_2m_sde's place on coarse grids, where M_0 / 2
    overrates the slope. Raises ValueError for a negative eta or s_noise, or a depth outside 0..30.
    """
    return _dpmpp(1, exact, eta, s_noise, depth, final)


def dpmpp_3m_sde(eta: float = 1.0, s_noise: float = 1.0, depth: int = 0) -> Sampler:
    """DPM-Solver++(3M) SDE: the parabola through three clean estimates, its second divided difference weighed by M_2 / 2.

    k-diffusion's (Crowson 2023, after Lu et al. 2022, arXiv:2211.01095), which halves the last term as dpmpp_3m does, and
    begins with DDPM's step and dpmpp_2m_sde_heun's. eta, s_noise and depth as in dpmpp_2m_sde. Weak order 2, one
    evaluation, stochastic. For unguided sampling at 30 steps and more. Raises ValueError for a negative eta or s_noise, or
    a depth outside 0..30.
    """
    return _dpmpp(2, halved, eta, s_noise, depth)


# Nodes and weights of Gauss and Legendre on [0, 1].
_NODES, _WEIGHTS = (0.5 * (a + b) for a, b in zip(np.polynomial.legendre.leggauss(8), (1.0, 0.0), strict=True))


def er_scale(level: Array) -> Array:
    """phi(l) / l = exp(l^0.3) + 10 at l = sigma / alpha: ER-SDE-Solvers' choice (Cui et al. 2023, arXiv:2309.06169)."""
    return jnp.exp(level**0.3) + 10


def er_weights(scale: Callable[[Array], Array], l_t: Array, l_s: Array) -> tuple[Array, Array]:
    """l_s - l_t + phi_s S_0 and (l_s - l_t)^2 / 2 + phi_s S_1, the weights of x' and x'' in er_sde; l_t > l_s > 0."""
    span = jnp.log(l_t / l_s)
    inner = l_s * jnp.exp(span * _NODES)
    density = span * _WEIGHTS / scale(inner)  # dl / phi
    phi_s, dl = l_s * scale(l_s), l_s - l_t
    return dl + phi_s * jnp.sum(density), dl**2 / 2 + phi_s * jnp.sum((inner - l_t) * density)


def er_sde(order: int = 3, s_noise: float = 1.0, scale: Callable[[Array], Array] = er_scale) -> Sampler:
    """ER-SDE-Solver: noise by phi(l) = l scale(l), l = sigma / alpha, and Taylor's polynomial of x in l.

        x_s = alpha_s (x + (l_s - l_t + phi_s S_0) x' + ((l_s - l_t)^2 / 2 + phi_s S_1) x'') + kept eps + fresh z
        kept = sigma_s scale(l_s) / scale(l_t),  fresh^2 = sigma_s^2 - kept^2,  S_k = int_{l_s}^{l_t} (l - l_t)^k / phi dl

    Cui et al. 2023 (arXiv:2309.06169), algorithms 1-3 for order 1-3, one form for VP and VE; x' and x'' are backward
    differences, S by 8 Gauss points in log l. scale = 1 is the ODE, scale = l the reverse SDE (eta = 1). Weak order
    min(order, 2), for the ODE too: x' is the slope of the step before, not that at l_t. One evaluation, stochastic, unit
    noise per step. Good at 5 to 20 steps, where little noise is best. Raises ValueError for another order or a negative
    s_noise.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}, expected 1, 2 or 3")
    check_noise(0.0, s_noise)

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> History:
        return empty(x_T, 2)

    def step(denoise: Denoiser, process: Process, carry: History, t: Array, s: Array, keys: Array | None) -> History:
        clean = denoise(carry.x, t)
        alpha_s, sigma_s = process.alpha(s), process.sigma(s)
        l_t, l_s = process.sigma(t) / process.alpha(t), sigma_s / alpha_s
        kept = sigma_s * scale(l_s) / scale(l_t)
        fresh = jnp.sqrt(jnp.maximum(sigma_s**2 - kept**2, 0))
        last, before = carry.filled & jnp.isfinite(l_t) & (l_s > 0)
        last, before = last & (order > 1), last & before & (order > 2)
        first, second = er_weights(scale, jnp.where(last, l_t, 2), jnp.where(last, l_s, 1))
        l_1, l_2 = carry.places
        slope = (clean.x - carry.values[0]) / jnp.where(last, l_t - l_1, 1)
        slope_last = (carry.values[0] - carry.values[1]) / jnp.where(before, l_1 - l_2, 1)
        curvature = 2 * (slope - slope_last) / jnp.where(before, l_t - l_2, 1)
        x = clean.x + jnp.where(last, first, 0) * slope + jnp.where(before, second, 0) * curvature
        x = alpha_s * x + kept * clean.eps + s_noise * fresh * noise(keys, x)
        return remember(carry, x, clean.x, l_t)

    return Sampler(init, step, order=min(order, 2), evaluations=1, stochastic=True)


def middle_times(t: Array) -> Array:
    """tau = 1 where 0.2 <= t <= 0.8, else 0: noise neither while the layout forms nor in the last details."""
    return jnp.where((t >= 0.2) & (t <= 0.8), 1.0, 0.0).astype(t.dtype)


class Corrected(NamedTuple):
    """The predicted state x [B, ...]; the estimates up to the last step; the time of that step, its noise [B, ...] in units of the
    standard deviation, and eps [B, ...] of the corrected state from which it started."""

    x: Array
    past: History
    t: Array
    z: Array
    eps: Array


def _sa_solver(
    tau: Callable[[Array], Array] | float, predictor: int, corrector: int, again: bool, halve: bool
) -> Sampler:
    if predictor not in (1, 2, 3):
        raise ValueError(f"predictor is {predictor}, expected an order of 1, 2 or 3")
    if corrector not in (1, 2, 3, 4):
        raise ValueError(f"corrector is {corrector}, expected 1 (none) or an order of 2, 3 or 4")
    if not callable(tau) and not tau >= 0:
        raise ValueError(f"tau is {tau}, expected a number >= 0 or a function of t")

    def squared(t: Array) -> Array:
        return jnp.asarray(tau(t) if callable(tau) else tau, t.dtype) ** 2

    def quadrature(h: Array, nodes: Array, usable: Array, eta: Array) -> Array:
        if len(nodes) == 0:
            return nodes
        m = moments("x", (1 + eta) * h, len(nodes) + 1)
        if halve:
            m = m[0], jnp.where(jnp.sum(usable) == 1, 0.5 * (1 + eta) * h, m[1]), *m[2:]
        return weights(nodes, usable, m)

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Corrected:
        zero = jnp.zeros_like(x_T)
        return Corrected(x_T, empty(x_T, max(predictor - 1, corrector - 1, 1)), times[0], zero, zero)

    def correct(process: Process, carry: Corrected, x: Array, t: Array) -> Array:
        """The last step repeated with the same noise, its polynomial now also through the estimate at its end."""
        past, level_t, eta = carry.past, level(process, t), squared(carry.t)
        kept, fresh = split(process, carry.t, t, eta)
        h, usable = reach(past.places[0], level_t, past.filled)
        older = slice(1, corrector - 1)
        nodes = jnp.concatenate([jnp.ones(1, h.dtype), jnp.where(usable, past.places - past.places[0], 0)[older] / h])
        usable = jnp.concatenate([usable[:1], usable[older]])
        values = jnp.concatenate([x[None], past.values[older]])
        origin = past.values[0]
        x_t = process.alpha(t) * (origin + combine(quadrature(h, nodes, usable, eta), values, origin))
        return jnp.where(usable[0], x_t + kept * carry.eps + fresh * carry.z, carry.x)

    def step(
        denoise: Denoiser, process: Process, carry: Corrected, t: Array, s: Array, keys: Array | None
    ) -> Corrected:
        clean = denoise(carry.x, t)
        x_t = correct(process, carry, clean.x, t) if corrector > 1 else carry.x
        if again:
            clean = denoise(x_t, t)
            eps = clean.eps
        else:
            eps = clean.eps + (x_t - carry.x) / process.sigma(t)
        past, level_t, eta, z = carry.past, level(process, t), squared(t), noise(keys, x_t)
        kept, fresh = split(process, t, s, eta)
        h, usable = reach(level_t, level(process, s), past.filled)
        usable = usable[: predictor - 1]
        nodes = jnp.where(usable, past.places[: predictor - 1] - level_t, 0) / h
        x_s = process.alpha(s) * (
            clean.x + combine(quadrature(h, nodes, usable, eta), past.values[: predictor - 1], clean.x)
        )
        x_s = x_s + kept * eps + fresh * z
        return Corrected(x_s, remember(past, x_s, clean.x, level_t), t, z, eps)

    weak = min(max(predictor, corrector), 2)
    return Sampler(init, step, order=weak, evaluations=2 if again else 1, stochastic=True)


def sa_solver(
    tau: Callable[[Array], Array] | float = middle_times, predictor: int = 2, corrector: int = 2, halve: bool = True
) -> Sampler:
    """SA-Solver (PEC): stochastic Adams predictor and corrector with noise tau(t), eta = tau(t)^2 in sde.split.

    Xue et al. 2023 (arXiv:2309.05019), algorithm 1: predict x_s through `predictor` estimates, evaluate there, correct
    the step through `corrector` estimates with the noise it drew, and go on from the corrected state with the evaluation
    of the predicted one. Weights are exact integrals of the interpolant, but for (1 + tau^2) h / 2 in M_1's place where
    a line is used, as the authors and diffusers have it for few steps; halve=False keeps M_1 (ComfyUI). The last state is
    a predicted one. Weak order 2, and min(predictor + 1, corrector) for tau = 0. One evaluation, stochastic, unit noise
    per step. For 15 to 30 steps with tau near 1 on the middle times. Raises ValueError for orders out of range
    (corrector=1 leaves it out) or a negative tau.
    """
    return _sa_solver(tau, predictor, corrector, again=False, halve=halve)


def sa_solver_pece(
    tau: Callable[[Array], Array] | float = middle_times, predictor: int = 2, corrector: int = 2, halve: bool = True
) -> Sampler:
    """SA-Solver (PECE): sa_solver that evaluates the corrected state once more before it goes on.

    Xue et al. 2023 (arXiv:2309.05019), section 5; ComfyUI's name. Weak order 2, two evaluations, stochastic, unit
    noise per step. Where sa_solver is unsteady (strong guidance). Raises ValueError as sa_solver does.
    """
    return _sa_solver(tau, predictor, corrector, again=True, halve=halve)
