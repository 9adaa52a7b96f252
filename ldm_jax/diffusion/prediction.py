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

v, flow and edm are regular at both ends; eps and score say nothing about x where alpha = 0, and x says nothing about
eps where sigma = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.process import Process, coefficients, per_row, prior_std


class Clean(NamedTuple):
    """The estimate of the clean data and of the noise in x_t, both of x_t's shape: x_t = alpha x + sigma eps.

    log_var is None, or the log-variance of the step that a network with learned variance proposes.
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


def to_clean(kind: str, process: Process, output: Array, x_t: Array, t: Array) -> Clean:
    """The network's output [B, ...] at x_t [B, ...] and t (scalar or [B]) as Clean. ValueError if the shapes differ."""
    if output.shape != x_t.shape:
        raise ValueError(f"network output has shape {output.shape}, expected that of x_t, {x_t.shape}")
    alpha, sigma, a, b, d = (per_row(c, x_t) for c in system(kind, process, jnp.asarray(t, x_t.dtype)))
    return Clean((b * x_t - sigma * output) / d, (alpha * output - a * x_t) / d)


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
