"""Exact denoisers: data distributions whose E[x | x_t] and whose probability-flow endpoints have a closed form.

    E[x | x_t] = mean + cov alpha (alpha^2 cov + sigma^2)^-1 (x_t - alpha mean)          of a Gaussian

With them the error of a sampler is measured against the truth and not against another sampler. Tests and studies share them. Arrays are
[B, D]. Denoisers are traceable; endpoints are computed on the host in double precision.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process, per_row


class Gaussian(NamedTuple):
    """x ~ N(mean [D], rotation diag(std [D])^2 rotation^T)."""

    mean: np.ndarray
    std: np.ndarray
    rotation: np.ndarray

    def denoiser(self, process: Process) -> Denoiser:
        """E[x | x_t] = mean + cov alpha (alpha^2 cov + sigma^2)^-1 (x_t - alpha mean)."""

        def denoise(x_t, t):
            t = jnp.asarray(t, x_t.dtype)
            alpha, sigma = per_row(process.alpha(t), x_t), per_row(process.sigma(t), x_t)
            mean, std, rotation = (jnp.asarray(a, x_t.dtype) for a in self)
            residual = (x_t - alpha * mean) @ rotation
            shared = residual / (alpha**2 * std**2 + sigma**2)
            return Clean(mean + (alpha * std**2 * shared) @ rotation.T, (sigma * shared) @ rotation.T)

        return denoise

    def endpoint(self, process: Process, x_t: np.ndarray, t: float, s: float) -> np.ndarray:
        """x_s f64[B, D] on the probability-flow path through x_t: each principal axis is scaled by std(x_s) / std(x_t)."""
        (a_t, s_t), (a_s, s_s) = (numbers(process, u) for u in (t, s))
        scale = np.sqrt((a_s**2 * self.std**2 + s_s**2) / (a_t**2 * self.std**2 + s_t**2))
        return a_s * self.mean + ((x_t - a_t * self.mean) @ self.rotation * scale) @ self.rotation.T


class Mixture(NamedTuple):
    """The product of D one-dimensional Gaussian mixtures, turned by a rotation: its axes flow separately.

    centers and weights are [D, K], std is one number. In D = 2 these are K^2 round components.
    """

    centers: np.ndarray
    weights: np.ndarray
    std: float
    rotation: np.ndarray

    def denoiser(self, process: Process) -> Denoiser:
        """E[x | x_t] by the responsibilities of the components, axis by axis."""

        def denoise(x_t, t):
            t = jnp.asarray(t, x_t.dtype)
            alpha, sigma = per_row(process.alpha(t), x_t)[..., None], per_row(process.sigma(t), x_t)[..., None]
            centers, weights, rotation = (
                jnp.asarray(a, x_t.dtype) for a in (self.centers, self.weights, self.rotation)
            )
            variance = alpha**2 * self.std**2 + sigma**2
            residual = (x_t @ rotation)[..., None] - alpha * centers
            part = jax.nn.softmax(jnp.log(weights) - 0.5 * residual**2 / variance)
            x = jnp.sum(part * (centers + alpha * self.std**2 * residual / variance), -1)
            eps = jnp.sum(part * sigma * residual / variance, -1)
            return Clean(x @ rotation.T, eps @ rotation.T)

        return denoise

    def endpoint(self, process: Process, x_t: np.ndarray, t: float, s: float) -> np.ndarray:
        """x_s f64[B, D] on the probability-flow path: in one dimension the flow keeps quantiles, F_s(x_s) = F_t(x_t)."""
        (a_t, s_t), (a_s, s_s) = (numbers(process, u) for u in (t, s))

        def cdf(y, alpha, sigma):
            scale = np.sqrt(alpha**2 * self.std**2 + sigma**2)
            with jax.enable_x64(True):
                below = np.asarray(ndtr(jnp.asarray((y[..., None] - alpha * self.centers) / scale, jnp.float64)))
            return np.sum(self.weights * below, -1)

        quantile = cdf(x_t @ self.rotation, a_t, s_t)
        reach = a_s * np.abs(self.centers).max() + 10 * np.sqrt(a_s**2 * self.std**2 + s_s**2)
        low, high = np.full_like(x_t, -reach), np.full_like(x_t, reach)
        for _ in range(80):
            middle = 0.5 * (low + high)
            below = cdf(middle, a_s, s_s) < quantile
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return 0.5 * (low + high) @ self.rotation.T


def numbers(process: Process, t: float) -> tuple[float, float]:
    """alpha and sigma at t as double-precision Python floats."""
    with jax.enable_x64(True):
        t = jnp.asarray(t, jnp.float64)
        return float(process.alpha(t)), float(process.sigma(t))


def turn(angle: float) -> np.ndarray:
    """The 2 x 2 rotation by an angle in radians."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


GAUSSIAN = Gaussian(np.array([0.7, -0.4]), np.array([1.1, 0.35]), turn(0.5))
MIXTURE = Mixture(np.array([[-1.0, 0.8], [-0.5, 1.0]]), np.array([[0.4, 0.6], [0.7, 0.3]]), 0.4, turn(0.4))
