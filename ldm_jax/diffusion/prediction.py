"""What a network predicts, and the conversions between all kinds of prediction.

Every kind is a linear combination  output = a x + b eps  of the clean data and the noise. With
x_t = alpha x + sigma eps that is a 2 x 2 system of determinant  d = alpha b - sigma a, hence

    x = (b x_t - sigma output) / d,        eps = (alpha output - a x_t) / d,

so a kind is one line that gives (a, b). `Clean` is the only thing that samplers and guidance ever see.

    kind    output                                   d                   source
    eps     eps                                      alpha               Ho et al. 2020 (arXiv:2006.11239), eq. 14
    x       x                                        -sigma
    v       alpha eps - sigma x                      alpha^2 + sigma^2   Salimans & Ho 2022 (arXiv:2202.00512), app. D
    flow    eps - x                                  alpha + sigma       Liu et al. 2022 (arXiv:2209.03003), eq. 1
    score   -eps / sigma = grad log p(x_t | x)       -alpha / sigma      Song et al. 2021 (arXiv:2011.13456)
    edm     (sigma x - alpha sd^2 eps) / (sd std)    -std / sd           Karras et al. 2022 (arXiv:2206.00364), eq. 7-8,
                                                                         written for any alpha; sd = sigma_data,
                                                                         std^2 = alpha^2 sd^2 + sigma^2

v, flow and edm are regular at both ends. eps and score do not determine x where alpha = 0, and x does not determine
eps where sigma = 0.

A network with learned variance (Nichol & Dhariwal 2021, arXiv:2102.09672) outputs twice the channels, the prediction
and then v, which places the variance of a step t -> s between its two extremes, see `step_log_var`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.process import Process, coefficients, drift_diffusion, log_snr, per_row, prior_std


class Clean(NamedTuple):
    """The estimate of the clean data and of the noise in x_t, both of x_t's shape: x_t = alpha x + sigma eps.

    log_var is None, or the raw v of a network with learned variance, of x_t's shape and meant to lie in [-1, 1]: a
    Denoiser depends on t alone, so the sampler turns v into the log-variance of a step t -> s by step_log_var.
    """

    x: Array
    eps: Array
    log_var: Array | None = None


def _edm(alpha: Array, sigma: Array, sigma_data: float) -> tuple[Array, Array]:
    std = jnp.sqrt((alpha * sigma_data) ** 2 + sigma**2)
    return sigma / (sigma_data * std), -alpha * sigma_data / std


Combination = Callable[[Array, Array, float], tuple[Array, Array]]

PREDICTIONS: dict[str, Combination] = {
    "eps": lambda alpha, sigma, sigma_data: (jnp.zeros_like(alpha), jnp.ones_like(alpha)),
    "x": lambda alpha, sigma, sigma_data: (jnp.ones_like(alpha), jnp.zeros_like(alpha)),
    "v": lambda alpha, sigma, sigma_data: (-sigma, alpha),
    "flow": lambda alpha, sigma, sigma_data: (-jnp.ones_like(alpha), jnp.ones_like(alpha)),
    "score": lambda alpha, sigma, sigma_data: (jnp.zeros_like(alpha), -1 / sigma),
    "edm": _edm,
}


def system(kind: str, process: Process, t: Array) -> tuple[Array, Array, Array, Array, Array]:
    """(alpha, sigma, a, b, d) at t: output = a x + b eps, d = alpha b - sigma a. ValueError for an unknown kind."""
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction kind is {kind!r}, expected one of {sorted(PREDICTIONS)}")
    alpha, sigma = process.alpha(t), process.sigma(t)
    a, b = PREDICTIONS[kind](alpha, sigma, process.sigma_data)
    return alpha, sigma, a, b, alpha * b - sigma * a


def target(kind: str, process: Process, x: Array, eps: Array, t: Array) -> Array:
    """What a perfect network of this kind outputs for x, eps of shape [B, ...] at t, a scalar or [B]."""
    _, _, a, b, _ = system(kind, process, jnp.asarray(t, x.dtype))
    return per_row(a, x) * x + per_row(b, x) * eps


def split_variance(output: Array, shape: tuple[int, ...], learned_variance: bool) -> tuple[Array, Array | None]:
    """(prediction, v), both of x_t's shape [B, ..., C], from an output [B, ..., 2C]; (output, None) without learned
    variance. ValueError if the output has any other shape."""
    expected = (*shape[:-1], 2 * shape[-1]) if learned_variance else tuple(shape)
    if output.shape != expected:
        twice = "with learned variance twice the channels" if learned_variance else "that"
        raise ValueError(f"network output has shape {output.shape}, expected {twice} of x_t, {expected}")
    return tuple(jnp.split(output, 2, -1)) if learned_variance else (output, None)


def to_clean(kind: str, process: Process, output: Array, x_t: Array, t: Array, learned_variance: bool = False) -> Clean:
    """The network's output [B, ...] at x_t [B, ...] and t (scalar or [B]) as Clean.

    With learned_variance the output has twice the channels (last axis), the prediction and then v, which Clean.log_var
    carries. Raises ValueError if the shapes do not fit.
    """
    output, v = split_variance(output, x_t.shape, learned_variance)
    alpha, sigma, a, b, d = (per_row(c, x_t) for c in system(kind, process, jnp.asarray(t, x_t.dtype)))
    return Clean((b * x_t - sigma * output) / d, (alpha * output - a * x_t) / d, v)


def check_times(kind: str, process: Process, times: Array) -> None:
    """ValueError where a network is asked at a time [n] at which it says nothing about x: alpha = 0 and kind eps or score.

    x = (x_t - sigma eps) / alpha is 0 / 0 there: a table of zero terminal SNR, a flow at t = 1 (Lin et al. 2024,
    arXiv:2305.08891, section 3.3: train v, or x).
    """
    times = np.asarray(times)
    silent = np.asarray(process.alpha(jnp.asarray(times))) == 0
    if kind in ("eps", "score") and silent.any():
        raise ValueError(
            f"prediction is {kind}, and there is nothing but noise at t = {times[silent][0]:g}, where alpha is 0: of such a "
            "network no image can be drawn from there. Expected prediction v or x, or a grid that begins below"
        )


def input_scale(kind: str, process: Process, t: Array) -> Array:
    """c_in: what x_t is multiplied by before the network. 1 / std(x_t) for 'edm' (Karras et al. 2022), else 1."""
    return 1 / prior_std(process, t) if kind == "edm" else jnp.ones_like(t)


def velocity(process: Process, clean: Clean, t: Array) -> Array:
    """dx_t/dt of the probability-flow ODE, alpha'(t) x + sigma'(t) eps. Song et al. 2021, equation 13, regrouped."""
    _, _, dalpha, dsigma = coefficients(process, jnp.asarray(t, clean.x.dtype))
    return per_row(dalpha, clean.x) * clean.x + per_row(dsigma, clean.x) * clean.eps


def score(process: Process, clean: Clean, t: Array) -> Array:
    """grad log p_t(x_t) = -eps / sigma(t), by Tweedie's formula."""
    return -clean.eps / per_row(process.sigma(jnp.asarray(t, clean.x.dtype)), clean.eps)


def reverse_sde(process: Process, clean: Clean, t: Array, eta: Array = 1.0) -> tuple[Array, Array]:
    """Drift [B, ...] and diffusion (of t's shape) of  dx = [f x - (1 + eta^2) / 2 g^2 score] dt + eta g dw,  t falling.

    Every eta >= 0 (a number or traced) has the marginals of the process: 1 is Song et al. 2021 (arXiv:2011.13456),
    equation 6; 0 their probability-flow ODE, equation 13, whose drift is `velocity`; the family is that of Zhang & Chen
    2022 (arXiv:2204.13902), section 2. t is a scalar or [B]; infinite where alpha = 0, undefined where sigma = 0.
    """
    _, g2 = drift_diffusion(process, jnp.asarray(t, clean.x.dtype))
    fresh = per_row(0.5 * eta**2 * g2, clean.x)
    return velocity(process, clean, t) - fresh * score(process, clean, t), eta * jnp.sqrt(g2)


def posterior_mean(process: Process, clean: Clean, t: Array, s: Array) -> Array:
    """Mean of q(x_s | x_t, x) for s < t, scalars or [B]:  alpha_s x + sigma_s sqrt(SNR_t / SNR_s) eps.

    Ho et al. 2020 (arXiv:2006.11239), equation 7, in terms of x and eps and for any alpha and sigma.
    """
    t, s = (jnp.asarray(u, clean.x.dtype) for u in (t, s))
    kept = process.sigma(s) * jnp.exp(0.5 * (log_snr(process, t) - log_snr(process, s)))
    return per_row(process.alpha(s), clean.x) * clean.x + per_row(kept, clean.x) * clean.eps


def _log_variances(process: Process, t: Array, s: Array) -> tuple[Array, Array]:
    """log of the posterior variance sigma_s^2 (1 - SNR_t / SNR_s) and of beta = sigma_t^2 (1 - SNR_t / SNR_s)."""
    fresh = jnp.log(-jnp.expm1(log_snr(process, t) - log_snr(process, s)))
    return 2 * jnp.log(process.sigma(s)) + fresh, 2 * jnp.log(process.sigma(t)) + fresh


def step_log_var(process: Process, v: Array, t: Array, s: Array) -> Array:
    """Log-variance of a step t -> s < t from v [B, ...] in [-1, 1]:  (1 + v) / 2 log beta + (1 - v) / 2 log beta~.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 15. beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 is the
    variance of q(x_t | x_s), under VP 1 - alpha_t^2 / alpha_s^2, and beta~ = beta sigma_s^2 / sigma_t^2 that of
    q(x_s | x_t, x). beta~ is 0 where sigma_s is: there a table's second posterior variance, of the step from its entry 1
    to its entry 0, takes its place, as in the authors' code; without a table beta does. t, s are scalars or [B].
    """
    t, s = (jnp.asarray(u, v.dtype) for u in (t, s))
    small, large = _log_variances(process, t, s)
    if process.levels is None:
        least = large
    else:
        least, _ = _log_variances(process, *(jnp.asarray(i / process.levels, v.dtype) for i in (2, 1)))
    small = jnp.where(process.sigma(s) > 0, small, least)
    small, large = per_row(small, v), per_row(large, v)
    return small + 0.5 * (1 + v) * (large - small)
