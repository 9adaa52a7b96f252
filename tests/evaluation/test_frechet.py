"""The Fréchet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from ldm_jax.evaluation import frechet


def random_covariance(generator, dim, rank=None):
    a = generator.normal(size=(dim, rank or 2 * dim))
    return a @ a.T / a.shape[1]


@pytest.mark.parametrize("dim", [1, 2, 17, 64])
def test_equals_the_textbook_formula(dim):
    generator = np.random.default_rng(dim)
    mu1, mu2 = generator.normal(size=(2, dim))
    c1, c2 = random_covariance(generator, dim), 3 * random_covariance(generator, dim)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(c1 + c2 - 2 * root)
    np.testing.assert_allclose(frechet.distance(mu1, c1, mu2, c2), expected, rtol=1e-10)
    np.testing.assert_allclose(frechet.distance(mu2, c2, mu1, c1), expected, rtol=1e-10)


def test_commuting_covariances():
    """With a common basis and eigenvalues a, b the distance is sum (sqrt a - sqrt b)², shifted means add |d|²."""
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(30, 30)))[0]
    a, b = generator.uniform(0, 5, (2, 30))
    a[:10] = 0.0
    b[5:15] = 0.0
    shift = generator.normal(size=30)
    value = frechet.distance(shift, basis * a @ basis.T, np.zeros(30), basis * b @ basis.T)
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2) + np.sum(shift**2)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_one_dimension_and_scaling():
    assert frechet.distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1, rel=1e-14)
    c = random_covariance(np.random.default_rng(1), 8)
    zero = np.zeros(8)
    assert frechet.distance(zero, c, zero, 4 * c) == pytest.approx(np.trace(c), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 10, 255])
def test_rank_deficient(rank):
    """Fewer samples than dimensions: equal Gaussians are at 0, orthogonal supports at the sum of the traces."""
    generator = np.random.default_rng(rank)
    c = random_covariance(generator, 256, rank)
    zero = np.zeros(256)
    assert 0 <= frechet.distance(zero, c, zero, c) < 1e-9 * np.trace(c)
    if rank <= 10:
        rotated = np.roll(np.eye(256), 128, axis=0)
        left, right = np.zeros((2, 256, 256))
        left[:rank, :rank] = random_covariance(generator, rank)
        right = rotated @ left @ rotated.T
        np.testing.assert_allclose(frechet.distance(zero, left, zero, right), 2 * np.trace(left), rtol=1e-12)


def test_no_spread_leaves_the_means():
    zero = np.zeros((3, 3))
    assert frechet.distance(np.zeros(3), zero, np.array([1.0, 2, 2]), zero) == pytest.approx(9)
    assert frechet.distance(np.zeros(3), zero, np.zeros(3), np.eye(3)) == pytest.approx(3)


def test_large_mean_small_spread():
    """The shape of real features: a common offset must not eat the digits of the spread."""
    c = 1e-6 * random_covariance(np.random.default_rng(3), 20)
    mu = np.full(20, 1e3)
    assert frechet.distance(mu, c, mu, 4 * c) == pytest.approx(np.trace(c), rel=1e-9)


@pytest.mark.parametrize(
    ("mu", "cov", "message"),
    [
        (np.zeros(3), np.eye(3), r"means of shapes \(2,\) and \(3,\)"),
        (np.zeros((1, 2)), np.eye(2), "two vectors of one length"),
        (np.zeros(2), np.eye(3), r"second covariance has shape \(3, 3\), expected \(2, 2\)"),
        (np.array([0, np.nan]), np.eye(2), "second mean has 1 entries that are not finite"),
        (np.zeros(2), np.array([[np.inf, 0], [0, 1]]), "second covariance has 1 entries that are not finite"),
        (np.zeros(2), np.array([[1.0, 0.5], [0, 1]]), "second covariance is not symmetric"),
        (np.zeros(2), np.diag([1.0, -1.0]), "negative eigenvalue"),
    ],
)
def test_refusals(mu, cov, message):
    with pytest.raises(ValueError, match=message):
        frechet.distance(np.zeros(2), np.eye(2), mu, cov)
