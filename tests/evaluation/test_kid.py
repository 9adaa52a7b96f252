"""The unbiased estimate against its definition, written as loops, and its mean on two samples of one distribution."""

import numpy as np
import pytest

from ldm_jax.evaluation import kid, precision_recall


def test_equals_the_double_sum():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(5, 3)), generator.normal(1, 1, size=(7, 3))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert kid.mmd2(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_unbiased_on_equal_distributions_and_large_on_others():
    generator = np.random.default_rng(1)
    values = [kid.mmd2(*generator.normal(size=(2, 20, 8))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    x, y = generator.normal(size=(2, 300, 8))
    far = kid.kid(x, y + 1, subsets=5, subset_size=100)
    assert far.mean > 20 * abs(kid.kid(x, y, subsets=5, subset_size=100).mean) and far.std > 0


def test_error_of_the_mean_over_subsets():
    x, y = np.random.default_rng(2).normal(size=(2, 60, 4))
    result = kid.kid(x, y, subsets=16, subset_size=30)
    assert result.error == result.std / 4 > 0


@pytest.mark.parametrize("shift", [0.0, 0.3], ids=["equal", "apart"])
def test_standard_error_is_the_spread_over_draws(shift, monkeypatch):
    """Against 1000 pairs of samples; equal distributions leave only the terms of second order."""
    generator = np.random.default_rng(3)
    pairs = [(generator.normal(size=(60, 5)), generator.normal(shift, 1, size=(90, 5))) for _ in range(1000)]
    spread = np.std([kid.mmd2(x, y) for x, y in pairs])
    estimates = np.array([kid.standard_error(x, y) for x, y in pairs])
    print(f"spread {spread:.4g}, estimated {np.mean(estimates**2) ** 0.5:.4g} ± {estimates.std():.2g}")
    assert (0.95 if shift == 0 else 0.9) < np.mean(estimates**2) ** 0.5 / spread < (1.25 if shift == 0 else 1.1)
    monkeypatch.setattr(kid, "blocks", lambda n: precision_recall.blocks(n, 7))
    assert kid.standard_error(*pairs[0]) == pytest.approx(estimates[0], rel=1e-12)


def test_standard_error_without_spread():
    assert kid.standard_error(np.ones((5, 2)), np.ones((4, 2))) == 0


def test_refusals():
    with pytest.raises(ValueError, match="subsets of 1000 images from 10 and 2000"):
        kid.kid(np.zeros((10, 2)), np.zeros((2000, 2)))
    with pytest.raises(ValueError, match="with n, m >= 2"):
        kid.mmd2(np.zeros((1, 2)), np.zeros((4, 2)))
