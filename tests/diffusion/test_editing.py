"""Starting from an image, keeping a region, interpolating noise: limits, closed forms, the conditional law."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import editing as E
from ldm_jax.diffusion import grids
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.exact import GAUSSIAN, MIXTURE
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.samplers.ode import ddim

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, EPS, NOISE = (jnp.asarray(RNG.standard_normal((6, 2)), jnp.float32) for _ in range(3))
KEEP = jnp.asarray([1.0, 0.0])
# One of each kind of carry: a state, a history, a corrected history, a history on a Brownian path; and one of fresh noise.
METHODS = {name: SAMPLERS[name]() for name in ("heun", "dpmpp_2m", "uni_pc", "dpmpp_2m_sde")} | {
    "ddim_eta": ddim(eta=1.0)
}


EULER = SAMPLERS["euler"]()


def run(sampler, process, x_T, times, key=KEY, problem=MIXTURE, **options):
    """`sample` with the exact denoiser, jitted."""
    denoise = problem.denoiser(process)
    return jax.jit(lambda x, times, key: sample(sampler, denoise, process, x, times, key, **options))(x_T, times, key)


# --- starting from an image -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 7, 50])
def test_strength_is_the_share_of_the_steps_that_are_run(n):
    process, times = P.vp_linear(), grids.uniform(P.vp_linear(), n)
    for strength in (0.0, 0.2, 0.58, 0.75, 0.999, 1.0):
        x_t, rest = E.noised_start(process, X, EPS, times, strength)
        steps = min(int(n * strength), n)  # diffusers' get_timesteps
        np.testing.assert_array_equal(rest[: steps + 1], times[n - steps :])
        assert rest.shape == times.shape and (rest[steps:] == times[-1]).all()
        np.testing.assert_array_equal(x_t, P.corrupt(process, X, EPS, times[n - steps]))


def test_strength_zero_returns_the_image_and_one_forgets_it():
    """On the flow alpha(1) = 0: at strength 1 nothing of x is left."""
    process = P.flow()
    times = grids.uniform(process, 5)

    @jax.jit
    def edit(x, strength):
        x_t, rest = E.noised_start(process, x, EPS, times, strength)
        return sample(METHODS["heun"], MIXTURE.denoiser(process), process, x_t, rest)

    np.testing.assert_array_equal(edit(X, 0.0), X)
    np.testing.assert_array_equal(edit(X, 1.0), edit(X + 1, 1.0))
    np.testing.assert_allclose(edit(X, 1.0), run(METHODS["heun"], process, EPS, times), atol=1e-6)
    assert edit._cache_size() == 1  # the strength is traced


def test_an_edit_ends_where_the_closed_form_does():
    process = P.vp_linear()
    with jax.enable_x64(True):
        times = grids.kl_optimal(process, 200)
        x_t, rest = E.noised_start(process, np.asarray(X, float), np.asarray(EPS, float), times, 0.6)
        ours = run(METHODS["heun"], process, x_t, rest, problem=GAUSSIAN)
        exact = GAUSSIAN.endpoint(process, np.asarray(x_t), float(rest[0]), float(rest[-1]))
    assert float(rest[0]) == float(times[80])
    np.testing.assert_allclose(ours, exact, atol=1e-4)


# --- keeping a region -------------------------------------------------------------------------------------------------


def kept(way, name):
    """(keep, ...) -> what the flow's grid of 6 steps leads NOISE to; one program for every mask."""
    process, times, sampler = P.flow(), grids.uniform(P.flow(), 6), METHODS[name]

    def transform(keep, resample):
        if way == "preserve":
            return E.preserve(sampler, X, keep, EPS)
        return E.repaint(sampler, X, keep, jump_length=2, resample=resample)

    @partial(jax.jit, static_argnums=1)
    def go(keep, resample=3):
        return sample(transform(keep, resample), MIXTURE.denoiser(process), process, NOISE, times, KEY)

    return go


@pytest.mark.parametrize("way", ["preserve", "repaint"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_kept_region_is_the_original_and_the_rest_the_sampler_s(name, way):
    """A part of x, all of it, and nothing: then the sampler itself is left."""
    go, nothing = kept(way, name), jnp.zeros((6, 2))
    out = go(jnp.tile(KEEP, (6, 1)))
    np.testing.assert_array_equal(out[:, 0], X[:, 0])
    assert np.isfinite(out).all() and np.abs(out[:, 1] - X[:, 1]).min() > 1e-3
    np.testing.assert_array_equal(go(jnp.ones((6, 2))), X)
    alone = run(METHODS[name], P.flow(), NOISE, grids.uniform(P.flow(), 6))
    if way == "preserve":
        np.testing.assert_allclose(go(nothing), alone, atol=1e-6)
    elif not METHODS[name].stochastic:
        np.testing.assert_allclose(go(nothing, 1), alone, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_can_keep_a_region(name):
    process, times = P.vp_linear(), grids.uniform(P.vp_linear(), 3)
    for sampler in (E.preserve(SAMPLERS[name](), X, KEEP, EPS), E.repaint(SAMPLERS[name](), X, KEEP)):
        denoise = lambda x_t, t: MIXTURE.denoiser(process)(x_t, t)._replace(log_var=jnp.zeros_like(x_t))  # noqa: E731
        shape = jax.eval_shape(lambda x, s=sampler, d=denoise: sample(s, d, process, x, times, KEY), NOISE)
        assert shape.shape == NOISE.shape and shape.dtype == jnp.float32


@pytest.mark.parametrize("process", [P.vp_linear(), P.ve(), P.discrete_vp()])
def test_the_kept_region_is_on_its_own_path_at_every_time(process):
    times = grids.by_log_snr(process, 5)
    x_T = P.prior_std(process, times[0]) * NOISE
    states = run(E.preserve(METHODS["heun"], X, KEEP, EPS), process, x_T, times, trajectory=True)
    for x_t, t in zip(states[1:], times[1:]):
        np.testing.assert_allclose(x_t[:, 0], P.corrupt(process, X, EPS, t)[:, 0], rtol=1e-5, atol=1e-5)
    held = P.corrupt(process, X, EPS, times[0]) * KEEP + (1 - KEEP) * x_T  # the start is held as well
    np.testing.assert_allclose(
        states[-1], run(E.preserve(METHODS["heun"], X, KEEP, EPS), process, held, times), atol=1e-5
    )
    # Euler from there, by hand
    one = run(E.preserve(EULER, X, KEEP, EPS), process, x_T, times[:2])
    clean = MIXTURE.denoiser(process)(held, times[0])
    np.testing.assert_allclose(one[:, 1], P.corrupt(process, clean.x, clean.eps, times[1])[:, 1], rtol=1e-4, atol=1e-4)


def test_a_soft_mask_blends():
    process, times = P.flow(), grids.uniform(P.flow(), 1)
    half = run(E.preserve(EULER, X, jnp.asarray(0.25), EPS), process, NOISE, times)
    held = 0.25 * EPS + 0.75 * NOISE
    np.testing.assert_allclose(half, 0.25 * X + 0.75 * MIXTURE.denoiser(process)(held, 1.0).x, atol=1e-5)


def schedule(n, jump_length, resample):
    """Which steps RePaint runs, of n: i counts from the noise. Lugmayr et al. 2022, figures 9 and 10.

    Levels fall from n to 0; the first `resample - 1` times that a multiple of jump_length below n - jump_length is reached,
    the state climbs jump_length levels.
    """
    jumps = {level: resample - 1 for level in range(0, n - jump_length, jump_length)}
    level, steps = n, []
    while level > 0:
        steps.append(n - level)
        level -= 1
        if jumps.get(level, 0):
            jumps[level] -= 1
            level += jump_length
    return steps


@pytest.mark.parametrize("n, jump_length, resample", [(6, 2, 3), (7, 3, 2), (5, 1, 4), (4, 4, 5), (7, 3, 1)])
def test_repaint_runs_the_published_schedule_and_padding_costs_nothing(n, jump_length, resample):
    process, calls = P.flow(), []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t, ordered=True)
        return MIXTURE.denoiser(process)(x_t, t)

    sampler = E.repaint(EULER, X, KEEP, jump_length=jump_length, resample=resample)
    go = jax.jit(lambda times: sample(sampler, denoise, process, NOISE, times, KEY))
    times = grids.uniform(process, n)
    padded = go(grids.pad(times, n + 3)).block_until_ready()
    jax.effects_barrier()
    wanted = schedule(n, jump_length, resample)
    np.testing.assert_allclose(calls, times[np.asarray(wanted)], atol=1e-6)
    assert len(wanted) == n + (resample - 1) * jump_length * max(math.ceil(n / jump_length) - 1, 0)
    assert len(wanted) <= sampler.evaluations * n and sampler.stochastic
    if n == 6:
        np.testing.assert_allclose(padded, go(times), atol=1e-6)


def test_a_multistep_method_starts_anew_after_a_jump(monkeypatch):
    """Noised by nothing, a jump is x_t = alpha_t / alpha_s x_s; from there the block is dpmpp_2m's own run."""
    process, sampler = P.vp_linear(), METHODS["dpmpp_2m"]
    times = grids.by_log_snr(process, 6)
    monkeypatch.setattr(E, "noise", lambda keys, like: jnp.zeros_like(like))
    out = run(E.repaint(sampler, X, jnp.zeros(2), jump_length=3, resample=2), process, NOISE, times)
    x_t = process.alpha(times[3]) / process.alpha(times[6]) * run(sampler, process, NOISE, times)
    np.testing.assert_allclose(out, run(sampler, process, x_t, times[3:]), atol=1e-5)


def test_a_row_depends_on_itself_and_its_key_alone():
    process, times, inner = P.flow(), grids.uniform(P.flow(), 4), METHODS["ddim_eta"]
    for make in (
        lambda rows: E.preserve(inner, X[:rows], KEEP, EPS[:rows]),
        lambda rows: E.repaint(inner, X[:rows], KEEP, jump_length=2, resample=3),
    ):
        whole, some = (run(make(rows), process, NOISE[:rows], times) for rows in (6, 2))
        np.testing.assert_allclose(some, whole[:2], atol=1e-6)


@pytest.mark.parametrize("name, sampler", [("heun", METHODS["heun"]), ("ddim_eta", METHODS["ddim_eta"])])
def test_repaint_follows_the_conditional_law_more_closely_than_replacement(name, sampler):
    """p(x_1 | x_0) of a Gaussian is N(slope x_0, std^2); the distance is Wasserstein's, averaged over x_0.

    4000 rows: its standard error is about 0.01. Measured: 0.22 and 0.05 for heun, 0.12 and 0.04 for ddim with eta = 1.
    """
    process, rows = P.flow(), 4000
    cov = GAUSSIAN.rotation @ np.diag(GAUSSIAN.std**2) @ GAUSSIAN.rotation.T
    slope = cov[0, 1] / cov[0, 0]
    std = math.sqrt(cov[1, 1] - slope * cov[0, 1])
    rng = np.random.default_rng(1)
    x = jnp.asarray(GAUSSIAN.mean + rng.standard_normal((rows, 2)) * GAUSSIAN.std @ GAUSSIAN.rotation.T, jnp.float32)
    noise, times = jax.random.normal(KEY, (rows, 2)), grids.kl_optimal(process, 40)

    def distance(sampler):
        out = np.asarray(run(sampler, process, noise, times, problem=GAUSSIAN), np.float64)
        known, free = (out - GAUSSIAN.mean).T
        fit = known @ free / (known @ known)
        bias = free.mean() - fit * known.mean()
        return math.sqrt((fit - slope) ** 2 * cov[0, 0] + bias**2 + (np.std(free - fit * known) - std) ** 2)

    plain = distance(E.preserve(sampler, x, KEEP, noise))
    painted = distance(E.repaint(sampler, x, KEEP))
    assert plain > 0.1 and painted < 0.5 * plain, (plain, painted)


# --- interpolating noise ----------------------------------------------------------------------------------------------


def test_slerp_walks_the_arc_at_constant_speed_and_keeps_the_length():
    a, b = jnp.asarray([[3.0, 0.0, 0.0]]), jnp.asarray([[0.0, 3.0, 0.0]])
    for w in np.linspace(0, 1, 5):
        angle = w * np.pi / 2
        np.testing.assert_allclose(E.slerp(a, b, w), [[3 * np.cos(angle), 3 * np.sin(angle), 0]], atol=1e-6)
    shape = (5, 4, 4, 3)
    a, b = (jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32) for i in (1, 2))
    a, b = (x / jnp.sqrt(jnp.mean(x**2, (1, 2, 3), keepdims=True)) for x in (a, b))
    w = jnp.asarray([0.0, 0.25, 0.5, 0.75, 1.0])
    out = jax.jit(E.slerp)(a, b, w)
    np.testing.assert_allclose(jnp.mean(out**2, (1, 2, 3)), 1, atol=1e-5)
    np.testing.assert_allclose(out[0], a[0], atol=1e-6)
    np.testing.assert_allclose(out[-1], b[-1], atol=1e-6)
    np.testing.assert_allclose(out[1], E.slerp(a, b, 0.25)[1], atol=1e-6)
    np.testing.assert_allclose(E.slerp(a, b, 0.3), E.slerp(b, a, 0.7), atol=1e-6)
    assert float(jnp.mean((0.5 * (a + b)) ** 2)) < 0.6  # the straight line loses half


def test_slerp_is_safe_where_there_is_no_arc():
    a = jnp.asarray([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    b = jnp.asarray([[2.0, 4.0], [1.0, 2.0], [-1.0, -2.0], [1.0, 0.0], [1.0, 2.0 + 1e-6]])
    np.testing.assert_allclose(E.slerp(a, b, 0.25), 0.75 * a + 0.25 * b, atol=1e-6)
    gradient = jax.grad(lambda a, b: E.slerp(a, b, 0.5).sum(), (0, 1))(a, b)
    assert all(np.isfinite(part).all() for part in gradient)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: E.noised_start(P.flow(), X, EPS, jnp.asarray([1.0, 0.0]), 1.2), "strength is 1.2"),
        (
            lambda: E.preserve(EULER, X, jnp.ones(3), EPS),
            r"keep has shape \(3,\), expected one that broadcasts",
        ),
        (lambda: E.preserve(EULER, X, jnp.ones((2, 6, 2)), EPS), "keep has shape"),
        (lambda: E.preserve(EULER, X, KEEP, EPS[:2]), r"eps has shape \(2, 2\)"),
        (lambda: E.repaint(EULER, X, jnp.ones(5)), "keep has shape"),
        (lambda: E.repaint(EULER, X, KEEP, jump_length=0), "jump_length is 0"),
        (lambda: E.repaint(EULER, X, KEEP, resample=0), "resample is 0"),
        (
            lambda: run(E.repaint(EULER, X, KEEP), P.flow(), NOISE, jnp.asarray([1.0, 0.0]), None),
            "expected a key",
        ),
    ],
)
def test_a_wrong_call_is_refused_with_the_reason(make, words):
    with pytest.raises(ValueError, match=words):
        make()
