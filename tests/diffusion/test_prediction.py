"""Predictions: every kind x every process is an identity, and velocities and scores agree with autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import prediction as Q
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.denoiser import make_denoiser, make_pair
from ldm_jax.diffusion.exact import GAUSSIAN
from ldm_jax.diffusion.prediction import Clean

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


def test_trigflow_is_edm_with_its_sign_turned_and_v_of_unit_data():
    x, eps = (a.astype(jnp.float32) for a in draw())
    t = jnp.asarray(T, jnp.float32)
    for sd in (0.5, 1.0):
        angle = P.per_row(0.5 * np.pi * t, x)
        published = jnp.cos(angle) * eps - jnp.sin(angle) * x / sd
        np.testing.assert_allclose(-Q.target("edm", P.trig(sd), x, eps, t), published, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(Q.input_scale("edm", P.trig(sd), t), 1 / sd, rtol=1e-6)
    np.testing.assert_allclose(Q.target("v", P.trig(1.0), x, eps, t), published, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(P.PROCESSES))
def test_velocity_is_the_finite_difference_along_the_path(name):
    process, h = P.PROCESSES[name](), 1e-6
    with jax.enable_x64(True):
        x, eps = draw()
        t = jnp.asarray(T) + 1e-4
        slope = (P.corrupt(process, x, eps, t + h) - P.corrupt(process, x, eps, t - h)) / (2 * h)
        np.testing.assert_allclose(Q.velocity(process, Clean(x, eps), t), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vp_linear", "sub_vp", "ve", "flow", "edm"])
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


@pytest.mark.parametrize("name", sorted(P.PROCESSES))
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_reverse_sde_has_the_marginals_of_the_process_for_every_eta(eta, name):
    """The drift of a Gaussian is affine, A x + b, so its moments obey  d mean = A mean + b,  d cov = A cov + cov A^T
    - eta^2 g^2  in t, which falls; both must be those of alpha x + sigma eps."""
    process, h = P.PROCESSES[name](), 1e-6
    data = GAUSSIAN.rotation @ np.diag(GAUSSIAN.std**2) @ GAUSSIAN.rotation.T
    with jax.enable_x64(True):

        @jax.jit
        def drift(x, t):
            out, diffusion = Q.reverse_sde(process, GAUSSIAN.denoiser(process)(x[None], t), t, eta)
            return out[0], diffusion

        def cov(t):
            return process.alpha(t) ** 2 * data + process.sigma(t) ** 2 * np.eye(2)

        def slope(f, t):
            return (f(t + h) - f(t - h)) / (2 * h)

        for t in jnp.asarray(T) + 1e-4:
            mean = process.alpha(t) * GAUSSIAN.mean
            out, diffusion = drift(mean, t)
            a = jax.jacfwd(lambda x, t: drift(x, t)[0])(mean, t)
            np.testing.assert_allclose(out, slope(process.alpha, t) * GAUSSIAN.mean, rtol=1e-5, atol=1e-7)
            moved = a @ cov(t) + cov(t) @ a.T - diffusion**2 * np.eye(2)
            np.testing.assert_allclose(moved, slope(cov, t), rtol=1e-4, atol=1e-6)


def test_the_reverse_sde_without_noise_is_the_probability_flow_ode_and_with_it_song_equation_6():
    process = P.vp_linear()
    x, eps = (a.astype(jnp.float32) for a in draw())
    t, clean = jnp.asarray(T, jnp.float32), Clean(x, eps)
    drift, diffusion = Q.reverse_sde(process, clean, t, 0.0)
    np.testing.assert_array_equal(drift, Q.velocity(process, clean, t))
    np.testing.assert_array_equal(diffusion, 0.0)
    forward, g = P.forward_sde(process, P.corrupt(process, x, eps, t), t)
    drift, diffusion = jax.jit(lambda eta: Q.reverse_sde(process, clean, t, eta))(1.0)
    want = forward - P.per_row(g**2, x) * Q.score(process, clean, t)
    np.testing.assert_allclose(drift, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(diffusion, g)


@pytest.mark.parametrize("name", sorted(P.PROCESSES))
def test_the_posterior_of_a_step_is_that_of_two_gaussians(name):
    """q(x_s | x_t, x): the prior N(alpha_s x, sigma_s^2) times the likelihood N(x_t; a x_s, b), b = beta."""
    process = P.PROCESSES[name]()
    with jax.enable_x64(True):
        x, eps = draw()
        t, s = jnp.asarray(T), jnp.asarray(T) - 0.03
        x_t = P.corrupt(process, x, eps, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((process.alpha(u), process.sigma(u)) for u in (t, s))
        a = alpha_t / alpha_s
        b = sigma_t**2 - a**2 * sigma_s**2
        precision = 1 / sigma_s**2 + a**2 / b
        mean = (P.per_row(alpha_s / sigma_s**2, x) * x + P.per_row(a / b, x) * x_t) / P.per_row(precision, x)
        np.testing.assert_allclose(Q.posterior_mean(process, Clean(x, eps), t, s), mean, rtol=1e-7, atol=1e-9)
        for v, want in {
            -1.0: -np.log(precision),
            1.0: np.log(b),
            0.5: 0.25 * -np.log(precision) + 0.75 * np.log(b),
        }.items():
            out = Q.step_log_var(process, jnp.full_like(x, v), t, s)
            np.testing.assert_allclose(out, P.per_row(want, x) * jnp.ones_like(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sorted(P.BETAS))
def test_the_learned_range_of_a_table_is_that_of_nichol_and_dhariwal(name):
    betas = P.BETAS[name]()
    bar = np.cumprod(1 - betas)
    small = betas * (1 - np.append(1.0, bar[:-1])) / (1 - bar)
    small = np.log(np.append(small[1], small[1:]))
    v = np.random.default_rng(0).uniform(-1, 1, (1000, 3))
    want = np.log(betas)[:, None] * (v + 1) / 2 + small[:, None] * (1 - v) / 2
    i = np.arange(1000)
    for wide, rtol, atol in ((True, 1e-8, 1e-8), (False, 0, 2e-3)):
        with jax.enable_x64(wide):
            t, s = jnp.asarray((i + 1) / 1000, float), jnp.asarray(i / 1000, float)
            out = jax.jit(lambda v, t, s: Q.step_log_var(P.discrete_vp(name), v, t, s))(jnp.asarray(v, float), t, s)
            np.testing.assert_allclose(out, want, rtol=rtol, atol=atol)


def test_a_step_to_clean_data_without_a_table_has_a_finite_log_variance():
    v = jnp.asarray([[-1.0], [0.0], [1.0]])
    np.testing.assert_allclose(Q.step_log_var(P.flow(), v, 0.3, 0.0), 2 * np.log(0.3), rtol=1e-5)


def test_learned_variance_is_carried_raw_by_every_route():
    process, t = P.discrete_vp(), jnp.asarray([0.2, 0.7])
    x_t = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    cond, uncond = {"label": jnp.asarray([1.0, 2.0])}, {"label": jnp.zeros(1)}

    def apply(params, x, time, cond):
        return jnp.concatenate([0.1 * x, jnp.tanh(x) + cond["label"][:, None, None, None]], -1)

    plain = make_denoiser(lambda *args: apply(*args)[..., :3], None, process, "eps", cond)(x_t, t)
    assert plain.log_var is None
    learned = make_denoiser(apply, None, process, "eps", cond, learned_variance=True)(x_t, t)
    told, untold = make_pair(apply, None, process, "eps", cond, uncond, learned_variance=True)(x_t, t)
    for clean, label in ((learned, cond["label"]), (told, cond["label"]), (untold, jnp.zeros(2))):
        np.testing.assert_allclose(clean.x, plain.x, rtol=1e-6)
        np.testing.assert_allclose(clean.eps, plain.eps, rtol=1e-6)
        np.testing.assert_allclose(clean.log_var, jnp.tanh(x_t) + label[:, None, None, None], rtol=1e-6)


def test_an_unknown_kind_and_a_wrong_shape_are_named():
    x = jnp.zeros((2, 4))
    with pytest.raises(ValueError, match="prediction kind is 'noise'"):
        Q.target("noise", P.flow(), x, x, 0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), expected that of x_t, \(2, 4\)"):
        Q.to_clean("eps", P.flow(), jnp.zeros((2, 8)), x, 0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), expected with learned variance twice .* x_t, \(2, 8\)"):
        Q.to_clean("eps", P.flow(), x, x, 0.5, learned_variance=True)
