"""Resampling through the filter (1, 3, 3, 1) is what its definition says, on both axes."""

import jax
import numpy as np
import pytest

from ldm_jax.models.fir import fir_downsample, fir_upsample

FILTER = np.array([1.0, 3.0, 3.0, 1.0]) / 8


def along(axis, f, x):
    return np.apply_along_axis(f, axis, x)


def down(row):
    return np.convolve(np.pad(row, 1), FILTER, "valid")[::2]


def up(row):
    spread = np.zeros(2 * len(row))
    spread[::2] = row
    return 2 * np.convolve(np.pad(spread, (2, 1)), FILTER, "valid")


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (1, 5, 7, 2)])
def test_is_the_filter(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    halved, doubled = jax.jit(lambda x: (fir_downsample(x), fir_upsample(x)))(x)
    assert halved.shape == (shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    np.testing.assert_allclose(halved, along(2, down, along(1, down, x)), atol=1e-6)
    np.testing.assert_allclose(doubled, along(2, up, along(1, up, x)), atol=1e-6)
