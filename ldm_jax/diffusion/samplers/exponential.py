"""Quadrature of the exponential integrators: what multistep, singlestep and adaptive samplers share.

With lambda = log(alpha / sigma), half the log-SNR, and h = lambda_s - lambda_t, the exact solution from t to s is

    x_s = (sigma_s / sigma_t) x_t + alpha_s h int_0^1 exp(-h (1 - u)) x(lambda_t + u h) du      data prediction
    x_s = (alpha_s / alpha_t) x_t - sigma_s h int_0^1 exp(h (1 - u)) eps(lambda_t + u h) du     noise prediction

(Lu et al. 2022, DPM-Solver++, arXiv:2211.01095, equation 8; DPM-Solver, arXiv:2206.00927, equation 3.4). A method
interpolates by a polynomial through its values at nodes u_j, of which u_0 = 0 is t itself. The constant part, in both
formulas, is alpha_s x_0 + sigma_s eps_0 (ode.renoise), regular where alpha_t or sigma_s is 0. The weights of the rest,

    alpha_s sum_j w_j (x_j - x_0)    or    sigma_s sum_j w_j (eps_j - eps_0),

come from the moments M_k(h) = h int_0^1 exp(-h (1 - u)) u^k du: M_k(h) for data, M_k(-h) for noise.
"""

import math
from typing import Literal

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process, inverse_log_snr, log_snr

# What is interpolated: the clean data or the noise, by its name in Clean.
Kind = Literal["x", "eps"]


def level(process: Process, t: Array) -> Array:
    """lambda = log(alpha / sigma) at t: -inf where alpha = 0, inf where sigma = 0."""
    return 0.5 * log_snr(process, t)


def time_at(process: Process, value: Array) -> Array:
    """The t at which lambda is value, of any shape."""
    return inverse_log_snr(process, 2 * value)


def estimate(kind: Kind, clean: Clean) -> Array:
    """Clean's x or eps."""
    return clean.x if kind == "x" else clean.eps


def scale(kind: Kind, process: Process, s: Array) -> Array:
    """What multiplies the weighted differences: alpha(s) for data, sigma(s) for noise."""
    return process.alpha(s) if kind == "x" else process.sigma(s)


def moments(kind: Kind, h: Array, n: int) -> tuple[Array, ...]:
    """M_0 .. M_{n-1} at h (data) or at -h (noise), each of h's shape.

    M_k(h) = h k! phi_{k+1}(-h), by M_0 = 1 - exp(-h) and M_k = 1 - (k / h) M_{k-1} (Hochbruck & Ostermann 2010,
    "Exponential integrators", equations 2.10-2.11). That cancels for |h| < 1, where the last one is its Taylor series,
    h sum_j k! / (k + j + 1)! (-h)^j, and the rest follow downwards by the same relation. h = inf gives 1 throughout.
    """
    h = h if kind == "x" else -h
    first = -jnp.expm1(-h)
    small = jnp.abs(h) < 1
    large_h, small_h = jnp.where(small, 1, h), jnp.where(small, h, 0)
    upward = [first]
    for k in range(1, n):
        upward.append(1 - k / large_h * upward[-1])
    series = jnp.zeros_like(h)
    for j in reversed(range(18)):
        series = math.factorial(n - 1) / math.factorial(n + j) - small_h * series
    downward = [small_h * series]
    for k in range(n - 1, 1, -1):
        downward.append(small_h * (1 - downward[-1]) / k)
    return first, *(jnp.where(small, *both) for both in zip(reversed(downward), upward[1:]))


def weights(nodes: Array, usable: Array, moments: tuple[Array, ...]) -> Array:
    """w f[J]: int kernel(u) P(u) du = M_0 f_0 + sum_j w_j (f_j - f_0), P the polynomial through f_0 at 0 and f_j at nodes.

    nodes is f[J], distinct and not 0; a node that is not usable (bool[J]) is left out of P and has weight 0, so that the
    order falls by one. moments are the kernel's first J + 1: `moments` for exponential integrators, 1 / (k + 1) for
    Adams-Bashforth. By Lagrange's basis L_j(u) = (u / u_j) prod_{i != j} (u - u_i) / (u_j - u_i).
    """
    n = nodes.shape[0]
    nodes = jnp.where(usable, nodes, 2 + jnp.arange(n))
    # Row j holds the coefficients of u, u^2, ... in L_j.
    basis = jnp.zeros((n, n), nodes.dtype).at[:, 0].set(1 / nodes)
    for i in range(n):
        skip = ~usable[i] | (jnp.arange(n) == i)
        raised = jnp.pad(basis[:, :-1], ((0, 0), (1, 0)))
        product = (raised - nodes[i] * basis) / jnp.where(skip, 1, nodes - nodes[i])[:, None]
        basis = jnp.where(skip[:, None], basis, product)
    return jnp.where(usable, jnp.sum(basis * jnp.stack(moments[1 : n + 1]), -1), 0)


def combine(w: Array, values: Array, origin: Array) -> Array:
    """sum_j w_j (f_j - f_0) for w f[J], values f_j [J, B, ...] and origin f_0 [B, ...]."""
    return sum(w[j] * (values[j] - origin) for j in range(values.shape[0]))
