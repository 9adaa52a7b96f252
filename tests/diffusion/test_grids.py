"""Time grids: length, ends, direction, spacing."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ldm_jax.diffusion import grids as G
from ldm_jax.diffusion import process as P

TABLE = {"leading", "linspace"}
OWN_ENDS = {"align_your_steps"}  # a grid of published noise levels


def level(process, times):
    """sigma / alpha."""
    return np.exp(-0.5 * np.asarray(P.log_snr(process, times), np.float64))


@pytest.mark.parametrize("process", [P.PROCESSES[name]() for name in sorted(P.PROCESSES)])
def test_every_grid_falls_strictly_from_start_to_end(process):
    for name, grid in G.GRIDS.items():
        if process.levels is None and name in TABLE:
            continue
        for n in (7,) if name in TABLE else (1, 2, 7):
            times = np.asarray(grid(process, n))
            assert times.shape == (n + 1,) and (np.diff(times) < 0).all(), name
            if name in OWN_ENDS:
                np.testing.assert_allclose(level(process, times[[0, -1]]), [14.615, 0.029], rtol=1e-3)
            elif process.levels is None or name not in TABLE | {"trailing"}:
                start = 1.0 if name == "trailing" else process.t_max
                np.testing.assert_allclose(times[[0, -1]], [start, process.t_min], rtol=1e-6, err_msg=name)
            else:
                assert times[-1] == 0.0


def test_spacings_are_what_they_are_called():
    process, n = P.vp_linear(), 9
    np.testing.assert_allclose(np.diff(G.uniform(process, n), 2), 0, atol=1e-6)
    np.testing.assert_allclose(np.diff(np.sqrt(G.quadratic(process, n)), 2), 0, atol=1e-6)
    value = np.asarray(P.log_snr(process, G.by_log_snr(process, n)), np.float64)
    np.testing.assert_allclose(np.diff(value, 2), 0, atol=1e-3)
    for rho in (3.0, 7.0):
        np.testing.assert_allclose(np.diff(level(process, G.karras(process, n, rho=rho)) ** (1 / rho), 2), 0, atol=2e-4)
    angle = np.arctan(level(process, G.kl_optimal(process, n)))
    np.testing.assert_allclose(np.diff(angle, 2), 0, atol=2e-6)
    u = np.linspace(1, 0, n + 1)
    np.testing.assert_allclose(G.shifted(P.flow(), n, shift=3.0), 3 * u / (1 + 2 * u), atol=1e-6)
    for rho in (0.5, 2.0):
        value = np.log(level(process, G.polyexponential(process, n, rho=rho)))
        np.testing.assert_allclose((value - value[-1]) / (value[0] - value[-1]), u**rho, atol=1e-5)


@pytest.mark.parametrize("n", [250, 50, 10])
def test_linspace_is_the_respacing_of_guided_diffusion(n):
    """Its space_timesteps keeps the entries round(i (N - 1) / (n - 1)), whatever divides whatever."""
    process = P.discrete_vp()
    entries = [round(i * (process.levels - 1) / (n - 1)) for i in range(n)]
    times = G.linspace(process, n)
    np.testing.assert_allclose(process.time_input(times[:-1]), entries[::-1], atol=1e-3)
    assert times[-1] == 0 and (n != 250 or entries[:4] == [0, 4, 8, 12])


def test_no_two_names_are_one_grid_but_where_the_docstring_says_so():
    """karras is uniform in EDM's own time, and polyexponential with rho = 1 is log_snr; so every pair is tried on VP."""
    process = P.discrete_vp()
    grids = {name: np.asarray(grid(process, 9)) for name, grid in G.GRIDS.items()}
    same = {
        pair
        for pair in itertools.combinations(sorted(grids), 2)
        if np.abs(grids[pair[0]] - grids[pair[1]]).max() < 1e-3
    }
    assert same == {("log_snr", "polyexponential")}


def test_kl_optimal_is_uniform_where_time_is_the_angle_and_needs_no_stand_in_for_infinity():
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the flow's sigma / alpha at the same angles is t / (1 - t)."""
    trig = P.Process(lambda t: jnp.cos(0.5 * math.pi * t), lambda t: jnp.sin(0.5 * math.pi * t), lambda t: t)
    np.testing.assert_allclose(G.kl_optimal(trig, 9, start=0.9, end=0.1), np.linspace(0.9, 0.1, 10), atol=1e-6)
    ratio = np.tan(0.5 * np.pi * np.linspace(1, 0, 10)[1:])
    np.testing.assert_allclose(G.kl_optimal(P.flow(), 9), np.append(1, ratio / (1 + ratio)), atol=1e-6)


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (0.5, 0.9), (2.0, 3.0)])
def test_beta_is_the_quantiles_of_scipy(a, b):
    for n in (1, 2, 9, 50):
        want = stats.beta.ppf(np.linspace(1, 0, n + 1), a, b)
        np.testing.assert_allclose(G.beta(P.flow(), n, a=a, b=b), want, atol=5e-6)
        times = G.beta(P.ve(), n, a=a, b=b, by_level=True)
        np.testing.assert_allclose(level(P.ve(), times), 0.01 + 49.99 * want, rtol=1e-4)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            G.beta(P.flow(), 9, a=a, b=b), stats.beta.ppf(np.linspace(1, 0, 10), a, b), atol=1e-13
        )


@pytest.mark.parametrize("n, linear", [(50, None), (9, None), (8, 3)])
def test_linear_quadratic_is_linear_then_a_parabola_that_meets_it_smoothly(n, linear):
    noise = 1 - np.asarray(G.linear_quadratic(P.flow(), n, linear_steps=linear), np.float64)
    linear = linear or n // 2
    np.testing.assert_allclose(noise[: linear + 1], 0.025 * np.arange(linear + 1) / linear, atol=1e-6)
    np.testing.assert_allclose(np.diff(noise[linear:], 3), 0, atol=1e-6)
    bend = np.diff(noise[linear:], 2)[0]
    # A parabola's first difference is its slope at the joint and half a bend.
    assert np.diff(noise)[linear] == pytest.approx(0.025 / linear + 0.5 * bend, abs=1e-6)
    np.testing.assert_allclose(noise[[0, -1]], [0, 1])


def test_the_shift_grows_with_the_number_of_tokens():
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        np.testing.assert_allclose(
            G.dynamic_shifted(P.flow(), 9, tokens=tokens), G.shifted(P.flow(), 9, shift=math.exp(mu)), atol=1e-7
        )


def test_aligned_steps_are_the_published_levels_and_their_geometric_means():
    for model, process in (
        ("sd15", P.discrete_vp("scaled_linear")),
        ("sdxl", P.vp_linear()),
        ("svd", P.edm(sigma_max=700)),
    ):
        table = G.ALIGNED[model]
        np.testing.assert_allclose(level(process, G.align_your_steps(process, 10, model=model)), table, rtol=1e-3)
        finer = level(process, G.align_your_steps(process, 20, model=model))
        np.testing.assert_allclose(finer[::2], table, rtol=1e-3)
        np.testing.assert_allclose(finer[1::2], np.sqrt(np.multiply(table[1:], table[:-1])), rtol=1e-3)
    times = G.align_your_steps(P.flow(), 10, end=0.0)
    assert times[-1] == 0 and level(P.flow(), times[:-1]) == pytest.approx(G.ALIGNED["sd15"][:-1], rel=1e-3)


def test_grids_of_levels_can_be_made_inside_jit():
    for name in ("align_your_steps", "beta", "kl_optimal", "polyexponential", "linear_quadratic", "dynamic_shifted"):
        grid = G.GRIDS[name]
        np.testing.assert_allclose(
            jax.jit(lambda grid=grid: grid(P.vp_linear(), 7))(), grid(P.vp_linear(), 7), atol=1e-6
        )


def test_karras_on_edm_is_uniform_in_its_time():
    np.testing.assert_allclose(G.karras(P.edm(), 18), G.uniform(P.edm(), 18), atol=1e-5)


def test_start_and_end_are_met_exactly():
    for name in sorted(set(G.GRIDS) - TABLE - {"trailing"}):
        times = G.GRIDS[name](P.flow(), 5, start=0.8, end=0.1)
        assert float(times[0]) == pytest.approx(0.8) and float(times[-1]) == pytest.approx(0.1)


def test_table_grids_visit_the_entries_of_the_table():
    process = P.discrete_vp()
    index = lambda times: np.asarray(process.time_input(times[:-1]))  # noqa: E731
    np.testing.assert_array_equal(index(G.leading(process, 4)), [750, 500, 250, 0])
    np.testing.assert_array_equal(index(G.leading(process, 4, offset=1)), [751, 501, 251, 1])
    np.testing.assert_array_equal(index(G.trailing(process, 4)), [999, 749, 499, 249])
    np.testing.assert_array_equal(index(G.linspace(process, 4)), [999, 666, 333, 0])
    assert index(G.trailing(process, 1000)).tolist() == list(range(999, -1, -1))


def test_pad_repeats_the_last_time():
    np.testing.assert_array_equal(G.pad(jnp.asarray([1.0, 0.5, 0.2]), 5), np.float32([1, 0.5, 0.2, 0.2, 0.2, 0.2]))
    with pytest.raises(ValueError, match="grid has 2 steps, expected at most 1"):
        G.pad(jnp.asarray([1.0, 0.5, 0.2]), 1)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: G.uniform(P.flow(), 0), "number of steps is 0"),
        (lambda: G.karras(P.flow(), 5, end=1.0), "from 1.0 to 1.0"),
        (lambda: G.leading(P.flow(), 5), "expected a discrete process"),
        (lambda: G.trailing(P.discrete_vp(), 1001), "expected 1 to 1000"),
        (lambda: G.shifted(P.flow(), 5, shift=0.0), "shift is 0.0"),
        (lambda: G.leading(P.discrete_vp(), 5, end=0.9), "expected it to fall"),
        (lambda: G.polyexponential(P.flow(), 5, rho=-1.0), "rho is -1.0"),
        (lambda: G.beta(P.flow(), 5, b=0.0), "a and b are 0.6 and 0.0"),
        (lambda: G.dynamic_shifted(P.flow(), 5, tokens=0), "number of tokens is 0"),
        (lambda: G.dynamic_shifted(P.flow(), 5, base_tokens=4096), "both 4096"),
        (lambda: G.linear_quadratic(P.flow(), 5, linear_steps=5), "linear_steps is 5, expected 1 to 4"),
        (lambda: G.linear_quadratic(P.flow(), 4, threshold=0.75), r"threshold is 0.75, expected it in \(0, 0.75\)"),
        (lambda: G.align_your_steps(P.flow(), 0), "number of steps is 0"),
        (lambda: G.align_your_steps(P.flow(), 5, model="sd4"), "model is 'sd4', expected one of"),
        (lambda: G.align_your_steps(P.ve(), 5, model="svd"), "from 700 to 0.002, expected a process that has them all"),
        (lambda: G.align_your_steps(P.flow(), 5, start=0.5), "expected it to fall"),
    ],
)
def test_impossible_grids_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
