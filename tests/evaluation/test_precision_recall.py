"""Configurations whose four figures can be read off, and the definitions written as loops."""

import numpy as np
import pytest

from ldm_jax.evaluation.precision_recall import precision_recall


def test_equals_the_definitions():
    generator = np.random.default_rng(0)
    real, made = generator.normal(size=(40, 3)), generator.normal(0.5, 0.7, size=(30, 3))

    def distance(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    k = 3
    r_real, r_made = np.sort(distance(real, real))[:, k], np.sort(distance(made, made))[:, k]
    d = distance(real, made)
    result = precision_recall(real, made, k)
    assert result.precision == pytest.approx((d <= r_real[:, None]).any(0).mean())
    assert result.recall == pytest.approx((d <= r_made).any(1).mean())
    assert result.density == pytest.approx((d <= r_real[:, None]).sum(0).mean() / k)
    assert result.coverage == pytest.approx((d <= r_real[:, None]).any(1).mean())
    assert 0.3 < result.recall < result.precision <= 1


def test_memorised_collapsed_and_apart():
    generator = np.random.default_rng(1)
    real = generator.normal(size=(2100, 4))  # more than two blocks of rows
    assert precision_recall(real, real)[:2] == (1, 1)
    collapsed = real[:1] + 1e-4 * generator.normal(size=(50, 4))
    result = precision_recall(real, collapsed)
    assert result.precision == 1 and result.recall < 0.01 and result.coverage < 0.02
    assert precision_recall(real, real + 100) == (0, 0, 0, 0)
    # The same at a common offset, where |a|² + |b|² - 2 a·b would lose its digits.
    np.testing.assert_allclose(precision_recall(real + 1e6, collapsed + 1e6), result, atol=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match="3 real and 9 generated images, expected more than k = 3"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match=r"shapes \(5, 2\) and \(5, 3\)"):
        precision_recall(np.zeros((5, 2)), np.zeros((5, 3)))
