"""One-step samplers of the probability-flow ODE, and DDIM.

With c = alpha + k sigma (k = process.affine), y = x_t / c and tau = sigma / c, the ODE  dx_t/dt = alpha' x + sigma' eps
becomes

    dy/dtau = eps - k x,

which is k-diffusion's and EDM's dx/dsigma = eps for k = 0 and rectified flow's dx/dt = eps - x for k = 1. No
derivative of the schedule is needed, so tables with kinks keep their order, and k = 1 is regular where alpha = 0.

Runge-Kutta methods are written as Euler's step and a correction, x_s = alpha_s x + sigma_s eps + c_s dtau sum_i b_i (d_i - d_1)
with d = dy/dtau and dtau = tau_s - tau_t.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process, inverse_log_snr, per_row
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
    """alpha(s) x + sigma(s) eps, s a scalar or [B]: Euler's step to s, in whichever c."""
    return per_row(process.alpha(s), clean.x) * clean.x + per_row(process.sigma(s), clean.eps) * clean.eps


def time_of_tau(process: Process, tau: Array) -> Array:
    """The t at which tau has this value in (0, 1 / k): alpha / sigma = 1 / tau - k."""
    return inverse_log_snr(process, 2 * jnp.log(1 / tau - process.affine))


def halfway(process: Process, t: Array, s: Array) -> Array:
    """The time at the middle of tau."""
    return time_of_tau(process, 0.5 * (straight(process, t)[1] + straight(process, s)[1]))


def unless_clean(process: Process, s: Array, correct: Callable[[Array], Array], x_s: Array) -> Array:
    """correct(x_s); where sigma(s) = 0 there is nothing to denoise, no evaluation, and x_s stays Euler's step."""
    return jax.lax.cond(process.sigma(s) > 0, correct, lambda x_s: x_s, x_s)


def trapezoid(denoise: Denoiser, process: Process, clean: Clean, t: Array, s: Array) -> Array:
    """x_s by Heun's method, where clean is the estimate at t: one more evaluation, at s; none where sigma(s) = 0."""
    (_, tau_t), (c_s, tau_s) = straight(process, t), straight(process, s)

    def correct(x_s):
        return x_s + 0.5 * c_s * (tau_s - tau_t) * (slope(process, denoise(x_s, s)) - slope(process, clean))

    return unless_clean(process, s, correct, renoise(process, clean, s))


def classical(denoise: Denoiser, process: Process, clean: Clean, t: Array, middle: Array, s: Array) -> Array:
    """x_s by Kutta's method with its two inner stages at the time `middle`, from clean at t: three more evaluations."""
    (_, tau_t), (c_m, tau_m), (c_s, tau_s) = (straight(process, u) for u in (t, middle, s))
    first = slope(process, clean)

    def correct(x_s):
        x_m = renoise(process, clean, middle)
        second = slope(process, denoise(x_m, middle)) - first
        third = slope(process, denoise(x_m + c_m * (tau_m - tau_t) * second, middle)) - first
        fourth = slope(process, denoise(x_s + c_s * (tau_s - tau_t) * third, s)) - first
        return x_s + c_s * (tau_s - tau_t) * (2 * second + 2 * third + fourth) / 6

    return unless_clean(process, s, correct, renoise(process, clean, s))


def midpoint_rule(denoise: Denoiser, process: Process, clean: Clean, t: Array, middle: Array, s: Array) -> Array:
    """x_s by the slope at the time `middle`, which Euler reaches from clean at t: one more evaluation."""
    (_, tau_t), (c_s, tau_s) = straight(process, t), straight(process, s)

    def correct(x_s):
        change = slope(process, denoise(renoise(process, clean, middle), middle)) - slope(process, clean)
        return x_s + c_s * (tau_s - tau_t) * change

    return unless_clean(process, s, correct, renoise(process, clean, s))


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
        return State(trapezoid(denoise, process, denoise(carry.x, t), t, s))

    return Sampler(start, step, order=2, evaluations=2)


def midpoint() -> Sampler:
    """The midpoint rule on dy/dtau: y_s = y_t + (tau_s - tau_t) d_m, d_m at tau_m = (tau_t + tau_s) / 2 after Euler's step.

    Runge 1895; Karras et al. 2022 (arXiv:2206.00364), appendix D.2, algorithm 3 with alpha = 1/2. On the flow it is the
    midpoint rule in t. Order 2, two evaluations, deterministic; a step into sigma(s) = 0 is Euler's, with one. On Gaussian data
    its order is 3: there y' = g y with g = tau / (std^2 + tau^2) (k = 0, mean 0), and the leading error, dtau^3 y times
    g''/24 + g g'/4 + g^3/6, is 0. It costs as much as Heun's method, and is better in practice on data that are nearly Gaussian.
    """

    def step(denoise, process, carry, t, s, keys):
        return State(midpoint_rule(denoise, process, denoise(carry.x, t), t, halfway(process, t, s), s))

    return Sampler(start, step, order=2, evaluations=2)


def dpm_2() -> Sampler:
    """The midpoint rule on dy/dtau with its stage at the middle of log tau, tau_m = sqrt(tau_t tau_s).

    k-diffusion's DPM2 (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn, the middle of log sigma in place of
    sigma_s). For k = 0, log tau = -lambda, it is DPM-Solver-2 of Lu et al. 2022 (arXiv:2206.00927, algorithm 1); where k = 1,
    as on the flow, it works with the velocity and dpm_solver_2 with eps. The stage is off the middle of tau by O(dtau^2):
    order 2, two evaluations, deterministic; a step into sigma(s) = 0 is Euler's, with one. For Karras's and exponential grids.
    """

    def step(denoise, process, carry, t, s, keys):
        # A step into tau = 0 is Euler's and does not use the middle.
        tau_t, tau_s = (straight(process, u)[1] for u in (t, s))
        middle = time_of_tau(process, jnp.where(tau_s > 0, jnp.sqrt(tau_t * tau_s), tau_t))
        return State(midpoint_rule(denoise, process, denoise(carry.x, t), t, middle, s))

    return Sampler(start, step, order=2, evaluations=2)


def rk4() -> Sampler:
    """Kutta's classical fourth-order method on dy/dtau: y_s = y_t + (tau_s - tau_t) (d_1 + 2 d_2 + 2 d_3 + d_4) / 6.

    Kutta 1901. d_1 at t, d_2 and d_3 at the middle of tau, d_4 at s. Order 4, four evaluations, deterministic; a step
    into sigma(s) = 0 is Euler's, with one. For references and inversion, where many small steps are affordable: below
    40 evaluations the multistep methods are better.
    """

    def step(denoise, process, carry, t, s, keys):
        return State(classical(denoise, process, denoise(carry.x, t), t, halfway(process, t, s), s))

    return Sampler(start, step, order=4, evaluations=4)


def ddim(eta: float = 0.0) -> Sampler:
    """DDIM: x_s = alpha_s x + sqrt(sigma_s^2 - v) eps + sqrt(v) z with v = eta^2 sigma_s^2 (1 - SNR_t / SNR_s).

    Song et al. 2021 (arXiv:2010.02502), equations 12 and 16, for any alpha and sigma. eta = 0 is deterministic and of
    order 1; eta = 1 is DDPM's ancestral sampling with the smaller posterior variance (Ho et al. 2020, section 3.2). One
    evaluation. The usual choice for eps and v networks at 50 steps; on a rising grid it is DDIM inversion. Raises
    ValueError unless 0 <= eta <= 1.
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
