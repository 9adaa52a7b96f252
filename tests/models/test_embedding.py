"""Embeddings against their formulas (diffusers' own functions: tests/oracle/test_embedding.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.embedding import (
    TimestepMLP,
    gaussian_fourier_embedding,
    sincos_position_embedding,
    timestep_embedding,
)


def test_first_and_last_frequency():
    e = np.asarray(timestep_embedding(jnp.array([0.0, 2.0]), 6))
    np.testing.assert_allclose(e[0], [1, 1, 1, 0, 0, 0], atol=1e-7)
    w = 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(e[1], np.concatenate([np.cos(2 * w), np.sin(2 * w)]), atol=1e-6)
    # With a shift of 1 the last frequency is 1 / max_period exactly.
    e = np.asarray(
        timestep_embedding(jnp.array([50.0]), 7, max_period=100.0, downscale_freq_shift=1, flip_sin_to_cos=False)
    )
    assert e.shape == (1, 7)
    np.testing.assert_allclose([e[0, 2], e[0, 5], e[0, 6]], [np.sin(0.5), np.cos(0.5), 0], atol=1e-6)


def test_f32_even_for_low_precision_times():
    a, b = timestep_embedding(jnp.array([998.0, 999.0]), 64)
    assert a.dtype == jnp.float32
    assert jnp.abs(a - b).max() > 0.1


def test_fourier_features_have_the_period_of_their_frequency():
    w = jnp.array([1.0, 4.0])
    e = gaussian_fourier_embedding(jnp.array([0.25, 1.25]), w)
    np.testing.assert_allclose(e, [[1, 0, 0, 1]] * 2, atol=1e-5)


def test_position_columns_first_rows_second():
    e = sincos_position_embedding(8, 3, 5).reshape(3, 5, 8)
    assert (e[:, 2, :4] == e[0, 2, :4]).all()
    assert (e[1, :, 4:] == e[1, 0, 4:]).all()
    np.testing.assert_allclose(
        e[2, 4], np.concatenate([[np.sin(n), np.sin(n / 100), np.cos(n), np.cos(n / 100)] for n in (4, 2)]), atol=1e-6
    )
    # A grid twice as fine, stretched to the same base, passes through the coarse one's positions.
    fine = sincos_position_embedding(8, 6, 10, base=6).reshape(6, 10, 8)
    np.testing.assert_allclose(
        fine[::2, 0, 4:], sincos_position_embedding(8, 3, 1, base=6).reshape(3, 8)[:, 4:], atol=1e-6
    )


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="dim is 6; expected a multiple of 4"):
        sincos_position_embedding(6, 2, 2)
    with pytest.raises(ValueError, match="dim is 1"):
        timestep_embedding(jnp.zeros(1), 1)
    with pytest.raises(ValueError, match="no frequency for a shift of 1"):
        timestep_embedding(jnp.zeros(1), 2, downscale_freq_shift=1)


def test_timestep_mlp_shapes():
    params = TimestepMLP(8, hidden=12).init(jax.random.key(0), jnp.zeros((2, 6)))["params"]
    assert params["linear_1"]["kernel"].shape == (6, 12)
    assert params["linear_2"]["kernel"].shape == (12, 8)
