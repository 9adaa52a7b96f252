"""Samplers against the truth: orders of convergence, identities, counts of evaluations, independence of rows."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from experiments import sampler_orders
from ldm_jax.diffusion import grids
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.exact import GAUSSIAN, MIXTURE
from ldm_jax.diffusion.guidance import cfg
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.samplers.adams import gradient_estimation, ipndm, lms
from ldm_jax.diffusion.samplers.adaptive import dpm_adaptive
from ldm_jax.diffusion.samplers.exponential import moments, weights
from ldm_jax.diffusion.samplers.multistep import res_multistep, uni_pc, uni_pc_bh2
from ldm_jax.diffusion.samplers.ode import ddim
from ldm_jax.diffusion.samplers.sampler import row_keys

KEY = jax.random.key(0)
NOISE = np.random.default_rng(0).standard_normal((8, 2))


DETERMINISTIC = sorted(name for name in SAMPLERS if not SAMPLERS[name]().stochastic)
# Evaluations beyond `evaluations` a step: plms's Heun start, pndm's three Runge-Kutta steps.
START_UP = {"plms": 1, "pndm": 9}


def solve(sampler, process, problem, times, bound, x_T=NOISE):
    """Final states in double precision for several grids, all by one compiled program; sampler is one, or its name."""
    sampler = SAMPLERS[sampler]() if isinstance(sampler, str) else sampler
    run = jax.jit(lambda x, times: sample(sampler, problem.denoiser(process), process, x, times))
    padded = [np.append(grid, np.full(bound + 1 - len(grid), grid[-1])) for grid in times]
    return [np.asarray(run(jnp.asarray(x_T), grid)) for grid in padded]


# The options that change a method's order; each constructor's default is measured under its name.
VARIANTS = {
    "lms order 2": lms(2),
    "lms order 3": lms(3),
    "res_multistep order 3": res_multistep(3),
    "uni_pc order 1": uni_pc(1),
    "uni_pc order 2": uni_pc(2),
    "uni_pc_bh2 order 1": uni_pc_bh2(1),
    "uni_pc_bh2 order 2": uni_pc_bh2(2),
}
ORDERS = {name: SAMPLERS[name]() for name in DETERMINISTIC if name != "ddim"} | VARIANTS
# The midpoint rule's error of order 2 vanishes on Gaussian data, see its docstring.
SUPERCONVERGENT = {("midpoint", "gaussian"): 3}
LARGEST_ERROR = {1: 1e-2, 2: 1e-4, 3: 1e-5, 4: 1e-6}


# One of each family is measured on every process, the others on the four that differ most.
EVERYWHERE = ("euler", "heun", "dpmpp_2m", "lms", "dpm_solver_3", "uni_pc")


@cache
def measured(name):
    """At 8 steps, 256 and 512."""
    processes = sorted(P.PROCESSES) if name in EVERYWHERE else sampler_orders.PROCESSES
    return sampler_orders.measure(ORDERS[name], processes, (8, *sampler_orders.FITTED))


# ddim is euler here: test_ddim_is_euler_on_every_process.
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    """Against exact solutions, in double precision; see experiments/sampler_orders.py for the grids and their reasons."""
    for (process, problem), points in measured(name).items():
        errors, order = [point.error for point in points], ORDERS[name].order
        slope = sampler_orders.order(errors[1:])
        assert abs(slope - SUPERCONVERGENT.get((name, problem), order)) < 0.15, (process, problem, slope, errors)
        assert errors[-1] < LARGEST_ERROR[order], (process, problem, errors)


def test_no_name_is_another_s_alias():
    """On the flow no two deterministic samplers make the same error in 8 steps, but that euler is ddim with eta = 0."""
    errors = {name: measured(name)["flow", "mixture"][0].error for name in ORDERS}
    for (one, a), (other, b) in itertools.combinations(errors.items(), 2):
        assert abs(a - b) > 1e-9 * a, (one, other)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4), ("lms", 2)])
def test_methods_in_tau_keep_their_order_from_pure_noise_on_the_flow(name, order):
    """The flow's tau is t, regular at t = 1, where alpha = 0. Adams-Bashforth keeps the order 2 of its first step there."""
    process = P.flow()
    with jax.enable_x64(True):
        counts, end = [128, 256], 0.1
        times = [np.linspace(1, end, n + 1) for n in counts]
        exact = MIXTURE.endpoint(process, NOISE, 1.0, end)
        errors = [np.sqrt(np.mean((x - exact) ** 2)) for x in solve(name, process, MIXTURE, times, 256)]
    assert abs(sampler_orders.order(errors, counts) - order) < 0.15, errors


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


def test_midpoint_and_rk4_on_the_flow_are_the_textbook_methods_in_time():
    process, times = P.flow(), np.linspace(1, 0.1, 6)
    with jax.enable_x64(True):
        denoise = MIXTURE.denoiser(process)
        velocity = lambda x, t: denoise(x, t).eps - denoise(x, t).x  # noqa: E731
        x, y = jnp.asarray(NOISE), jnp.asarray(NOISE)
        for t, s in itertools.pairwise(times):
            h = s - t
            x = x + h * velocity(x + 0.5 * h * velocity(x, t), t + 0.5 * h)
            a = velocity(y, t)
            b = velocity(y + 0.5 * h * a, t + 0.5 * h)
            c = velocity(y + 0.5 * h * b, t + 0.5 * h)
            y = y + h / 6 * (a + 2 * b + 2 * c + velocity(y + h * c, s))
        for name, expected in (("midpoint", x), ("rk4", y)):
            np.testing.assert_allclose(solve(name, process, MIXTURE, [jnp.asarray(times)], 5)[0], expected, atol=1e-12)


def test_lms_is_adams_bashforth_with_weights_by_numerical_quadrature():
    """On uneven steps in sigma, in k-diffusion's own form: dx/dsigma = (x - denoised) / sigma."""
    process = P.ve()
    with jax.enable_x64(True):
        times = np.array([1.0, 0.8, 0.71, 0.5, 0.45, 0.3, 0.1])
        sigmas = [float(process.sigma(t)) for t in jnp.asarray(times)]
        x, slopes = jnp.asarray(50 * NOISE), []
        for i, t in enumerate(times[:-1]):
            slopes.append((x - MIXTURE.denoiser(process)(x, t).x) / sigmas[i])
            known = range(max(0, i - 3), i + 1)
            for j in known:

                def basis(u, j=j, known=known):
                    return np.prod([(u - sigmas[k]) / (sigmas[j] - sigmas[k]) for k in known if k != j])

                x = x + quad(basis, sigmas[i], sigmas[i + 1], epsabs=1e-12)[0] * slopes[j]
        np.testing.assert_allclose(solve("lms", process, MIXTURE, [times], 6, 50 * NOISE)[0], x, atol=1e-9)


def test_ipndm_is_lms_where_steps_in_tau_are_equal_and_only_there():
    process = P.flow()
    with jax.enable_x64(True):
        even, uneven = np.linspace(1, 0.1, 13), np.linspace(1, 0.1**0.5, 13) ** 2
        for order in (2, 3, 4):
            same, other = solve(lms(order), process, MIXTURE, [even, uneven], 12)
            ours, off = solve(ipndm(order), process, MIXTURE, [even, uneven], 12)
            np.testing.assert_allclose(ours, same, atol=1e-12)
            assert np.abs(off - other).max() > 1e-4


def test_gradient_estimation_is_the_paper_s_loop():
    """Permenter & Yuan's x += (sigma_s - sigma_t) (gamma eps + (1 - gamma) eps_last); gamma = 1 is Euler, 3/2 is AB2."""
    process = P.ve()
    with jax.enable_x64(True):
        times = np.linspace(1, 0.2, 8)
        x, last = jnp.asarray(50 * NOISE), None
        for t, s in itertools.pairwise(times):
            eps = MIXTURE.denoiser(process)(x, t).eps
            bar = eps if last is None else 2 * eps - last
            x, last = x + (process.sigma(s) - process.sigma(t)) * bar, eps
        run = partial(solve, process=process, problem=MIXTURE, times=[times], bound=7, x_T=50 * NOISE)
        np.testing.assert_allclose(run("gradient_estimation")[0], x, atol=1e-9)
        np.testing.assert_allclose(run(gradient_estimation(1.0))[0], run("euler")[0], atol=1e-9)
        np.testing.assert_allclose(run(gradient_estimation(1.5))[0], run(ipndm(2))[0], atol=1e-9)


@pytest.mark.parametrize("kind, sign", [("x", 1), ("eps", -1)])
def test_moments_are_the_integrals(kind, sign):
    """Against numerical quadrature over all sizes of h; at h = inf they are 1."""
    sizes = np.array([1e-12, 1e-6, 1e-3, 0.1, 0.9, 0.999, 1.0, 1.001, 2.0, 8.0])
    h = np.concatenate([-sizes, sizes])
    with jax.enable_x64(True):
        for n in (1, 2, 3, 4):
            ours = np.stack(moments(kind, jnp.asarray(h), n))
            exact = [[sign * v * quad(lambda u, v=v, k=k: np.exp(-sign * v * (1 - u)) * u**k, 0, 1, epsabs=0, epsrel=1e-13)[0]
                      for v in h] for k in range(n)]  # fmt: skip
            np.testing.assert_allclose(ours, exact, rtol=2e-13)
    single = np.stack(moments(kind, jnp.asarray(h, jnp.float32), 4))
    np.testing.assert_allclose(single, exact, rtol=3e-6)
    np.testing.assert_array_equal(np.stack(moments("x", jnp.asarray(np.inf), 4)), 1)


@pytest.mark.parametrize("usable", [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]])
def test_weights_integrate_polynomials_through_the_usable_nodes_exactly(usable):
    """int kernel(u) P(u) du for every P that vanishes at 0 and has as many terms as there are nodes; 0 at the others."""
    nodes, usable = np.array([-0.7, -1.9, 1.0]), np.array(usable, bool)
    with jax.enable_x64(True):
        m = moments("x", jnp.asarray(0.6), 4)
        w = np.asarray(weights(jnp.asarray(nodes), jnp.asarray(usable), m))
    assert (w[~usable] == 0).all()
    for k in range(1, usable.sum() + 1):
        np.testing.assert_allclose(w @ nodes**k, m[k], rtol=1e-13)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_pure_noise_to_clean_data_is_finite_in_single_precision(name):
    """From alpha = 0 (flow, vp_cosine) and into sigma = 0; pairs of processes with one k share a program."""
    for pair in ((P.flow(), P.vp_cosine()), (P.discrete_vp(), P.vp_linear())):

        @jax.jit
        def run(i, x, times, pair=pair):
            process = sampler_orders.one_of(pair, i)
            return sample(SAMPLERS[name](), GAUSSIAN.denoiser(process), process, x, times, trajectory=True)

        for i, process in enumerate(pair):
            times = grids.trailing(process, 5, end=0.0)
            x = run(i, jnp.asarray(NOISE, jnp.float32), times)
            assert x.dtype == jnp.float32 and x.shape == (6, 8, 2) and np.isfinite(x).all()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_evaluations_are_counted_and_padding_costs_none(name):
    process, sampler = P.vp_linear(), SAMPLERS[name]()
    calls = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: calls.append(1), t)
        return GAUSSIAN.denoiser(process)(x_t, t)

    run = jax.jit(lambda x, times: sample(sampler, denoise, process, x, times))

    def count(n, **options):
        calls.clear()
        run(jnp.asarray(NOISE, jnp.float32), grids.pad(grids.uniform(process, n, **options), 9)).block_until_ready()
        jax.effects_barrier()
        return len(calls)

    if name == "dpm_adaptive":
        assert count(3) % 3 == 0 and count(3) >= 9 and count(3, end=0.0) % 3 == 1
        return
    for n in (3, 7):
        assert count(n) == sampler.evaluations * n + START_UP.get(name, 0)
    # EDM's algorithm 1: a step into sigma = 0 is Euler's and asks nothing there; nor does pndm's third Runge-Kutta step.
    assert count(3, end=0.0) == {"plms": 4, "pndm": 9}.get(name, 2 * sampler.evaluations + 1)


def process_for(name):
    return P.ve() if name == "annealed_langevin" else P.vp_linear()


EVERY = {name: SAMPLERS[name]() for name in sorted(SAMPLERS)} | {"ddim eta=1": ddim(eta=1.0)}


@pytest.mark.parametrize("name", EVERY)
def test_one_program_for_every_scale_and_step_count_and_rows_that_know_no_batch(name):
    """A padded batch of 8 under one program; three of its rows, alone and unpadded, are the same images."""
    sampler, process, traces = EVERY[name], process_for(name), []

    def pair(x_t, t):
        alpha, sigma = (P.per_row(c(t), x_t) for c in (process.alpha, process.sigma))
        x = jnp.tanh(alpha * x_t / (alpha**2 + sigma**2)), 0.5 * alpha * x_t / (alpha**2 + sigma**2)
        return tuple(Clean(x, (x_t - alpha * x) / sigma) for x in x)

    def run(x, times, scale, key):
        traces.append(1)
        return sample(sampler, cfg(pair, scale), process, x, times, key)

    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 2, 3, 1)), jnp.float32)
    padded, keys = jax.jit(run), row_keys(KEY, 8)
    outs = {(n, w): padded(x, grids.pad(grids.uniform(process, n), 12), w, keys) for n in (4, 12) for w in (1.0, 2.5)}
    assert len(traces) == 1
    assert len({float(out[0, 0, 0, 0]) for out in outs.values()}) == 4
    alone = jax.jit(run)(x[:3], grids.uniform(process, 4), 2.5, KEY)
    np.testing.assert_allclose(outs[4, 2.5][:3], alone, atol=1e-6)
    turned = padded(x[::-1], grids.pad(grids.uniform(process, 4), 12), 2.5, keys[::-1])
    np.testing.assert_allclose(turned[::-1], outs[4, 2.5], atol=1e-6)


def test_dpm_2_is_dpm_solver_2_where_tau_is_sigma_over_alpha():
    process = P.sub_vp()
    with jax.enable_x64(True):
        times = [grids.uniform(process, 8)]
        one, other = (solve(name, process, MIXTURE, times, 8)[0] for name in ("dpm_2", "dpm_solver_2"))
    np.testing.assert_allclose(one, other, atol=1e-12)


def adaptive_run(times, broken=None, **options):
    """(final x, evaluations) of dpm_adaptive on the mixture under VE, in double precision; row `broken` meets NaN."""
    process, calls = P.ve(), []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: calls.append(1), t)
        clean = MIXTURE.denoiser(process)(x_t, t)
        return clean if broken is None else Clean(clean.x.at[broken].set(jnp.nan), clean.eps.at[broken].set(jnp.nan))

    sampler = dpm_adaptive(**options)
    x = np.asarray(jax.jit(lambda x: sample(sampler, denoise, process, x, times))(jnp.asarray(50 * NOISE)))
    jax.effects_barrier()
    return x, len(calls)


def test_adaptive_error_falls_with_the_tolerance_on_a_grid_of_one_step():
    """Third order: a hundredth of the tolerance costs 100^(1/3) = 4.6 times the evaluations and gains at least a factor 30."""
    process = P.ve()
    with jax.enable_x64(True):
        times = jnp.asarray([1.0, 0.2])
        exact = MIXTURE.endpoint(process, 50 * NOISE, 1.0, 0.2)
        runs = [adaptive_run(times, rtol=tol, atol=0.2 * tol) for tol in (1e-2, 1e-4)]
        tuned, _ = adaptive_run(times, rtol=1e-4, atol=2e-5, pcoeff=0.3, icoeff=0.4, dcoeff=0.1)
    (coarse, few), (fine, many) = [(np.abs(x - exact).max(), evaluations) for x, evaluations in runs]
    assert coarse < 3e-2 and fine < coarse / 30 and few < 100 and 2.5 * few < many < 6 * few
    assert np.abs(tuned - exact).max() < 1e-3


def test_adaptive_rows_that_run_out_of_attempts_or_meet_nan_are_nan_and_end():
    with jax.enable_x64(True):
        times = jnp.asarray([1.0, 0.2])
        x, evaluations = adaptive_run(times, rtol=1e-4, atol=2e-5, attempts=10)
        assert np.isnan(x).all() and evaluations == 30
        whole, needed = adaptive_run(times)
        x, evaluations = adaptive_run(times, broken=3)
        assert np.isnan(x[3]).all() and evaluations <= needed
        np.testing.assert_allclose(np.delete(x, 3, 0), np.delete(whole, 3, 0), atol=1e-12)


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


@pytest.mark.parametrize(
    "name", ["euler", "heun", "rk4", "dpmpp_2m", "lms", "pndm", "uni_pc", "dpm_solver_3", "dpm_adaptive"]
)
def test_inversion_runs_the_grid_upwards(name):
    process = P.vp_linear()
    with jax.enable_x64(True):
        times = grids.by_log_snr(process, 200, start=0.9, end=0.2)
        x = GAUSSIAN.endpoint(process, NOISE, 0.9, 0.2)
        back = solve(name, process, GAUSSIAN, [times[::-1]], 200, x)[0]
    np.testing.assert_allclose(back, NOISE, atol=3e-2 if SAMPLERS[name]().order == 1 else 3e-4)


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


@pytest.mark.parametrize(
    "make, words",
    [
        (partial(ddim, eta=1.5), "eta is 1.5, expected a number in"),
        (partial(lms, order=5), "order is 5, expected 2, 3 or 4"),
        (partial(ipndm, order=1), "order is 1, expected 2, 3 or 4"),
        (partial(gradient_estimation, gamma=0.5), "gamma is 0.5, expected a number >= 1"),
        (partial(res_multistep, order=4), "order is 4, expected 2 or 3"),
        (partial(uni_pc, order=0), "order is 0, expected 1, 2 or 3"),
        (partial(dpm_adaptive, rtol=0.0), "rtol is 0.0, expected a number > 0"),
        (partial(dpm_adaptive, attempts=0), "attempts is 0, expected a number > 0"),
    ],
)
def test_wrong_options_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
