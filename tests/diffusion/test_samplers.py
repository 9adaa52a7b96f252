"""Samplers against the truth: orders of convergence, identities, counts of evaluations, independence of rows."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import grids
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.guidance import cfg
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.samplers.ode import ddim
from ldm_jax.diffusion.samplers.sampler import row_keys
from tests.helpers import GAUSSIAN, MIXTURE

KEY = jax.random.key(0)
NOISE = np.random.default_rng(0).standard_normal((8, 2))


def solve(name, process, problem, times, bound, x_T=NOISE):
    """Final states in double precision for several grids, all by one compiled program."""
    run = jax.jit(lambda x, times: sample(SAMPLERS[name](), problem.denoiser(process), process, x, times))
    padded = [np.append(grid, np.full(bound + 1 - len(grid), grid[-1])) for grid in times]
    return [np.asarray(run(jnp.asarray(x_T), grid)) for grid in padded]


# ddim is euler here (test_ddim_is_euler_on_every_process), so it has no row of its own. alpha = 0 at the flow's t = 1 keeps
# dpmpp_2m's first steps from shrinking in log-SNR: its order is measured from t = 0.99, that of the others from 1.
@pytest.mark.parametrize(
    "process, problem",
    [(name, GAUSSIAN) for name in ("vp_linear", "ve", "flow", "edm")]
    + [(name, MIXTURE) for name in ("vp_linear", "vp_cosine", "sub_vp", "ve", "flow", "edm", "discrete_vp")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__.lower(),
)
@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order, process, problem):
    multistep = name == "dpmpp_2m"
    process = P.PROCESSES[process]()
    assert SAMPLERS[name]().order == order
    with jax.enable_x64(True):
        start = 0.99 if multistep and float(process.alpha(jnp.float64(1))) == 0 else process.t_max
        end = float(P.inverse_log_snr(process, jnp.float64(-2 * np.log(0.1))))  # sigma / alpha = 0.1
        x_T = NOISE * float(P.prior_std(process, jnp.float64(start)))
        counts = [64, 128, 256]
        grid = grids.by_log_snr if multistep else grids.uniform
        finest = np.asarray(grid(process, 256, start=start, end=end))
        times = [finest[:: 256 // n] for n in counts]
        exact = problem.endpoint(process, x_T, start, end)
        errors = [np.sqrt(np.mean((x - exact) ** 2)) for x in solve(name, process, problem, times, 256, x_T)]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15, (slope, errors)
    assert errors[-1] < (2e-2 if order == 1 else 3e-4)


@pytest.mark.parametrize("process", sorted(P.PROCESSES))
def test_ddim_is_euler_on_every_process(process):
    process = P.PROCESSES[process]()
    times = [grids.uniform(process, 6)]
    euler, ddim = (solve(name, process, MIXTURE, times, 6)[0] for name in ("euler", "ddim"))
    np.testing.assert_array_equal(euler, ddim)


def test_euler_on_the_flow_is_x_plus_dt_velocity():
    process, times = P.flow(), np.linspace(1, 0, 6)
    with jax.enable_x64(True):
        x = jnp.asarray(NOISE)
        for t, s in itertools.pairwise(times):
            clean = MIXTURE.denoiser(process)(x, t)
            x = x + (s - t) * (clean.eps - clean.x)
        np.testing.assert_allclose(solve("euler", process, MIXTURE, [jnp.asarray(times)], 5)[0], x, atol=1e-12)


def test_heun_is_edm_algorithm_1():
    process = P.edm()
    with jax.enable_x64(True):
        times = grids.uniform(process, 6)
        denoise, x = MIXTURE.denoiser(process), jnp.asarray(80 * NOISE)
        for t, s in itertools.pairwise(times):
            sigma_t, sigma_s = process.sigma(t), process.sigma(s)
            d = (x - denoise(x, t).x) / sigma_t
            x_euler = x + (sigma_s - sigma_t) * d
            x = x + (sigma_s - sigma_t) * 0.5 * (d + (x_euler - denoise(x_euler, s).x) / sigma_s)
        np.testing.assert_allclose(solve("heun", process, MIXTURE, [times], 6, 80 * NOISE)[0], x, atol=1e-10)


def test_heun_on_the_flow_is_heun_in_time():
    process, times = P.flow(), np.linspace(1, 0.1, 6)
    with jax.enable_x64(True):
        denoise, x = MIXTURE.denoiser(process), jnp.asarray(NOISE)
        velocity = lambda x, t: denoise(x, t).eps - denoise(x, t).x  # noqa: E731
        for t, s in itertools.pairwise(times):
            first = velocity(x, t)
            x = x + 0.5 * (s - t) * (first + velocity(x + (s - t) * first, s))
        np.testing.assert_allclose(solve("heun", process, MIXTURE, [jnp.asarray(times)], 5)[0], x, atol=1e-12)


@pytest.mark.parametrize("process", [P.flow(), P.discrete_vp(), P.vp_cosine(), P.vp_linear()])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_pure_noise_to_clean_data_is_finite_in_single_precision(name, process):
    times = grids.trailing(process, 5, end=0.0)
    times = times if process.alpha(times[0]) > 0 or process.affine else times.at[0].set(0.999)
    x = jax.jit(lambda x: sample(SAMPLERS[name](), GAUSSIAN.denoiser(process), process, x, times, trajectory=True))(
        jnp.asarray(NOISE, jnp.float32)
    )
    assert x.dtype == jnp.float32 and x.shape == (6, 8, 2) and np.isfinite(x).all()


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_evaluations_are_counted_and_padding_costs_none(name):
    process, sampler = P.vp_linear(), SAMPLERS[name]()
    calls = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return GAUSSIAN.denoiser(process)(x_t, t)

    run = jax.jit(lambda x, times: sample(sampler, denoise, process, x, times))
    for n in (3, 7):
        calls.clear()
        run(jnp.asarray(NOISE, jnp.float32), grids.pad(grids.uniform(process, n), 9)).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == sampler.evaluations * n
    calls.clear()
    run(jnp.asarray(NOISE, jnp.float32), grids.pad(grids.uniform(process, 3, end=0.0), 9)).block_until_ready()
    jax.effects_barrier()
    # EDM's algorithm 1: no correction where sigma is 0.
    assert len(calls) == (5 if name == "heun" else 3)


@pytest.mark.parametrize("sampler", [*(SAMPLERS[name]() for name in sorted(SAMPLERS)), ddim(eta=1.0)])
def test_one_program_for_every_scale_and_step_count_equals_the_unpadded_run(sampler):
    process, traces = P.vp_linear(), []
    denoise, weaker = MIXTURE.denoiser(process), GAUSSIAN.denoiser(process)

    def run(x, times, scale):
        traces.append(1)
        guided = cfg(lambda x, t: (denoise(x, t), weaker(x, t)), scale)
        return sample(sampler, guided, process, x, times, KEY)

    padded, x = jax.jit(run), jnp.asarray(NOISE, jnp.float32)
    outs = {(n, w): padded(x, grids.pad(grids.uniform(process, n), 12), w) for n in (4, 12) for w in (1.0, 2.5)}
    assert len(traces) == 1
    exact = jax.jit(run)(x, grids.uniform(process, 4), 2.5)
    np.testing.assert_allclose(outs[4, 2.5], exact, atol=1e-6)
    assert len({float(out[0, 0]) for out in outs.values()}) == 4


@pytest.mark.parametrize("sampler", [*(SAMPLERS[name]() for name in sorted(SAMPLERS)), ddim(eta=1.0)])
def test_a_row_does_not_depend_on_its_batch(sampler):
    process = P.vp_linear()

    def denoise(x_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = jnp.tanh(alpha * x_t / (alpha**2 + sigma**2))
        return Clean(x, (x_t - alpha * x) / sigma)

    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 3, 3, 2)), jnp.float32)
    run = jax.jit(lambda x, key: sample(sampler, denoise, process, x, grids.uniform(process, 5), key))
    whole = run(x, KEY)
    for rows in (2, 4):
        np.testing.assert_allclose(run(x[:rows], KEY), whole[:rows], atol=1e-6)
    keys = row_keys(KEY, 8)
    np.testing.assert_allclose(run(x[4:], keys[4:]), whole[4:], atol=1e-6)


def test_raw_and_typed_keys_give_the_same_rows():
    raw = jax.random.key_data(KEY)
    np.testing.assert_array_equal(row_keys(raw, 4), jax.random.key_data(row_keys(KEY, 4)))
    np.testing.assert_array_equal(row_keys(row_keys(raw, 4), 4), row_keys(raw, 4))


def test_the_trajectory_begins_and_ends_where_it_should():
    process, x = P.flow(), jnp.asarray(NOISE, jnp.float32)
    run = partial(sample, SAMPLERS["heun"](), MIXTURE.denoiser(process), process, x, grids.uniform(process, 4))
    states = run(trajectory=True)
    assert states.shape == (5, 8, 2)
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_allclose(states[-1], run(), atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_inversion_runs_the_grid_upwards(name):
    process = P.vp_linear()
    with jax.enable_x64(True):
        times = grids.by_log_snr(process, 200, start=0.9, end=0.2)
        x = GAUSSIAN.endpoint(process, NOISE, 0.9, 0.2)
        back = solve(name, process, GAUSSIAN, [times[::-1]], 200, x)[0]
    np.testing.assert_allclose(back, NOISE, atol=3e-2 if name == "euler" else 3e-4)


def test_ancestral_ddim_reproduces_mean_and_covariance():
    """20000 rows: standard errors are 0.008 for a mean and 1 % for a variance; 4 of each are allowed, and 1 % for 200 steps."""
    process, rows = P.vp_linear(), 20000
    x = jax.random.normal(jax.random.key(3), (rows, 2))
    run = jax.jit(
        lambda x: sample(ddim(eta=1.0), GAUSSIAN.denoiser(process), process, x, grids.by_log_snr(process, 200), KEY)
    )
    out = np.asarray(run(x))
    cov = GAUSSIAN.rotation @ np.diag(GAUSSIAN.std**2) @ GAUSSIAN.rotation.T
    np.testing.assert_allclose(out.mean(0), GAUSSIAN.mean, atol=0.04)
    np.testing.assert_allclose(np.cov(out.T), cov, atol=0.05)


def test_stochastic_steps_keep_the_variance_of_the_path():
    """A posterior step from exact x and eps leaves x_s with variance sigma_s^2 about alpha_s x, whatever eta."""
    process, rows = P.flow(), 40000
    eps = jax.random.normal(jax.random.key(4), (rows, 1))
    for eta in (0.3, 1.0):
        out = sample(
            ddim(eta=eta),
            lambda x_t, t: Clean(jnp.zeros_like(x_t), x_t / t),
            process,
            0.8 * eps,
            jnp.asarray([0.8, 0.5]),
            KEY,
        )
        assert np.std(out) == pytest.approx(0.5, rel=0.02)
        assert np.corrcoef(out[:, 0], eps[:, 0])[0, 1] < 0.999


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(sampler=ddim(eta=1.0)), "expected a key"),
        (dict(times=jnp.asarray([1.0])), "at least 2 entries"),
        (dict(times=jnp.asarray([1.0, 0.2, 0.5])), "times turn back"),
        (dict(times=jnp.asarray([1.5, 0.2])), r"expected them in \[0, 1\]"),
        (dict(sampler=ddim(eta=1.0), times=jnp.asarray([0.2, 0.5]), key=KEY), "times rise"),
        (dict(key=jax.random.split(KEY, 3)), "keys has 3 rows, expected one key or 8"),
    ],
)
def test_a_wrong_call_is_refused_with_the_reason(kwargs, words):
    call = dict(sampler=SAMPLERS["euler"](), times=jnp.asarray([1.0, 0.5]), key=None) | kwargs
    with pytest.raises(ValueError, match=words):
        sample(call["sampler"], GAUSSIAN.denoiser(P.flow()), P.flow(), jnp.asarray(NOISE), call["times"], call["key"])


def test_eta_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"eta is 1.5"):
        ddim(eta=1.5)
