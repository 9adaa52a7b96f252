"""Guidance by a gradient: the score is shifted by g = grad log p(y | x_t), which gives eps - sigma g and x + (sigma^2 / alpha) g.

classifier   p(y | x_t) by a classifier of noisy data               Dhariwal & Nichol 2021 (arXiv:2105.05233)
dps, pigdm   y = operator(x) + noise, by the denoiser's own x       Chung et al. 2023; Song et al. 2023
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.guidance.rows import dot, levels, over, root
from ldm_jax.diffusion.guidance.scales import Scale, at
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process, per_row

Operator = Callable[[Array], Array]


def _shift_score(process: Process, clean: Clean, g: Array, t: Array) -> Clean:
    """score + g: eps - sigma g and x + (sigma^2 / alpha) g. Where alpha = 0, x_t does not depend on y, and g is dropped."""
    alpha, sigma = levels(process, t, g)
    sigma = jnp.where(alpha > 0, sigma, 0)
    return clean._replace(x=clean.x + over(sigma**2, alpha) * g, eps=clean.eps - sigma * g)


def classifier(
    denoise: Denoiser, log_prob: Callable[[Array, Array], Array], process: Process, scale: Scale
) -> Denoiser:
    """Classifier guidance, eps - scale sigma grad log p(y | x_t), with the x that fits this eps.

    log_prob(x_t [B, ...], t [B]) -> [B] is log p(y | x_t) of each row, by a classifier of noisy data; log_prob contains y.
    Dhariwal & Nichol 2021 (arXiv:2105.05233), equation 14 and algorithm 2. scale 0 is denoise itself; 1 is exact, by
    Bayes' rule, where denoise and the classifier are exact. Raises ValueError for a log_prob of another shape.
    """

    def guided(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)

        def total(x: Array) -> Array:
            value = log_prob(x, jnp.broadcast_to(t, x.shape[:1]))
            if value.shape != x.shape[:1]:
                raise ValueError(f"log_prob has shape {value.shape}, expected {x.shape[:1]}, a number for each row")
            return jnp.sum(value)  # rows are independent: the gradient of the sum is that of each

        return _shift_score(process, denoise(x_t, t), at(scale, t, x_t) * jax.grad(total)(x_t), t)

    return guided


def _measure(
    denoise: Denoiser, operator: Operator, y: Array, x_t: Array, t: Array
) -> tuple[Clean, Array, Callable[[Array], tuple[Array]]]:
    """Clean, the residual y - A x and the pull-back v -> (d(A x) / dx_t)^T v, from one evaluation."""

    def measured(x: Array) -> tuple[Array, Clean]:
        clean = denoise(x, t)
        return operator(clean.x), clean

    value, pull, clean = jax.vjp(measured, x_t, has_aux=True)
    if y.shape != value.shape:
        raise ValueError(f"y has shape {y.shape}, expected that of operator(x), {value.shape}")
    return clean, y - value, pull


def dps(
    denoise: Denoiser, operator: Operator, y: Array, scale: Scale, process: Process, normalize: bool = False
) -> Denoiser:
    """Diffusion posterior sampling of y = A x + noise: the score moves by g = -(scale / 2) grad |y - A x(x_t)|^2.

    operator is A, any differentiable function f[B, ...] -> f[B, ...] of the clean estimate that acts on each row by itself; y has
    the shape of its output. The gradient goes through the network: one forward and one backward pass an evaluation. Chung et
    al. 2023 (arXiv:2209.14687), section 3.2; scale = 1 / std^2 for Gaussian noise of standard deviation std, 0 is
    denoise itself. normalize=True takes g = -scale grad |y - A x(x_t)| instead, the step size of their experiments.

    x gains (sigma^2 / alpha) g and eps loses sigma g, so any sampler will do. Their algorithm 1 instead takes an
    unguided step and subtracts zeta grad |y - A x|^2 from the state. A step of euler or ddim from t to s under this
    Denoiser is theirs with

        zeta = (scale / 2) sigma_t (alpha_s sigma_t / alpha_t - sigma_s);

    with normalize=True that is their zeta', where zeta = zeta' / |y - A x|. p(y | x_t) is taken at E[x | x_t], without the spread of x,
    so that a constant scale is too strong where there is much noise: let it depend on t, or use pigdm. Raises ValueError when y has
    another shape.
    """

    def guided(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean, residual, pull = _measure(denoise, operator, y, x_t, t)
        if normalize:
            residual = over(residual, root(dot(residual, residual)))
        return _shift_score(process, clean, at(scale, t, x_t) * pull(residual)[0], t)

    return guided


def pigdm(
    denoise: Denoiser,
    operator: Operator,
    y: Array,
    std: Array | float,
    process: Process,
    scale: Scale = 1.0,
    iterations: int = 1,
    tweedie: bool = False,
) -> Denoiser:
    """Pseudoinverse guidance of y = A x + std noise: g = scale (dx / dx_t)^T A^T (A C A^T + std^2)^-1 (y - A x(x_t)).

    C stands for Cov[x | x_t]. It is r^2 I with r^2 = sigma^2 sd^2 / (alpha^2 sd^2 + sigma^2), sd =
    process.sigma_data, exact for data N(m, sd^2 I): Song et al. 2023 (ICLR, openreview 9_gsMA8MRKQ). With tweedie=True
    it is (sigma^2 / alpha) dx / dx_t, exact for all Gaussian data: Boys et al. 2023 (arXiv:2310.06721), Finzi et al.
    2023 (arXiv:2306.07526). Unlike dps it needs no tuning: scale 1 is the posterior where C is exact; 0 is denoise itself.

    operator is linear and acts on each row by itself, f[B, ...] -> f[B, ...]. The inverse is `iterations` of conjugate gradients,
    row by row: exact after as many as A C A^T has distinct eigenvalues, 1 for a mask. One forward and one backward pass
    of the network, and with tweedie one more backward for each iteration. Raises ValueError for y of another shape and
    for iterations < 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected at least 1")

    def guided(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean, residual, pull = _measure(denoise, operator, y, x_t, t)
        transpose = jax.vjp(operator, clean.x)[1]
        alpha, sigma = levels(process, t, x_t)
        spread = sigma**2 * process.sigma_data**2 / ((alpha * process.sigma_data) ** 2 + sigma**2)

        def covariance(v: Array) -> Array:
            shared = over(sigma**2, alpha) * pull(v)[0] if tweedie else spread * transpose(v)[0]
            return operator(shared) + per_row(std, v) ** 2 * v

        solution = _conjugate_gradients(covariance, residual, iterations)
        return _shift_score(process, clean, at(scale, t, x_t) * pull(solution)[0], t)

    return guided


def _conjugate_gradients(matrix: Operator, b: Array, iterations: int) -> Array:
    """x with matrix(x) = b, for a matrix that is symmetric and positive on each row; rows are independent."""

    def step(_, carry):
        x, rest, direction = carry
        image = matrix(direction)
        length = over(dot(rest, rest), dot(direction, image))
        less = rest - length * image
        return x + length * direction, less, less + over(dot(less, less), dot(rest, rest)) * direction

    return jax.lax.fori_loop(0, iterations, step, (jnp.zeros_like(b), b, b))[0]
