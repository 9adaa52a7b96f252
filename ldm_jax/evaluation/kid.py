"""Kernel inception distance (Bińkowski et al. 2018, arXiv:1801.01401): squared MMD with a cubic kernel, unbiased.

    k(a, b) = (a·b / D + 1)³
    MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

Unlike FID it has no bias in the number of images, so small sets can be compared; values a little below 0 are in order.
"""

from typing import NamedTuple

import numpy as np


class Kid(NamedTuple):
    """Mean and standard deviation over random subsets."""

    mean: float
    std: float


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate from x f[n, D], y f[m, D], in float64. ValueError for fewer than 2 rows, unequal widths."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features of shapes {x.shape} and {y.shape}, expected [n, D] and [m, D] with n, m >= 2")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return float(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())


def kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> Kid:
    """Over `subsets` draws of `subset_size` rows of each, without replacement; the draws are torch-fidelity's for one
    seed.

    Raises ValueError where there are fewer rows than `subset_size`.
    """
    if min(len(x), len(y)) < subset_size:
        raise ValueError(f"KID subsets of {subset_size} images from {len(x)} and {len(y)}: lower subset_size")
    generator = np.random.RandomState(seed)  # the stream that published figures were drawn with
    values = []
    for _ in range(subsets):
        rows_x = generator.choice(len(x), subset_size, replace=False)
        rows_y = generator.choice(len(y), subset_size, replace=False)
        values.append(mmd2(x[rows_x], y[rows_y]))
    return Kid(float(np.mean(values)), float(np.std(values)))
