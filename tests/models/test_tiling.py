"""Slices and tiles of functions whose result is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.kernels.conv import average_pool, upsample_nearest
from ldm_jax.models.tiling import sliced, tiled

X = np.random.default_rng(0).normal(size=(2, 13, 22, 3)).astype(np.float32)


def test_slices():
    got = jax.jit(lambda x: sliced(lambda row: {"a": 2 * row, "b": row.sum((1, 2))}, x))(X)
    np.testing.assert_array_equal(got["a"], 2 * X)
    np.testing.assert_allclose(got["b"], X.sum((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_of_a_local_function_are_the_function(overlap):
    """It gives overlapping tiles the same numbers, so that no blend shows; the seams and the last, smaller tiles must meet."""
    doubled = jax.jit(lambda x: tiled(upsample_nearest, x, 8, 16, overlap))(X)
    np.testing.assert_allclose(doubled, upsample_nearest(X), atol=1e-6)
    even = X[:, :12]
    halved = jax.jit(lambda x: tiled(average_pool, x, 8, 4, overlap))(even)
    np.testing.assert_allclose(halved, average_pool(even), atol=1e-6)


def test_blend_is_linear():
    """Tiles 8 wide that begin every 6: columns 0 to 7, 6 to 12 and 12, each painted with the mean of its columns."""
    columns = jnp.broadcast_to(jnp.arange(13.0)[:, None], (1, 6, 13, 1))
    got = jax.jit(lambda x: tiled(lambda t: jnp.broadcast_to(t.mean(2, keepdims=True), t.shape), x, 8, 8))(columns)
    np.testing.assert_allclose(got[0, 0, :, 0], [3.5] * 7 + [(3.5 + 9) / 2] + [9] * 5)
    np.testing.assert_allclose(got[0, 5], got[0, 0])


def test_what_fits_is_not_tiled():
    calls = []

    def apply(x):
        calls.append(x.shape)
        return x

    tiled(apply, X, 24, 24)
    assert calls == [X.shape]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 1.0), "overlap is 1.0, expected at least 0 and less than 1"),
        ((5, 40, 0.25), "tiles of 5 and 40 that overlap by 0.25 step by 3 and 30"),
        ((1, 8, 0.25), "step by 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiled(lambda x: x, X, *arguments)
