"""The Fréchet distance between two Gaussians (Dowson and Landau 1982, eq. 4), which FID is on Inception features.

    d² = |mu1 - mu2|² + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

Heusel et al. 2017 (arXiv:1706.08500), eq. 6, report d² under the name FID, and so does everyone. With C = A A^T from
the symmetric eigendecomposition, the eigenvalues of C1 C2 are the squared singular values of A1^T A2, hence

    tr (C1 C2)^(1/2) = sum of the singular values of A1^T A2.

No root is taken of a product's eigenvalues, whose rounding error of 1e-16 would become 1e-8 in each of 2048 terms: with
fewer samples than dimensions the usual sqrtm loses digits there, or fails.
"""

import numpy as np
import scipy.linalg


def factor(covariance: np.ndarray) -> np.ndarray:
    """A f64[D, rank] with A A^T = covariance; eigenvalues below D * 2.2e-16 of the largest are rounding, left out."""
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
    a matrix that is not a covariance. Rounding may leave equal Gaussians at -1e-12 of their trace; that is returned as
    0.
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
