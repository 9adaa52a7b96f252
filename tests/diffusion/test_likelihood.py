"""Likelihood and inversion against closed forms: log-densities, log-determinants, divergences, round trips."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ldm_jax.diffusion import grids
from ldm_jax.diffusion import likelihood as L
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.exact import GAUSSIAN, MIXTURE, Gaussian, numbers
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.samplers.ode import ddim
from ldm_jax.diffusion.samplers.sampler import row_keys

KEY = jax.random.key(0)
NOISE = np.random.default_rng(0).standard_normal((8, 2))
CENTRED = Gaussian(np.zeros(2), GAUSSIAN.std, GAUSSIAN.rotation)
FOUR = ("vp_linear", "ve", "flow", "edm")


def log_density(problem, process, x_t, t):
    """Closed-form log p_t(x_t) in nats, axis by axis."""
    alpha, sigma = numbers(process, t)
    y, variance = np.asarray(x_t, np.float64) @ problem.rotation, alpha**2 * problem.std**2 + sigma**2
    if isinstance(problem, Gaussian):
        return stats.norm.logpdf(y, alpha * problem.mean @ problem.rotation, np.sqrt(variance)).sum(-1)
    parts = problem.weights * stats.norm.pdf(y[..., None], alpha * problem.centers, np.sqrt(variance))
    return np.log(parts.sum(-1)).sum(-1)


def draw(problem, process, t, rows=8):
    """Rows of p_t in double precision."""
    rng, (alpha, sigma) = np.random.default_rng(1), numbers(process, t)
    if isinstance(problem, Gaussian):
        x = problem.mean + rng.standard_normal((rows, 2)) * problem.std @ problem.rotation.T
    else:
        component = [rng.choice(2, rows, p=p) for p in problem.weights]
        x = np.stack([c[k] for c, k in zip(problem.centers, component)], -1)
        x = (x + problem.std * rng.standard_normal((rows, 2))) @ problem.rotation.T
    return alpha * x + sigma * rng.standard_normal((rows, 2))


@pytest.mark.parametrize("process", sorted(P.PROCESSES))
def test_change_of_variables_is_of_order_four_and_ends_at_the_exact_determinant(process):
    process = P.PROCESSES[process]()
    with jax.enable_x64(True):
        finest = np.asarray(grids.kl_optimal(process, 32))[::-1]
        t, s = finest[[0, -1]]
        (a_t, s_t), (a_s, s_s) = numbers(process, t), numbers(process, s)
        scale = (a_s**2 * GAUSSIAN.std**2 + s_s**2) / (a_t**2 * GAUSSIAN.std**2 + s_t**2)
        x = draw(GAUSSIAN, process, t)
        run = jax.jit(lambda times: L.change_of_variables(GAUSSIAN.denoiser(process), process, jnp.asarray(x), times))
        errors = []
        for n in (8, 16, 32):
            x_s, log_det = run(grids.pad(finest[:: 32 // n], 32))
            errors.append([np.abs(log_det - 0.5 * np.log(scale).sum()).max(),
                           np.abs(x_s - GAUSSIAN.endpoint(process, x, t, s)).max() / np.hypot(a_s, s_s)])  # fmt: skip
        errors = np.array(errors)
        slopes = np.log2(errors[1] / errors[2])
        assert np.abs(slopes - 4).max() < 0.15, (slopes, errors)
        assert errors[2].max() < 5e-6
        undone = run(finest[::-1])[1]
        np.testing.assert_allclose(undone, -0.5 * np.log(scale).sum(), atol=2e-6)


@pytest.mark.parametrize("name", [*FOUR, "sub_vp"])
def test_bits_per_dim_of_a_gaussian_are_exact(name):
    """Each of 64 rows to 1e-3 against p at times[0], and their mean against the data's own density; single precision."""
    process = P.PROCESSES[name]()
    times = grids.kl_optimal(process, 32)[::-1]
    x = draw(CENTRED, process, float(times[0]), 64)
    log_p = jax.jit(lambda x, times: L.log_likelihood(CENTRED.denoiser(process), process, x, times))(
        jnp.asarray(x, jnp.float32), times
    )
    ours = L.bits_per_dim(log_p, 2)
    np.testing.assert_allclose(ours, L.bits_per_dim(log_density(CENTRED, process, x, float(times[0])), 2), atol=1e-3)
    clean = stats.multivariate_normal(cov=CENTRED.rotation @ np.diag(CENTRED.std**2) @ CENTRED.rotation.T).logpdf(x)
    assert ours.mean() == pytest.approx(L.bits_per_dim(clean, 2).mean(), abs=1e-3)


@pytest.mark.parametrize("name", [*FOUR, "vp_cosine"])
def test_log_density_of_a_mixture_is_that_of_the_closed_form(name):
    """p at times[0] = p_T(x_T) |det|: with the exact p_T in the place of the Gaussian prior, to 1e-5."""
    process = P.PROCESSES[name]()
    with jax.enable_x64(True):
        times = grids.kl_optimal(process, 64)[::-1]
        t, s = float(times[0]), float(times[-1])
        x = draw(MIXTURE, process, t)
        denoise = MIXTURE.denoiser(process)
        x_T, log_det = jax.jit(lambda x: L.change_of_variables(denoise, process, x, times))(jnp.asarray(x))
        exact = log_density(MIXTURE, process, x, t)
        np.testing.assert_allclose(x_T, MIXTURE.endpoint(process, x, t, s), atol=1e-5 * float(P.prior_std(process, s)))
        np.testing.assert_allclose(log_det + log_density(MIXTURE, process, x_T, s), exact, atol=1e-5)
        if name == "flow":  # alpha is 0 at the end: the prior is exact
            np.testing.assert_allclose(L.log_likelihood(denoise, process, jnp.asarray(x), times), exact, atol=1e-5)


def test_a_sharp_density_wants_steps_near_the_data():
    """std = 0.003 on EDM: 128 steps that are equal in log-SNR see it, as many equal angles do not."""
    process, sharp = P.edm(), Gaussian(np.zeros(2), np.array([0.003, 0.003]), np.eye(2))
    with jax.enable_x64(True):
        x = jnp.asarray(0.003 * NOISE)
        run = jax.jit(lambda times: L.log_likelihood(sharp.denoiser(process), process, x, times))
        exact = log_density(sharp, process, x, 0.0)
        fine, coarse = (
            np.abs(run(grid(process, 128)[::-1]) - exact).max() for grid in (grids.by_log_snr, grids.kl_optimal)
        )
    assert fine < 1e-3 < 1e-2 < coarse


def nonlinear(x):
    """A field of each row of [B, 3, 2] that mixes all its numbers."""
    flat = x.reshape(x.shape[0], -1)
    mix = jnp.asarray(np.random.default_rng(2).standard_normal((6, 6)), x.dtype)
    return (jnp.sin(flat @ mix) * flat[:, ::-1]).reshape(x.shape)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_exact_divergence_is_the_trace_of_the_jacobian(chunk):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((4, 3, 2)), jnp.float32)
    jacobian = jax.jit(jax.jacfwd(nonlinear))(x).reshape(24, 24)
    blocks = np.trace(jacobian.reshape(4, 6, 4, 6), axis1=1, axis2=3)
    value, div = jax.jit(lambda x: L.exact(chunk)(nonlinear, x, None))(x)
    np.testing.assert_allclose(div, np.diagonal(blocks), atol=1e-5)
    assert np.abs(div).max() > 1
    np.testing.assert_array_equal(value, jax.jit(nonlinear)(x))


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_variance_that_the_docstring_gives(law):
    """20000 rows of one linear field: 4 standard errors of the mean, 5 % for the variance (its standard error is below 1.3 %)."""
    matrix, rows = np.random.default_rng(4).standard_normal((5, 5)), 20000
    sym = 0.5 * (matrix + matrix.T)
    variance = 2 * np.sum(sym**2) - (2 * np.sum(np.diag(sym) ** 2) if law == "rademacher" else 0)
    x, keys = jnp.zeros((rows, 5)), row_keys(KEY, rows)
    for probes in (1, 4):
        run = jax.jit(lambda x, keys, probes=probes: L.hutchinson(probes, law)(lambda x: x @ matrix.T, x, keys)[1])
        div = np.asarray(run(x, keys), np.float64)
        error = np.sqrt(variance / probes / rows)
        assert abs(div.mean() - np.trace(matrix)) < 4 * error
        assert div.var() == pytest.approx(variance / probes, rel=0.05)


def test_hutchinson_likelihood_scatters_about_the_exact_one():
    """One row under 4000 keys: 4 standard errors of the mean."""
    process, rows = P.vp_linear(), 4000
    times = grids.kl_optimal(process, 16)[::-1]
    x = jnp.broadcast_to(jnp.asarray(NOISE[0], jnp.float32), (rows, 2))
    run = partial(L.log_likelihood, MIXTURE.denoiser(process), process)
    exact = float(jax.jit(lambda x: run(x, times))(x[:1])[0])
    for probes in (1, 8):
        log_p = np.asarray(jax.jit(lambda x, p=probes: run(x, times, KEY, divergence=L.hutchinson(p)))(x), np.float64)
        assert abs(log_p.mean() - exact) < 4 * log_p.std() / np.sqrt(rows)
        assert 0.01 < log_p.std() * np.sqrt(probes) < 2


def test_a_row_depends_on_itself_and_its_key_alone():
    process, x = P.flow(), jnp.asarray(NOISE, jnp.float32)
    times = grids.uniform(process, 4)[::-1]
    run = jax.jit(
        lambda x, key: L.log_likelihood(MIXTURE.denoiser(process), process, x, times, key, divergence=L.hutchinson())
    )
    whole = run(x, KEY)
    np.testing.assert_allclose(run(x[:3], KEY), whole[:3], atol=1e-6)
    np.testing.assert_allclose(run(x[5:], row_keys(KEY, 8)[5:]), whole[5:], atol=1e-6)
    assert np.abs(run(x, jax.random.key(1)) - whole).max() > 1e-4


def test_one_program_serves_every_step_count_and_the_evaluations_are_counted():
    process, calls, traces = P.flow(), [], []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return MIXTURE.denoiser(process)(x_t, t)

    @jax.jit
    def run(x, times):
        traces.append(1)
        return L.log_likelihood(denoise, process, x, times)

    x = jnp.asarray(NOISE, jnp.float32)
    for n in (2, 5):
        calls.clear()
        times = grids.uniform(process, n)[::-1]
        padded = run(x, grids.pad(times, 7)).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == 4 * n
        np.testing.assert_allclose(padded, L.log_likelihood(MIXTURE.denoiser(process), process, x, times), atol=1e-5)
    assert len(traces) == 1


def test_bits_of_uniformly_dequantised_levels_are_their_entropy():
    """A density that is constant over each bin of width 2 / 256 has -log2 P(level) bits/dim exactly."""
    p = np.random.default_rng(5).dirichlet(np.ones(256))
    np.testing.assert_allclose(L.bits_per_dim(np.log(p / (2 / 256)), 1, 2 / 256), -np.log2(p), atol=1e-12)
    assert L.bits_per_dim(0.0, 3072, 2 / 256) == 7
    assert L.bits_per_dim(-3072 * np.log(2.0), 3072) == pytest.approx(1)


def test_dequantised_images_fill_their_bins():
    levels = np.tile(np.arange(256, dtype=np.uint8), (4, 40)).reshape(4, 256 * 40, 1)
    x = np.asarray(L.dequantise(KEY, levels))
    assert x.dtype == np.float32 and x.min() >= -1 and x.max() <= 1
    offset = (x + 1) * 128 - levels
    assert offset.min() >= 0 and offset.max() <= 1 and stats.kstest(offset.ravel(), "uniform").statistic < 0.01
    np.testing.assert_array_equal(L.dequantise(KEY, levels[:2]), x[:2])
    assert np.abs(x[0] - x[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_ddim_inversion_is_ddim_on_a_rising_grid(name):
    """x_s = alpha_s x + sigma_s eps(x_t, t) for s > t, then unit variance."""
    process = P.vp_linear()
    with jax.enable_x64(True):
        times = grids.uniform(process, 5)
        x = jnp.asarray(NOISE)
        ours = L.encode(SAMPLERS[name](), MIXTURE.denoiser(process), process, x, times)
        for t, s in zip(times[::-1][:-1], times[::-1][1:]):
            clean = MIXTURE.denoiser(process)(x, t)
            x = process.alpha(s) * clean.x + process.sigma(s) * clean.eps
        np.testing.assert_allclose(ours, x / P.prior_std(process, times[0]), atol=1e-12)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 3)])
@pytest.mark.parametrize("process", FOUR)
def test_round_trip_error_falls_with_the_order_of_the_sampler(process, name, order):
    """Heun's is of order 3: the leading errors of a way up and of the way down cancel for a method of even order."""
    process, sampler = P.PROCESSES[process](), SAMPLERS[name]()
    with jax.enable_x64(True):
        end = float(P.inverse_log_snr(process, jnp.float64(-2 * np.log(0.1))))  # sigma / alpha = 0.1
        finest = np.asarray(grids.kl_optimal(process, 256, end=end))
        x = draw(MIXTURE, process, end)
        denoise, counts, errors = MIXTURE.denoiser(process), (64, 128, 256), []

        @jax.jit
        def trip(x, up, down):
            rise = sample(sampler, denoise, process, x, up)
            return rise, sample(sampler, denoise, process, rise, down)

        for n in counts:
            times = finest[:: 256 // n]
            errors.append(np.abs(trip(x, grids.pad(times[::-1], 256), grids.pad(times, 256))[1] - x).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15, (slope, errors)


def test_encode_finds_the_noise_of_the_closed_form_and_decode_leads_back():
    process, sampler = P.flow(), SAMPLERS["heun"]()
    with jax.enable_x64(True):
        times = grids.uniform(process, 200, end=0.05)
        x = jnp.asarray(draw(GAUSSIAN, process, 0.05))
        latents = L.encode(sampler, GAUSSIAN.denoiser(process), process, x, times)
        np.testing.assert_allclose(latents, GAUSSIAN.endpoint(process, np.asarray(x), 0.05, 1.0), atol=1e-3)
        np.testing.assert_allclose(L.decode(sampler, GAUSSIAN.denoiser(process), process, latents, times), x, atol=1e-4)
    for name in ("ve", "edm"):  # latents have unit variance, whatever the process
        process = P.PROCESSES[name]()
        x = jax.random.normal(KEY, (2000, 2)) * process.sigma_data
        unit = Gaussian(np.zeros(2), np.full(2, process.sigma_data), np.eye(2))
        latents = jax.jit(lambda x, p=process, g=unit: L.encode(sampler, g.denoiser(p), p, x, grids.kl_optimal(p, 40)))(
            x
        )
        np.testing.assert_allclose(np.std(latents, 0), 1, atol=0.05)


FLOW = P.flow()
RISE = jnp.asarray([0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: f(RISE[::-1]), "times fall, expected them to rise"),
        (lambda f: f(RISE[:1]), "at least 2 entries"),
        (lambda f: f(jnp.asarray([0.1, 0.9, 0.5])), "expected one direction"),
        (lambda f: f(jnp.asarray([0.1, 1.5])), "times run from 0.1 to 1.5"),
        (lambda f: f(RISE, divergence=L.hutchinson()), "expected a key, got None"),
        (lambda f: L.exact(0), "chunk is 0"),
        (lambda f: L.hutchinson(0), "number of probes is 0"),
        (lambda f: L.hutchinson(1, "cauchy"), "law of the probes is 'cauchy'"),
        (lambda f: L.bits_per_dim(0.0, 0), "dims is 0"),
        (lambda f: L.bits_per_dim(0.0, 3, 0.0), "bin_width 0.0"),
        (lambda f: L.dequantise(KEY, jnp.zeros((2, 3))), "images are float32, expected uint8"),
        (lambda f: L.encode(ddim(eta=1.0), None, FLOW, NOISE, RISE[::-1]), "expected a deterministic one"),
        (lambda f: L.decode(ddim(eta=1.0), None, FLOW, NOISE, RISE[::-1]), "expected a deterministic one"),
    ],
)
def test_a_wrong_call_is_refused_with_the_reason(call, words):
    def run(times, **options):
        denoise = lambda x, t: Clean(x, x)  # noqa: E731
        return L.log_likelihood(denoise, FLOW, jnp.asarray(NOISE, jnp.float32), times, **options)

    with pytest.raises(ValueError, match=words):
        call(run)
