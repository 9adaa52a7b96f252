"""Stochastic samplers against the truth: weak orders without Monte Carlo, distributions, paths, identities with noise off."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.special import ndtr

from experiments.sampler_orders import one_of
from ldm_jax.diffusion import grids
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.exact import GAUSSIAN, MIXTURE, Gaussian, numbers
from ldm_jax.diffusion.prediction import Clean, velocity
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.samplers.brownian import brownian
from ldm_jax.diffusion.samplers.multistep import _multistep
from ldm_jax.diffusion.samplers.multistep_sde import halved
from ldm_jax.diffusion.samplers.sampler import row_keys

KEY = jax.random.key(0)
NOISE = np.random.default_rng(0).standard_normal((8, 2))
STOCHASTIC = sorted(name for name in SAMPLERS if SAMPLERS[name]().stochastic)
# Processes of one k share a compiled program.
GROUPS = (("vp_linear", "ve", "edm"), ("flow",))
COV = GAUSSIAN.rotation @ np.diag(GAUSSIAN.std**2) @ GAUSSIAN.rotation.T


def ends(process):
    """From t_max, or 0.99 where alpha is 0 at 1, to sigma / alpha = 0.1."""
    with jax.enable_x64(True):
        start = 0.99 if numbers(process, 1.0)[0] < 1e-12 else process.t_max
        return start, float(P.inverse_log_snr(process, jnp.float64(-2 * np.log(0.1))))


def refined(process, counts):
    """Nested grids, uniform in log-SNR, padded to one length."""
    start, end = ends(process)
    finest = np.array(grids.by_log_snr(process, counts[-1], start=start, end=end), np.float64)
    finest[[0, -1]] = start, end
    nested = [finest[:: counts[-1] // n] for n in counts]
    return [np.append(grid, np.full(counts[-1] + 1 - len(grid), grid[-1])) for grid in nested]


def law(process, t):
    """Mean and covariance of x_t over GAUSSIAN."""
    alpha, sigma = numbers(process, t)
    return alpha * GAUSSIAN.mean, alpha**2 * COV + sigma**2 * np.eye(2)


def propagate(sampler, processes, draws, denoiser=GAUSSIAN.denoiser):
    """(i, times, mean, cov) -> mean and covariance of the final state under the i-th process, exactly.

    For a Gaussian's denoiser a step is affine in what the carry holds and in its `draws` unit noises, so that the
    covariance of the carry goes by its Jacobians: C <- A C A^T + B B^T.
    """
    keys, normal = jax.random.split(KEY, 1), jax.random.normal

    def run(i, times, mean, cov):
        process = one_of(processes, i)
        denoise = denoiser(process)
        leaves, tree = jax.tree.flatten(sampler.init(process, mean[None], times, keys))
        # Arrays of states are propagated; times, counts and levels are the same for every row and every noise.
        inside = [leaf.ndim >= 2 for leaf in leaves]
        split = lambda leaves, which: [leaf for leaf, is_in in zip(leaves, inside, strict=True) if is_in == which]  # noqa: E731

        def flat(mean):
            return ravel_pytree(split(jax.tree.leaves(sampler.init(process, mean[None], times, keys)), True))[0]

        first = flat(mean)
        unravel = ravel_pytree(split(leaves, True))[1]

        def carry_of(vector, rest):
            states, others = iter(unravel(vector)), iter(rest)
            return jax.tree.unflatten(tree, [next(states) if is_in else next(others) for is_in in inside])

        def step(vector, rest, t, s):
            taken = []

            def given(key, shape, dtype):
                taken.append(1)
                start = len(first) + 2 * (min(len(taken), draws) - 1)
                return vector[start : start + 2].reshape(shape).astype(dtype)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax.random, "normal", given)
                out = jax.tree.leaves(sampler.step(denoise, process, carry_of(vector[: len(first)], rest), t, s, keys))
            assert jax.random.normal is normal
            value = ravel_pytree(split(out, True))[0]
            return value, (value, split(out, False))

        def advance(now, ts):
            vector, cov, rest = now

            def go():
                whole = jnp.concatenate([vector, jnp.zeros(2 * draws)])
                jacobian, (value, others) = jax.jacfwd(partial(step, rest=rest, t=ts[0], s=ts[1]), has_aux=True)(whole)
                a, b = jacobian[:, : len(first)], jacobian[:, len(first) :]
                return value, a @ cov @ a.T + b @ b.T, others

            return jax.lax.cond(ts[0] == ts[1], lambda: now, go), None

        spread = jax.jacfwd(flat)(mean)
        now = (first, spread @ cov @ spread.T, split(leaves, False))
        (vector, cov, rest), _ = jax.lax.scan(advance, now, (times[:-1], times[1:]))
        where = carry_of(jnp.arange(len(first), dtype=vector.dtype), rest).x.reshape(-1).astype(jnp.int32)
        return vector[where], cov[jnp.ix_(where, where)]

    return jax.jit(run)


DRAWS = {"dpmpp_sde": 2, "seeds_2": 2, "seeds_3": 3}
COUNTS = (64, 128, 256)
# name -> options of the constructor and step counts, where the defaults would not show the order: euler_maruyama's two error
# terms of either sign cancel on VE below a thousand steps, seeds_3's third-order term is the larger one below 200; the
# defaults of edm_stochastic are capped by sqrt(2) - 1 below 97 steps.
MEASURED = {
    "euler_maruyama": ({}, (1024, 2048, 4096)),
    "seeds_3": ({}, (256, 512, 1024)),
    "edm_stochastic": (dict(s_churn=5.0), COUNTS),
}
# Solvers of the reverse SDE with eta = 1, whose law given x_T is that of the SDE, and not only their marginals.
REVERSE = ("ddpm euler_ancestral euler_maruyama reverse_diffusion dpmpp_sde seeds_2 seeds_3 dpmpp_2m_sde "
           "dpmpp_2m_sde_heun dpmpp_3m_sde dpm_2_ancestral dpmpp_2s_ancestral").split()  # fmt: skip
ORDERED = [*REVERSE, "er_sde", "sa_solver", "sa_solver_pece", "edm_stochastic"]


def orders_of(sampler, names, counts, draws):
    """For each process (slope, errors) in mean and covariance of the marginal, and errors of the law given one x_T."""
    processes, found = [P.PROCESSES[name]() for name in names], []
    with jax.enable_x64(True):
        run = propagate(sampler, processes, draws)
        for i, process in enumerate(processes):
            start, end = ends(process)
            (mean_t, cov_t), (mean_s, cov_s) = law(process, start), law(process, end)
            # x_s given x_T: regression of the forward process, Cov(x_s, x_T) = Var(x_s) alpha_T / alpha_s.
            gain = numbers(process, start)[0] / numbers(process, end)[0] * cov_s @ np.linalg.inv(cov_t)
            x_T = mean_t + np.sqrt(np.diag(cov_t)) * np.array([1.0, -1.0])
            given = mean_s + gain @ (x_T - mean_t), cov_s - gain @ cov_t @ gain.T

            def error(times, first, truth, i=i):
                out = run(i, jnp.asarray(times), *(jnp.asarray(part) for part in first))
                return np.sqrt(sum(np.sum((np.asarray(a) - b) ** 2) for a, b in zip(out, truth, strict=True)))

            times = refined(process, counts)
            errors = [error(grid, (mean_t, cov_t), (mean_s, cov_s)) for grid in times]
            paths = [error(grid, (x_T, 0 * cov_t), given) for grid in times[-2:]]
            found.append((-np.polyfit(np.log(counts), np.log(errors), 1)[0], errors, paths))
    return found


@pytest.mark.parametrize("name", ORDERED)
def test_weak_order(name):
    """The law of x_t at sigma / alpha = 0.1 against GAUSSIAN's on VP, VE, EDM and flow, exactly: no Monte Carlo."""
    options, counts = MEASURED.get(name, ({}, COUNTS))
    sampler = SAMPLERS[name](**options)
    for names in GROUPS:
        for slope, errors, paths in orders_of(sampler, names, counts, DRAWS.get(name, 1)):
            assert abs(slope - sampler.order) < 0.15, (names, slope, errors)
            assert errors[-1] < (5e-2 if sampler.order == 1 else 3e-3)
            if name in REVERSE:
                assert paths[-1] < (5e-2 if sampler.order == 1 or "ancestral" in name else 3e-3), paths
                assert paths[-1] < 0.65 * paths[-2]


@pytest.mark.parametrize(
    "name, options, order, counts",
    [
        ("seeds_3", dict(eta=0.0), 3, (128, 256, 512)),
        ("er_sde", dict(scale=jnp.ones_like), 2, COUNTS),
        ("er_sde", dict(order=1), 1, COUNTS),
        ("sa_solver", dict(tau=0.0, predictor=3, corrector=4, halve=False), 4, COUNTS),
        ("sa_solver", dict(tau=1.0, predictor=1, corrector=1), 1, COUNTS),
        ("sa_solver_pece", dict(tau=0.5, predictor=3, corrector=3), 2, COUNTS),
        ("dpmpp_sde", dict(eta=0.5, r=0.7), 2, COUNTS),
        ("dpmpp_2s_ancestral", dict(eta=0.5), 2, COUNTS),
        ("dpm_2_ancestral", dict(eta=0.5), 2, COUNTS),
    ],
)
def test_order_of_variants(name, options, order, counts):
    [(slope, errors, _)] = orders_of(SAMPLERS[name](**options), ["vp_linear"], counts, DRAWS.get(name, 1))
    assert abs(slope - order) < 0.15, (slope, errors)


@pytest.mark.parametrize("names", GROUPS)
def test_weak_order_of_restart(names):
    """2 as the grid and the way back are refined together; the restart lies within the grid, at sigma / alpha = 0.2."""
    processes = [P.PROCESSES[name]() for name in names]
    errors = []
    with jax.enable_x64(True):
        for k, n in enumerate(COUNTS):
            run = propagate(SAMPLERS["restart"](low=0.2, repeats=1, steps=n // 4), processes, 1)
            for i, process in enumerate(processes):
                start, end = ends(process)
                out = run(i, jnp.asarray(refined(process, COUNTS)[k]), *map(jnp.asarray, law(process, start)))
                errors.append(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(out, law(process, end), strict=True))))
    for of_process in np.reshape(errors, (len(COUNTS), -1)).T:
        assert abs(-np.polyfit(np.log(COUNTS), np.log(of_process), 1)[0] - 2) < 0.15, of_process


def test_restart_comes_back_on_karras_s_grid():
    process, met = P.ve(), []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: met.append(float(process.sigma(t))), t, ordered=True)
        return MIXTURE.denoiser(process)(x_t, t)

    with jax.enable_x64(True):
        times = P.inverse_log_snr(process, -2 * jnp.log(jnp.asarray([1.0, 0.05])))
        sample(
            SAMPLERS["restart"](low=0.1, high=0.5, repeats=1, steps=3), denoise, process, jnp.asarray(NOISE), times, KEY
        )
        jax.effects_barrier()
    back = np.linspace(0.5 ** (1 / 7), 0.05 ** (1 / 7), 4) ** 7
    np.testing.assert_allclose(met, [1.0, 0.05, *np.repeat(back, 2)[1:-1]], rtol=1e-9)


def consistency_function(process):
    """x is the end of the probability-flow path of GAUSSIAN."""

    def denoise(x_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        mean, std, rotation = (jnp.asarray(part) for part in GAUSSIAN)
        x = mean + ((x_t - alpha * mean) @ rotation * std / jnp.sqrt(alpha**2 * std**2 + sigma**2)) @ rotation.T
        return Clean(x, (x_t - alpha * x) / sigma)

    return denoise


@pytest.mark.parametrize("names", GROUPS)
def test_lcm_samples_a_consistency_function_exactly_in_any_number_of_steps(names):
    """x + fresh noise has the law of x_s at every s."""
    processes = [P.PROCESSES[name]() for name in names]
    with jax.enable_x64(True):
        run = propagate(SAMPLERS["lcm"](), processes, 1, consistency_function)
        for i, process in enumerate(processes):
            start, end = ends(process)
            found = run(i, jnp.linspace(start, end, 4), *map(jnp.asarray, law(process, start)))
            for ours, exact in zip(found, law(process, end), strict=True):
                np.testing.assert_allclose(ours, exact, atol=1e-10)


def of_mixture(rows, process, t):
    """Exact draws of x_t, [rows / 32, 32, 2]."""
    generator = np.random.default_rng(1)
    part = np.stack([generator.choice(2, rows, p=w / w.sum()) for w in MIXTURE.weights], -1)
    axes = np.take_along_axis(MIXTURE.centers.T, part, 0) + MIXTURE.std * generator.standard_normal((rows, 2))
    alpha, sigma = numbers(process, t)
    x_t = alpha * axes @ MIXTURE.rotation.T + sigma * generator.standard_normal((rows, 2))
    return jnp.asarray(x_t.reshape(-1, 32, 2), jnp.float32)


def check_mixture(x, process, t, slack):
    """Mean, covariance and the weights of the four components along MIXTURE's axes, within 4 standard errors and a slack."""
    rows, (alpha, sigma) = x.size // 2, numbers(process, t)
    axes = np.asarray(x, np.float64).reshape(-1, 2) @ MIXTURE.rotation
    mean = np.sum(MIXTURE.weights * MIXTURE.centers, -1)
    var = np.sum(MIXTURE.weights * MIXTURE.centers**2, -1) - mean**2 + MIXTURE.std**2
    var = alpha**2 * var + sigma**2
    np.testing.assert_array_less(np.abs(axes.mean(0) - alpha * mean), 4 * np.sqrt(var / rows) + slack)
    spread = np.cov(axes.T)
    # The fourth moment of these axes is below 3 var^2: sqrt(2 / rows) var bounds the error of a variance.
    np.testing.assert_array_less(np.abs(np.diag(spread) - var), 4 * np.sqrt(2 / rows) * var + slack)
    assert abs(spread[0, 1]) < 4 * np.sqrt(var.prod() / rows) + slack
    middle = alpha * MIXTURE.centers.mean(-1)
    scale = np.sqrt(alpha**2 * MIXTURE.std**2 + sigma**2)
    upper = np.sum(MIXTURE.weights * ndtr((alpha * MIXTURE.centers - middle[:, None]) / scale), -1)
    above = axes > middle
    for i in (False, True):
        for j in (False, True):
            exact = (upper[0] if i else 1 - upper[0]) * (upper[1] if j else 1 - upper[1])
            found = np.mean((above[:, 0] == i) & (above[:, 1] == j))
            assert abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / rows) + slack, (i, j, found, exact)


# Options, steps and slack where the defaults are not (order 2, 64 steps, 0.005).
SAMPLED = {
    "euler_maruyama": ({}, 300, 0.02),
    "reverse_diffusion": ({}, 300, 0.03),
    "ddpm": ({}, 300, 0.03),
    "euler_ancestral": ({}, 300, 0.02),
    "predictor_corrector": (dict(snr=0.05), 300, 0.03),
    "restart": (dict(low=0.2, steps=20), 64, 0.005),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ORDERED, "restart", "predictor_corrector"])
def test_mean_covariance_and_weights_of_a_mixture(name):
    """2400 rows drawn exactly at the start: standard errors of about 0.018 for a mean, 3 % for a variance and 0.01 for a weight;
    4 of each are allowed, and the slack that stands beside the step count for the error of the method. The orders above are
    exact; this sees what is not linear in x."""
    options, steps, slack = SAMPLED.get(name, ({}, 64, 0.005))
    sampler = SAMPLERS[name](**options)
    for names in GROUPS:
        processes = [P.PROCESSES[name]() for name in names]

        @jax.jit
        def run(i, x, times, processes=processes):
            process = one_of(processes, i)
            return sample(sampler, MIXTURE.denoiser(process), process, x, times, KEY)

        for i, process in enumerate(processes):
            start, end = ends(process)
            x = run(i, of_mixture(2400, process, start), grids.by_log_snr(process, steps, start=start, end=end))
            check_mixture(x, process, end, slack)


SCORE_SDES = ("ve", "vp_linear", "sub_vp")


def test_annealed_langevin_ends_at_its_own_law_of_a_gaussian():
    """400 steps at one level: x <- (1 - a) x + sqrt(r) sigma z with a = r sigma^2 / (2 var) has the variance var / (1 - a / 2)."""
    r, processes = 0.4, [P.PROCESSES[name]() for name in SCORE_SDES]
    with jax.enable_x64(True):
        run = propagate(SAMPLERS["annealed_langevin"](steps=1, step_size=r), processes, 1)
        for i, process in enumerate(processes):
            t = float(P.inverse_log_snr(process, jnp.asarray(0.0)))
            times = np.linspace(t + 1e-7, t, 401)
            mean, cov = run(i, jnp.asarray(times), jnp.zeros(2), jnp.eye(2))
            alpha, sigma = numbers(process, t)
            var = (alpha * GAUSSIAN.std) ** 2 + sigma**2
            exact = GAUSSIAN.rotation @ np.diag(var / (1 - 0.25 * r * sigma**2 / var)) @ GAUSSIAN.rotation.T
            np.testing.assert_allclose(mean, alpha * GAUSSIAN.mean, atol=1e-5 * alpha)
            np.testing.assert_allclose(cov, exact, atol=1e-5 * exact.max())


def test_the_corrector_ends_at_its_own_law_of_a_gaussian():
    """40 steps at one level: epsilon = 2 (snr |z| / |score|)^2 keeps the variance (1 + snr^2) var of many equal axes, within 2.5 %."""
    snr, processes, axes = 0.5, [P.PROCESSES[name]() for name in SCORE_SDES], 512
    data, x_T = (
        Gaussian(np.zeros(axes), np.full(axes, 0.7), np.eye(axes)),
        np.random.default_rng(0).normal(size=(128, axes)),
    )

    @jax.jit
    def run(i, x, times):
        process = one_of(processes, i)
        return sample(SAMPLERS["predictor_corrector"](snr=snr), data.denoiser(process), process, x, times, KEY)

    with jax.enable_x64(True):
        for i, process in enumerate(processes):
            t = float(P.inverse_log_snr(process, jnp.asarray(0.0)))
            alpha, sigma = numbers(process, t)
            var = np.var(run(i, jnp.asarray(x_T), jnp.linspace(t + 1e-7, t, 41)))
            assert var == pytest.approx((1 + snr**2) * ((0.7 * alpha) ** 2 + sigma**2), rel=0.025), process


@pytest.mark.slow
def test_annealed_langevin_reaches_the_mixture():
    """3200 rows, 200 levels of 20 steps: a variance lags by about 4 var log(sigma_max / sigma_min) / (levels steps r) = 0.03."""
    process = P.ve()
    start, end = ends(process)
    run = jax.jit(
        lambda x, times: sample(
            SAMPLERS["annealed_langevin"](steps=20), MIXTURE.denoiser(process), process, x, times, KEY
        )
    )
    x = run(of_mixture(3200, process, start), grids.by_log_snr(process, 200, start=start, end=end))
    check_mixture(x, process, end, 0.04)


def final(sampler, process, times, x_T=NOISE, problem=MIXTURE, key=KEY):
    """The final state in double precision."""
    with jax.enable_x64(True):
        run = jax.jit(lambda x, times: sample(sampler, problem.denoiser(process), process, x, times, key))
        return np.asarray(run(jnp.asarray(x_T), jnp.asarray(times)))


# A sampler and options, and what it is equal to with the same keys.
SAME = {
    "ddpm small is ddim(eta=1)": (("ddpm", dict(variance="small")), ("ddim", dict(eta=1.0))),
    "euler_ancestral(0) is euler": (("euler_ancestral", dict(eta=0.0)), ("euler", {})),
    "dpm_2_ancestral(0) is dpm_2": (("dpm_2_ancestral", dict(eta=0.0)), ("dpm_2", {})),
    "dpmpp_2s_ancestral(0) is dpmpp_2s": (("dpmpp_2s_ancestral", dict(eta=0.0)), ("dpmpp_2s", {})),
    "dpmpp_sde(0) is dpmpp_2s": (("dpmpp_sde", dict(eta=0.0)), ("dpmpp_2s", {})),
    "seeds_2(0) is dpmpp_2s": (("seeds_2", dict(eta=0.0)), ("dpmpp_2s", {})),
    "seeds_3(0) is dpmpp_3s": (("seeds_3", dict(eta=0.0)), ("dpmpp_3s", {})),
    "dpmpp_2m_sde(0) is dpmpp_2m": (("dpmpp_2m_sde", dict(eta=0.0)), ("dpmpp_2m", {})),
    "dpmpp_2m_sde_heun(0) is res_multistep": (("dpmpp_2m_sde_heun", dict(eta=0.0)), ("res_multistep", {})),
    "edm_stochastic(0) is heun": (("edm_stochastic", dict(s_churn=0.0)), ("heun", {})),
    "edm_stochastic out of its interval is heun": (("edm_stochastic", dict(s_tmin=1e4, s_tmax=1e5)), ("heun", {})),
    "restart below the grid is heun": (("restart", dict(low=1e-6)), ("heun", {})),
    "er_sde of order 1 with scale 1 is euler": (("er_sde", dict(order=1, scale=jnp.ones_like)), ("euler", {})),
    "er_sde of order 1 with scale l is ddim(1)": (("er_sde", dict(order=1, scale=lambda l: l)), ("ddim", dict(eta=1.0))),
    "sa_solver(0) of order 1 is euler": (("sa_solver", dict(tau=0.0, predictor=1, corrector=1)), ("euler", {})),
    "sa_solver(1) of order 1 is ddim(1)": (("sa_solver", dict(tau=1.0, predictor=1, corrector=1)), ("ddim", dict(eta=1.0))),
    "sa_solver(0) without corrector is res_multistep": (
        ("sa_solver", dict(tau=0.0, predictor=3, corrector=1, halve=False)),
        ("res_multistep", dict(order=3)),
    ),
    "sa_solver(0) is uni_pc of order 2": (("sa_solver", dict(tau=0.0, corrector=3)), ("uni_pc", dict(order=2))),
    "tcd(0) is euler": (("tcd", dict(gamma=0.0)), ("euler", {})),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_identities(case):
    """On the flow from pure noise on; with noise off a sampler is its ODE's, and variants meet where papers say so."""
    (name, options), (other, other_options) = SAME[case]
    process = P.flow()
    times = grids.uniform(process, 6, end=0.05)
    ours, theirs = (final(SAMPLERS[n](**o), process, times) for n, o in ((name, options), (other, other_options)))
    np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("process", ["vp_linear", "ve", "flow"])
def test_euler_ancestral_is_ddim_but_on_the_flow(process):
    process = P.PROCESSES[process]()
    times = grids.uniform(process, 6)
    for eta in (0.6, 1.0):
        ours, ddim = (final(SAMPLERS[name](eta=eta), process, times) for name in ("euler_ancestral", "ddim"))
        if process.affine:
            assert np.abs(ours - ddim).max() > 1e-2
        else:
            np.testing.assert_allclose(ours, ddim, atol=1e-9)


def test_the_rectified_flow_step_is_the_published_one():
    """sigma_down = s (1 + eta (s / t - 1)); x_down = Euler; x_s = (1 - s) / (1 - down) x_down + renoise z."""
    t, s, eta, process = 0.8, 0.55, 0.7, P.flow()
    down = s * (1 + eta * (s / t - 1))
    with jax.enable_x64(True):
        clean = MIXTURE.denoiser(process)(jnp.asarray(NOISE), t)
        x_down = NOISE + (down - t) * (clean.eps - clean.x)
        renoise = np.sqrt(s**2 - (down * (1 - s) / (1 - down)) ** 2)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys(KEY, 8), 0)
        z = jax.vmap(lambda key: jax.random.normal(key, (2,), jnp.float64))(keys)
        want = (1 - s) / (1 - down) * x_down + renoise * z
    np.testing.assert_allclose(final(SAMPLERS["euler_ancestral"](eta=eta), process, [t, s]), want, atol=1e-12)


def test_dpmpp_3m_sde_without_noise_is_a_parabola_with_half_its_weight():
    process = P.vp_linear()
    times = grids.uniform(process, 6, end=0.05)
    ours = final(SAMPLERS["dpmpp_3m_sde"](eta=0.0), process, times)
    np.testing.assert_allclose(ours, final(_multistep("x", 3, halved, 2), process, times), atol=1e-12)


@pytest.mark.parametrize("process", ["vp_linear", "edm", "flow"])
def test_euler_maruyama_without_noise_is_euler_in_t(process):
    process = P.PROCESSES[process]()
    times = np.linspace(0.9, 0.3, 5)
    with jax.enable_x64(True):
        x = jnp.asarray(NOISE)
        for t, s in itertools.pairwise(times):
            x = x + (s - t) * velocity(process, MIXTURE.denoiser(process)(x, t), t)
    np.testing.assert_allclose(final(SAMPLERS["euler_maruyama"](eta=0.0), process, times), x, atol=1e-10)


def test_first_steps_of_the_multistep_methods_are_ddim():
    process = P.vp_linear()
    want = final(SAMPLERS["ddim"](eta=1.0), process, [0.9, 0.5])
    for name, options in [("dpmpp_2m_sde", {}), ("dpmpp_3m_sde", {}), ("sa_solver", dict(tau=1.0))]:
        np.testing.assert_allclose(final(SAMPLERS[name](**options), process, [0.9, 0.5]), want, atol=1e-12)


def test_tcd_with_all_noise_fresh_is_lcm():
    process = P.vp_linear()
    times = grids.uniform(process, 4, end=0.05)
    np.testing.assert_allclose(
        *(final(SAMPLERS[n](**o), process, times) for n, o in [("tcd", dict(gamma=1.0)), ("lcm", {})]), atol=1e-10
    )


def test_reverse_diffusion_is_the_predictor_of_a_corrector_that_does_nothing():
    """Both predictors; the corrector's own noise is off with snr = 0, the predictor's is from another key."""
    process, times = P.vp_linear(), [0.9, 0.5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.full(shape, 0.7, dtype))
        for name in ("reverse_diffusion", "euler_maruyama"):
            ours = final(SAMPLERS["predictor_corrector"](name, snr=0.0), process, times)
            np.testing.assert_allclose(ours, final(SAMPLERS[name](), process, times), atol=1e-12)


def test_reverse_diffusion_is_the_predictor_of_algorithm_3():
    """x_s = (2 - sqrt(1 - beta)) x_t + beta score + sqrt(beta) z on VP, beta = 1 - alpha_t^2 / alpha_s^2."""
    process, (t, s) = P.vp_linear(), (0.9, 0.6)
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.full(shape, 0.7, dtype))
        (alpha_t, sigma_t), (alpha_s, _) = numbers(process, t), numbers(process, s)
        beta = 1 - (alpha_t / alpha_s) ** 2
        score = -MIXTURE.denoiser(process)(jnp.asarray(NOISE), t).eps / sigma_t
        want = (2 - np.sqrt(1 - beta)) * NOISE + beta * score + np.sqrt(beta) * 0.7
        np.testing.assert_allclose(final(SAMPLERS["reverse_diffusion"](), process, [t, s]), want, atol=1e-12)


SCALED = [name for name in STOCHASTIC if "s_noise" in inspect.signature(SAMPLERS[name]).parameters]


@pytest.mark.parametrize("name", SCALED)
def test_s_noise_multiplies_the_noise(name):
    """On a Gaussian x is affine in the noise: what s_noise = 2 adds is twice what 1 adds."""
    process = P.vp_linear()
    with jax.enable_x64(True):
        x_T, times = jnp.asarray(NOISE), jnp.asarray([0.6, 0.5, 0.4])
        run = jax.jit(
            lambda x: [
                sample(SAMPLERS[name](s_noise=scale), GAUSSIAN.denoiser(process), process, x, times, KEY)
                for scale in (0.0, 1.0, 2.0)
            ]
        )
        none, one, two = (np.asarray(x) for x in run(x_T))
    assert np.abs(one - none).max() > 0.05
    np.testing.assert_allclose(two - none, 2 * (one - none), atol=1e-10)


def test_the_learned_variance_lies_between_small_and_large():
    """log_var = v: -1 is small, 1 is large, and 0 their geometric mean."""
    process = P.discrete_vp()

    def run(variance, v=None):
        def denoise(x, t):
            clean = MIXTURE.denoiser(process)(x, t)
            return clean if v is None else clean._replace(log_var=jnp.full_like(x, v))

        return np.asarray(
            sample(SAMPLERS["ddpm"](variance), denoise, process, jnp.asarray(NOISE, jnp.float32), times, KEY)
        )

    times = jnp.asarray([0.5, 0.4])
    small, large = run("small"), run("large")
    np.testing.assert_allclose(run("learned", -1.0), small, atol=1e-6)
    np.testing.assert_allclose(run("learned", 1.0), large, atol=1e-6)
    # Standard deviations a < b, a / b = sigma_s / sigma_t: v = 0 has sqrt(a b).
    ratio = numbers(process, 0.4)[1] / numbers(process, 0.5)[1]
    np.testing.assert_allclose(
        run("learned", 0.0) - small, (np.sqrt(ratio) - ratio) / (1 - ratio) * (large - small), atol=1e-5
    )
    with pytest.raises(ValueError, match="expected a denoiser whose Clean has log_var"):
        run("learned")


def test_a_brownian_path_has_the_law_of_one():
    """10000 rows: covariances of W at five times, on and off the tree's points, are min(t, s) within 4 standard errors."""
    times = (0.1, 0.25, 0.3, 0.77, 1.0)
    keys = row_keys(KEY, 10000)
    path = jax.jit(lambda keys, t: brownian(keys, jnp.zeros((len(keys), 1)), t, 12))
    values = np.concatenate([path(keys, t) for t in times], -1)
    exact = np.minimum.outer(times, times)
    np.testing.assert_allclose(values.T @ values / 10000, exact, atol=4 * np.sqrt(2) / 100)
    np.testing.assert_allclose(np.diff(values, axis=-1).var(0), np.diff(times), rtol=4 * np.sqrt(2) / 100)
    np.testing.assert_array_equal(path(keys[:3], 0.3), values[:3, 2:3])
    assert np.abs(path(keys, 0.0)).max() == 0


def test_a_finer_tree_keeps_the_path():
    """W at points of the tree does not depend on its depth; between them it moves by the width of a cell."""
    keys, like = row_keys(KEY, 500), jnp.zeros((500, 1))
    np.testing.assert_allclose(brownian(keys, like, 0.375, 6), brownian(keys, like, 0.375, 3), atol=1e-6)
    change = np.std(brownian(keys, like, 0.3, 14) - brownian(keys, like, 0.3, 8))
    assert 0 < change < 2 * 2**-4


@pytest.mark.parametrize("name", ["euler_maruyama", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"])
def test_errors_fall_along_one_path(name):
    """Strong order 1: along a fixed path the change from n to 2 n steps halves; with fresh noise it does not fall."""
    process = P.vp_linear()
    start, end = 0.9, 0.3
    sampler, fresh = SAMPLERS[name](depth=10), SAMPLERS[name]()
    x_T = np.random.default_rng(2).standard_normal((50, 2))
    finest = np.linspace(start, end, 257)
    times = [np.append(finest[:: 256 // n], np.full(256 - n, end)) for n in (32, 64, 128, 256)]

    def changes(sampler):
        run = jax.jit(lambda x, times: sample(sampler, MIXTURE.denoiser(process), process, x, times, KEY))
        with jax.enable_x64(True):
            x = [np.asarray(run(jnp.asarray(x_T), jnp.asarray(grid))) for grid in times]
        return [np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.pairwise(x)]

    along = changes(sampler)
    slope = -np.polyfit(range(3), np.log2(along), 1)[0]
    assert abs(slope - 1) < 0.15, along
    other = changes(fresh)
    assert other[-1] > 0.5 * other[0] > along[0]


# Evaluations in a run of n steps on vp_linear's uniform grid, and in one of 3 steps whose last is into sigma = 0.
COUNTED = {
    "restart": (lambda n: 2 * n + 2 * 5 * 2, 5 + (2 * 5 - 1) * 2),
    "edm_stochastic": (lambda n: 2 * n, 5),
    "sa_solver_pece": (lambda n: 2 * n, 6),
    "predictor_corrector": (lambda n: 2 * n, 6),
    "annealed_langevin": (lambda n: 5 * n, 11),
    **{name: (lambda n: 2 * n, 5) for name in ("dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "seeds_2")},
    "seeds_3": (lambda n: 3 * n, 7),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_evaluations_are_counted_and_padding_costs_none(name):
    process, sampler, calls = P.vp_linear(), SAMPLERS[name](), []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return GAUSSIAN.denoiser(process)(x_t, t)

    run = jax.jit(lambda x, times: sample(sampler, denoise, process, x, times, KEY))
    count, into_clean = COUNTED.get(name, (lambda n: n, 3))
    for n, end, want in ((3, None, count(3)), (7, None, count(7)), (3, 0.0, into_clean)):
        calls.clear()
        x = run(jnp.asarray(NOISE, jnp.float32), grids.pad(grids.uniform(process, n, end=end), 9)).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == want and np.isfinite(x).all()
        assert min(calls) > 0


def test_from_pure_noise_to_clean_data_in_single_precision_and_no_name_is_another_s_alias():
    """On the flow, from alpha = 0 to sigma = 0: finite, all different, and the last step adds no noise (but for those that
    put noise back before it)."""
    process, found = P.flow(), {}
    times = grids.trailing(process, 5, end=0.0)
    for name in STOCHASTIC:
        run = jax.jit(lambda x, times, key: sample(SAMPLERS[name](), MIXTURE.denoiser(process), process, x, times, key))  # noqa: B023
        x = found[name] = np.asarray(run(jnp.asarray(NOISE, jnp.float32), times, KEY))
        assert x.dtype == np.float32 and np.isfinite(x).all(), name
        if name not in ("restart", "edm_stochastic", "predictor_corrector"):
            one, other = (run(jnp.asarray(x), grids.pad(times[-2:], 5), jax.random.key(i)) for i in (1, 2))
            np.testing.assert_array_equal(one, other, err_msg=name)
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert np.abs(a - b).max() > 1e-4, (one, other)


@pytest.mark.parametrize("process", ["discrete_vp", "vp_cosine", "sub_vp"])
def test_tables_cosine_and_sub_vp_are_sampled_too(process):
    """In single precision, to sigma = 0 where the process has it."""
    process = P.PROCESSES[process]()
    times = grids.uniform(process, 5, end=0.0)
    for name in ("dpmpp_sde", "sa_solver", "er_sde", "edm_stochastic", "restart", "euler_maruyama"):
        x = jax.jit(partial(sample, SAMPLERS[name](), GAUSSIAN.denoiser(process), process))(
            jnp.asarray(NOISE, jnp.float32), times, KEY
        )
        assert np.isfinite(x).all(), name


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SAMPLERS["ddpm"]("fixed"), "variance is 'fixed'"),
        (lambda: SAMPLERS["euler_ancestral"](eta=1.5), "eta is 1.5"),
        (lambda: SAMPLERS["dpm_2_ancestral"](s_noise=-1.0), "s_noise is -1.0"),
        (lambda: SAMPLERS["dpmpp_2m_sde"](eta=-1.0), "eta is -1.0"),
        (lambda: SAMPLERS["euler_maruyama"](depth=31), "depth is 31"),
        (lambda: SAMPLERS["dpmpp_sde"](r=0.0), "r is 0.0"),
        (lambda: SAMPLERS["seeds_2"](r=1.5), "r is 1.5"),
        (lambda: SAMPLERS["seeds_3"](r_1=0.7), "r_1, r_2 are 0.7"),
        (lambda: SAMPLERS["er_sde"](order=4), "order is 4"),
        (lambda: SAMPLERS["sa_solver"](predictor=4), "predictor is 4"),
        (lambda: SAMPLERS["sa_solver_pece"](corrector=5), "corrector is 5"),
        (lambda: SAMPLERS["sa_solver"](tau=-1.0), "tau is -1.0"),
        (lambda: SAMPLERS["edm_stochastic"](s_churn=-1.0), "s_churn is -1.0"),
        (lambda: SAMPLERS["edm_stochastic"](s_tmin=2.0, s_tmax=1.0), "expected s_tmin <= s_tmax"),
        (lambda: SAMPLERS["restart"](low=3.0), "low, high are 3.0, 2.0"),
        (lambda: SAMPLERS["restart"](repeats=0), "repeats, steps are 0, 5"),
        (lambda: SAMPLERS["predictor_corrector"]("heun"), "predictor is 'heun'"),
        (lambda: SAMPLERS["predictor_corrector"](snr=-0.1), "snr is -0.1"),
        (lambda: SAMPLERS["predictor_corrector"](corrections=0), "corrections is 0"),
        (lambda: SAMPLERS["annealed_langevin"](steps=0), "steps is 0"),
        (lambda: SAMPLERS["annealed_langevin"](step_size=0.0), "step_size is 0.0"),
        (lambda: SAMPLERS["tcd"](gamma=1.1), "gamma is 1.1"),
    ],
)
def test_wrong_options_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
