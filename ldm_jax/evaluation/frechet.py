"""The Fréchet distance between two Gaussians (Dowson and Landau 1982, eq. 4), which FID is on Inception features.

    d² = |mu1 - mu2|² + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

Heusel et al. 2017 (arXiv:1706.08500), eq. 6, report d² under the name FID, and so does everyone. With C = A A^T from
the symmetric eigendecomposition, the eigenvalues of C1 C2 are the squared singular values of A1^T A2, hence

    tr (C1 C2)^(1/2) = sum of the singular values of A1^T A2.

No root of a product's eigenvalues is taken: a rounding error of 1e-16 in them would become 1e-8 in each of 2048 terms. With
fewer samples than dimensions the usual sqrtm loses these digits, or fails.

d² of N images is biased upwards by about 1 / N (Chong and Forsyth 2020, arXiv:1911.07023). `too_few` warns where the bias is large,
`infinity` extrapolates to N = infinity, and `bootstrap` says how much d² would vary with other N images.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.stats

from ldm_jax.evaluation import statistics

# For Inception 10,240 images; Heusel et al. advise at least 10,000 beside their code.
WIDTHS = 5

# The fewest images that `infinity` extrapolates from.
LEAST = 20


class Infinity(NamedTuple):
    """d² for infinitely many generated images, and the standard error of the straight line that says so."""

    value: float
    error: float


class ByClass(NamedTuple):
    """d² by label (None where either side has fewer than 2 images), and a line for each class with `too_few`."""

    distances: dict[int, float | None]
    warnings: list[str]


def factor(covariance: np.ndarray) -> np.ndarray:
    """A f64[D, rank] with A A^T = covariance; eigenvalues below D * 2.2e-16 of the largest are rounding errors and are left out."""
    values, vectors = scipy.linalg.eigh((covariance + covariance.T) / 2)
    floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    # Covariances kept in float32 have eigenvalues down to -1e-7 of the largest.
    if values[0] < -1e-5 * max(values[-1], 0.0) - 1e-300:
        raise ValueError(f"a covariance has the negative eigenvalue {values[0]:.3g} (largest {values[-1]:.3g})")
    keep = values > floor
    return vectors[:, keep] * np.sqrt(values[keep])


def distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """d² of N(mu1, cov1) and N(mu2, cov2): f[D], f[D, D], f[D], f[D, D] -> float, computed in float64.

    Rank-deficient covariances are fine. Raises ValueError for shapes that do not match, numbers that are not finite, or
    a matrix that is not a covariance. Rounding may leave equal Gaussians at -1e-12 of their trace, which is returned as 0.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape:
        raise ValueError(f"means of shapes {mu1.shape} and {mu2.shape}, expected two vectors of one length")
    for name, cov in (("first", cov1), ("second", cov2)):
        if cov.shape != 2 * mu1.shape:
            raise ValueError(f"the {name} covariance has shape {cov.shape}, expected {2 * mu1.shape}")
    for name, array in (
        ("first mean", mu1),
        ("first covariance", cov1),
        ("second mean", mu2),
        ("second covariance", cov2),
    ):
        if not np.isfinite(array).all():
            raise ValueError(f"the {name} has {np.count_nonzero(~np.isfinite(array))} entries that are not finite")
    for name, cov in (("first", cov1), ("second", cov2)):
        if not np.allclose(cov, cov.T, rtol=1e-6, atol=1e-6 * np.abs(cov).max(initial=0.0)):
            raise ValueError(f"the {name} covariance is not symmetric")
    a1, a2 = factor(cov1), factor(cov2)
    cross = scipy.linalg.svdvals(a1.T @ a2).sum() if a1.size and a2.size else 0.0
    return float(max(np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross, 0.0))


def of_rows(x: np.ndarray, y: np.ndarray) -> float:
    """d² of the Gaussians with the moments of the rows f[N, D] and f[M, D], N and M at least 2: `distance` without a covariance.

    A^T is the centred rows over sqrt(N - 1), so the singular values are those of N x M numbers at most. Where there are more rows than
    columns, their triangular factor (QR) takes their place. ValueError for numbers that are not finite.
    """
    means, factors = [], []
    for rows in (x, y):
        rows = np.asarray(rows, np.float64)
        if not np.isfinite(rows).all():
            raise ValueError(f"features of {np.count_nonzero(~np.isfinite(rows).all(1))} images are not finite")
        means.append(rows.mean(0))
        a = (rows - means[-1]) / np.sqrt(len(rows) - 1)
        factors.append(np.linalg.qr(a, mode="r") if len(a) > a.shape[1] else a)
    cross = scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(np.sum(a**2) for a in factors)
    return float(max(np.sum((means[0] - means[1]) ** 2) + traces - 2 * cross, 0.0))


def too_few(n: int, dim: int) -> str | None:
    """A warning with the numbers where n images are fewer than 5 times the features' width, else None."""
    if n >= WIDTHS * dim:
        return None
    return (
        f"{n} images for features of width {dim}: the Frechet distance is biased upwards by an amount that depends on the "
        f"model; use {WIDTHS * dim} or more, or compare only at equal numbers of images"
    )


def _reweighted(features: np.ndarray, reference: statistics.Gaussian, counts: Iterable[np.ndarray]) -> np.ndarray:
    """d² against the reference when image i counts counts[i] times: f[N, D], integers [N] each -> f64[len(counts)].

    y = (f - mean) A2 is computed once. The singular values of A1^T A2 are the roots of the eigenvalues of the weighted
    y^T y or y y^T, whichever is smaller. Their rounding error is 1e-8, far below the spread of resampling.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] != len(reference.mean) or len(features) < 2:
        raise ValueError(f"features of shape {features.shape}, expected [N, {len(reference.mean)}] with N >= 2")
    if not np.isfinite(features).all():
        raise ValueError(f"features of {np.count_nonzero(~np.isfinite(features).all(1))} images are not finite")
    centre = features.mean(0)
    x = features - centre
    squares = (x * x).sum(1)
    basis = factor(reference.covariance)
    y = x @ basis
    constant, shift = np.trace(reference.covariance), centre - reference.mean
    values = []
    for count in counts:
        there = np.flatnonzero(count)
        n, weight = count.sum(), count[there]
        mean = weight @ x[there] / n
        rows = (y[there] - mean @ basis) * np.sqrt(weight / (n - 1))[:, None]
        gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
        cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(gram), 0.0)).sum()
        trace = (weight @ squares[there] - n * (mean @ mean)) / (n - 1)
        values.append(np.sum((mean + shift) ** 2) + trace + constant - 2 * cross)
    return np.maximum(values, 0.0)


def infinity(features: np.ndarray, reference: statistics.Gaussian, seed: int = 0, points: int = 15) -> Infinity:
    """d² of f[N, D] extrapolated to N = inf: d² of random subsets, fitted by a line in 1 / N (Chong and Forsyth 2020).

    There are 15 subsets of evenly spaced sizes as in the paper, but from N / 2 instead of N / 10: sizes of a few widths lie off the
    line, and at N = 5 D the range of the paper overshoots by half of the bias where this one leaves a tenth. At N = 1.5 D neither
    is of use. The error is that of the fit at 1 / N = 0. The subsets overlap, so it does not say how far other N images would lie
    (`bootstrap` does). The number of images of the reference is not extrapolated. Raises ValueError for fewer than 20
    images, points < 3, another width.
    """
    n = len(features)
    if n < LEAST or points < 3:
        raise ValueError(f"{n} images and {points} points, expected at least {LEAST} and 3 to extrapolate from")
    generator = np.random.default_rng(seed)
    sizes = np.unique(np.linspace(n / 2, n, points).astype(int))

    def subsets():
        for size in sizes:
            chosen = np.zeros(n, int)
            chosen[generator.permutation(n)[:size]] = 1
            yield chosen

    line = scipy.stats.linregress(1 / sizes, _reweighted(features, reference, subsets()))
    return Infinity(float(line.intercept), float(line.intercept_stderr))


def bootstrap(
    features: np.ndarray,
    reference: statistics.Gaussian,
    draws: int = 200,
    seed: int = 0,
    of: tuple[float, int] | None = None,
) -> tuple[float, float]:
    """The 95 % interval (low, high) of d² at N images, from features f[N, D]: resampling with replacement (Efron 1979).

    Resampled images repeat, which adds to every resampled d² a second bias of the order that N images have already. Therefore only
    the spread is used: d² - (q - mean) for the quantiles q (the reflected interval, Davison and Hinkley 1997, eq. 5.6, about the mean
    of the resamples). This is an interval for the average of d² over sets of N images of this model. It includes the bias of finite
    N, as published figures do. From N = 5 D on its coverage is 95 %; with fewer images it is too wide, 1.6 times at 2 D, three
    times below D. Raises ValueError for fewer than 40 draws.

    `of` is (d², M) of M >= N images which include these: the interval is then about that d², and sqrt(M / N) times narrower.
    """
    if draws < 40:
        raise ValueError(f"{draws} draws, expected at least 40 for the quantiles of a 95 % interval")
    n = len(features)
    generator = np.random.default_rng(seed)
    resampled = (np.bincount(generator.integers(0, n, n), minlength=n) for _ in range(draws))
    whole, *values = _reweighted(features, reference, itertools.chain([np.ones(n, int)], resampled))
    low, high = np.quantile(values, (0.025, 0.975)) - np.mean(values)
    if of is not None:
        whole, count = of
        low, high = low * np.sqrt(n / count), high * np.sqrt(n / count)
    return float(max(whole - high, 0.0)), float(whole - low)


def by_class(features: np.ndarray, labels: np.ndarray, reference: np.ndarray, reference_labels: np.ndarray) -> ByClass:
    """d² of the images of each class against the reference's of that class: f[N, D], i[N], f[M, D], i[M], which may be memory-mapped.

    Raises ValueError for a class that the reference lacks, or labels that do not match their features.
    """
    for name, f, y in (("", features, labels), ("reference ", reference, reference_labels)):
        if f.ndim != 2 or np.shape(y) != f.shape[:1]:
            raise ValueError(f"{name}features of shape {f.shape} and labels of {np.shape(y)}, expected [N, D] and [N]")
    if unknown := sorted(set(np.unique(labels)) - set(np.unique(reference_labels))):
        raise ValueError(f"the reference has no images of the classes {[int(label) for label in unknown]}")
    distances: dict[int, float | None] = {}
    warnings = []
    for label in np.unique(labels).tolist():
        sides = [features[labels == label], reference[reference_labels == label]]
        fewest = min(map(len, sides))
        if warning := too_few(fewest, features.shape[1]):
            warnings.append(f"class {label}: {warning}")
        distances[label] = of_rows(*sides) if fewest >= 2 else None
    return ByClass(distances, warnings)
