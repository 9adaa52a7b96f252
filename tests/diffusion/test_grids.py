"""Time grids: length, ends, direction, spacing."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import grids as G
from ldm_jax.diffusion import process as P

CONTINUOUS = sorted(set(P.PROCESSES) - {"discrete_vp"})
TABLE = {"leading", "linspace"}


@pytest.mark.parametrize("process", [P.PROCESSES[name]() for name in sorted(P.PROCESSES)])
def test_every_grid_falls_strictly_from_start_to_end(process):
    for name, grid in G.GRIDS.items():
        if process.levels is None and name in TABLE:
            continue
        for n in (1, 7) if name == "karras" else (7,):
            times = np.asarray(grid(process, n))
            assert times.shape == (n + 1,) and (np.diff(times) < 0).all(), name
            if process.levels is None or name not in TABLE | {"trailing"}:
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
        value = np.asarray(P.log_snr(process, G.karras(process, n, rho=rho)), np.float64)
        np.testing.assert_allclose(np.diff(np.exp(-0.5 * value / rho), 2), 0, atol=2e-4)
    u = np.linspace(1, 0, n + 1)
    np.testing.assert_allclose(G.shifted(P.flow(), n, shift=3.0), 3 * u / (1 + 2 * u), atol=1e-6)


def test_karras_on_edm_is_uniform_in_its_time():
    np.testing.assert_allclose(G.karras(P.edm(), 18), G.uniform(P.edm(), 18), atol=1e-5)


def test_start_and_end_are_met_exactly():
    for name in ("uniform", "quadratic", "shifted", "log_snr", "karras"):
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
    ],
)
def test_impossible_grids_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
