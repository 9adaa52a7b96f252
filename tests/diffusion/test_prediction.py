"""Predictions: every kind x every process is an identity, and velocities and scores agree with autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import prediction as Q
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.prediction import Clean
from tests.helpers import GAUSSIAN

T = np.array([0.05, 0.4, 0.7, 0.95])


def draw():
    x, eps = np.random.default_rng(0).standard_normal((2, 4, 3, 2))
    return jnp.asarray(x), jnp.asarray(eps)


@pytest.mark.parametrize("name", sorted(P.PROCESSES))
@pytest.mark.parametrize("kind", sorted(Q.PREDICTIONS))
def test_to_clean_of_target_is_the_identity(kind, name):
    process = P.PROCESSES[name]()
    with jax.enable_x64(True):
        x, eps = draw()
        t = jnp.asarray(T)
        clean = Q.to_clean(kind, process, Q.target(kind, process, x, eps, t), P.corrupt(process, x, eps, t), t)
        np.testing.assert_allclose(clean.x, x, atol=1e-9)
        np.testing.assert_allclose(clean.eps, eps, atol=1e-9)


@pytest.mark.parametrize("kind", ["v", "flow", "edm"])
def test_regular_kinds_are_finite_at_both_ends_of_the_flow(kind):
    x, eps = (a[:2].astype(jnp.float32) for a in draw())
    t, process = jnp.asarray([0.0, 1.0]), P.flow()
    clean = Q.to_clean(kind, process, Q.target(kind, process, x, eps, t), P.corrupt(process, x, eps, t), t)
    np.testing.assert_allclose(clean.x, x, atol=1e-6)
    np.testing.assert_allclose(clean.eps, eps, atol=1e-6)


def test_targets_are_the_published_ones():
    x, eps = (a.astype(jnp.float32) for a in draw())
    process, t = P.vp_linear(), 0.3
    alpha, sigma = process.alpha(jnp.float32(t)), process.sigma(jnp.float32(t))
    for kind, want in {
        "eps": eps,
        "x": x,
        "v": alpha * eps - sigma * x,
        "flow": eps - x,
        "score": -eps / sigma,
    }.items():
        np.testing.assert_allclose(Q.target(kind, process, x, eps, t), want, rtol=1e-5, atol=1e-6, err_msg=kind)


def test_edm_is_the_preconditioning_of_karras_table_1():
    process, sd = P.edm(), 0.5
    output, x_t = (a.astype(jnp.float32) for a in draw())
    t = jnp.asarray(T, jnp.float32)
    sigma = P.per_row(process.sigma(t), x_t)
    skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / jnp.sqrt(sigma**2 + sd**2)
    np.testing.assert_allclose(
        Q.to_clean("edm", process, output, x_t, t).x, skip * x_t + out * output, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(Q.input_scale("edm", process, t), 1 / np.hypot(process.sigma(t), sd), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(P.PROCESSES))
def test_velocity_is_the_finite_difference_along_the_path(name):
    process, h = P.PROCESSES[name](), 1e-6
    with jax.enable_x64(True):
        x, eps = draw()
        t = jnp.asarray(T) + 1e-4
        slope = (P.corrupt(process, x, eps, t + h) - P.corrupt(process, x, eps, t - h)) / (2 * h)
        np.testing.assert_allclose(Q.velocity(process, Clean(x, eps), t), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vp_linear", "flow", "edm"])
def test_score_of_the_exact_denoiser_is_the_gradient_of_the_log_density(name):
    process, t = P.PROCESSES[name](), 0.4
    with jax.enable_x64(True):
        alpha, sigma = process.alpha(jnp.asarray(t)), process.sigma(jnp.asarray(t))
        cov = alpha**2 * GAUSSIAN.rotation @ np.diag(GAUSSIAN.std**2) @ GAUSSIAN.rotation.T + sigma**2 * np.eye(2)
        x_t = jnp.asarray([[0.3, -1.0], [2.0, 0.5]])

        def log_density(row):
            residual = row - alpha * GAUSSIAN.mean
            return -0.5 * residual @ jnp.linalg.solve(cov, residual)

        score = Q.score(process, GAUSSIAN.denoiser(process)(x_t, t), t)
        np.testing.assert_allclose(score, jax.vmap(jax.grad(log_density))(x_t), rtol=1e-8)


def test_an_unknown_kind_and_a_wrong_shape_are_named():
    x = jnp.zeros((2, 4))
    with pytest.raises(ValueError, match="prediction kind is 'noise'"):
        Q.target("noise", P.flow(), x, x, 0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), expected that of x_t, \(2, 4\)"):
        Q.to_clean("eps", P.flow(), jnp.zeros((2, 8)), x, 0.5)
