"""The Fréchet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from ldm_jax.evaluation import frechet, statistics


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


@pytest.mark.parametrize("n", [30, 9])
def test_reweighted_images_are_repeated_images(n):
    """Counts of 0, 1, 2, ... give what `distance` gives of the rows repeated; with fewer and with more rows than columns."""
    generator = np.random.default_rng(n)
    features = generator.normal(100, 1, size=(n, 12))
    reference = statistics.Gaussian(0, np.full(12, 99.0), random_covariance(generator, 12, 7))
    counts = [np.ones(n, int), generator.permutation(n) % 3, np.bincount(generator.integers(0, n, n), minlength=n)]
    for count, value in zip(counts, frechet._reweighted(features, reference, counts)):
        rows = np.repeat(features, count, axis=0)
        expected = frechet.distance(rows.mean(0), np.cov(rows.T), reference.mean, reference.covariance)
        np.testing.assert_allclose(value, expected, rtol=1e-8)


def known(dim):
    """(true d², reference, draw): images from N(0, I) against N(1 / 4, 4) in every dimension."""
    reference = statistics.Gaussian(0, np.full(dim, 0.25), 4 * np.eye(dim))
    return dim * (0.25**2 + 1), reference, lambda seed, n: np.random.default_rng(seed).normal(size=(n, dim))


def test_infinity_removes_the_bias():
    true, reference, draw = known(32)
    samples = [draw(seed, 640) for seed in range(12)]
    plain = np.array([frechet._reweighted(x, reference, [np.ones(640, int)])[0] for x in samples]) - true
    result = [frechet.infinity(x, reference, seed=1) for x in samples]
    extrapolated = np.array([f.value for f in result]) - true
    print(f"true {true}: d² off by {plain.mean():.4f}, infinity by {extrapolated.mean():.4f}")
    assert plain.mean() > 5 * plain.std() / 12**0.5  # the bias is there to be removed
    assert abs(extrapolated.mean()) < plain.mean() / 4
    assert (
        frechet.infinity(samples[0], reference, seed=1) == result[0] != frechet.infinity(samples[0], reference, seed=2)
    )
    assert 0 < result[0].error < plain.mean()


def test_bootstrap_covers_the_average_over_draws():
    """95 % intervals from 160 images of width 32 hold the average d² of 160 images, in 54 of 60 trials at least.

    Resampled ones lie higher than that by more than the whole interval.
    """
    _, reference, draw = known(32)
    ones = [np.ones(160, int)]
    average = np.mean([frechet._reweighted(draw(1000 + i, 160), reference, ones)[0] for i in range(300)])
    intervals = np.array([frechet.bootstrap(draw(i, 160), reference, draws=60, seed=i) for i in range(60)])
    covered = (intervals[:, 0] < average) & (average < intervals[:, 1])
    print(f"covered {covered.mean():.3f}, width {np.diff(intervals).mean():.3f}, average {average:.3f}")
    assert covered.mean() >= 0.9
    spread = np.std([frechet._reweighted(draw(2000 + i, 160), reference, ones)[0] for i in range(300)])
    assert np.diff(intervals).mean() == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_too_few():
    assert frechet.too_few(10240, 2048) is None
    assert "5000 images for features of width 2048" in frechet.too_few(5000, 2048)
    assert "use 10240 or more" in frechet.too_few(10239, 2048)


def test_by_class():
    generator = np.random.default_rng(5)

    def exactly(n, mean, scale):
        """n rows whose mean and covariance are mean and scale² I to the last digits."""
        x = np.linalg.qr(generator.normal(size=(n, 3)) @ np.eye(3))[0]
        x = np.linalg.qr(x - x.mean(0))[0] * (n - 1) ** 0.5
        return mean + scale * x

    features = np.concatenate([exactly(20, 0, 1), exactly(9, 1, 2), np.ones((1, 3))])
    labels = np.array([3] * 20 + [0] * 9 + [7])
    reference = np.concatenate([exactly(15, 1, 2), exactly(30, 2, 1), exactly(15, 0, 1), np.zeros((4, 3))])
    reference_labels = np.array([0] * 15 + [3] * 30 + [7] * 15 + [8] * 4)
    order = generator.permutation(30)
    result = frechet.by_class(features[order], labels[order], reference, reference_labels)
    assert list(result.distances) == [0, 3, 7] and result.distances[7] is None
    assert result.distances[0] == pytest.approx(0, abs=1e-12) and result.distances[3] == pytest.approx(12, rel=1e-12)
    assert [line.partition(" for")[0] for line in result.warnings] == ["class 0: 9 images", "class 7: 1 images"]
    with pytest.raises(ValueError, match=r"no images of the classes \[3, 7\]"):
        frechet.by_class(features, labels, reference[:15], reference_labels[:15])
    with pytest.raises(ValueError, match=r"reference features of shape \(64, 3\) and labels of \(3,\)"):
        frechet.by_class(features, labels, reference, reference_labels[:3])


@pytest.mark.parametrize(("n", "m"), [(9, 14), (90, 14), (9, 90), (90, 90), (2, 2)])
def test_of_rows_is_the_distance_of_their_moments(n, m):
    """With fewer rows than columns, and with more."""
    generator = np.random.default_rng(n + m)
    basis = generator.normal(size=(40, 40))
    x, y = generator.normal(100, 1, (n, 40)) @ basis, generator.normal(99, 2, (m, 40)) @ basis
    expected = frechet.distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    np.testing.assert_allclose(frechet.of_rows(x, y), expected, rtol=1e-8)
    assert frechet.of_rows(x, x) <= 1e-12 * np.trace(np.cov(x.T))
    x[1, 3] = np.nan
    with pytest.raises(ValueError, match="features of 1 images are not finite"):
        frechet.of_rows(y, x)


def test_resampling_refusals():
    reference = statistics.Gaussian(0, np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="19 images and 15 points"):
        frechet.infinity(np.zeros((19, 3)), reference)
    with pytest.raises(ValueError, match="39 draws"):
        frechet.bootstrap(np.zeros((50, 3)), reference, draws=39)
    with pytest.raises(ValueError, match=r"shape \(50, 4\), expected \[N, 3\]"):
        frechet.bootstrap(np.zeros((50, 4)), reference)
    bad = np.zeros((50, 3))
    bad[2:4, 1] = np.inf
    with pytest.raises(ValueError, match="features of 2 images are not finite"):
        frechet.infinity(bad, reference)
