"""The metric kid: the kernel inception distance (Bińkowski et al. 2018, arXiv:1801.01401): squared MMD with a cubic kernel, unbiased.

    k(a, b) = (a·b / D + 1)³
    MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

Unlike FID it has no bias in the number of images, so that small sets can be compared. Values a little below 0 are possible.
"""

from typing import Any, NamedTuple

import numpy as np

from ldm_jax.evaluation.metrics import GENERATED, Case, Figure, Metric, subsets
from ldm_jax.evaluation.precision_recall import blocks

SUBSET = 1000  # images of a subset, as in published figures; fewer where there are fewer


class Kid(NamedTuple):
    """Mean and standard deviation over random subsets; `error` = std / sqrt(subsets), the standard error of the mean.

    More subsets of the same images lower `error`. How much other images would change the figure, `standard_error` says.
    """

    mean: float
    std: float
    error: float


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a·b / D + 1)³: f64[n, D], f64[m, D] -> f64[n, m]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features of shapes {x.shape} and {y.shape}, expected [n, D] and [m, D] with n, m >= 2")
    return x, y


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate from x f[n, D], y f[m, D], in float64. ValueError for fewer than 2 rows, unequal widths."""
    x, y = _pair(x, y)

    def off_diagonal_mean(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return float(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())


def kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> Kid:
    """KID over `subsets` draws of `subset_size` rows of each, without replacement; the draws of a seed are torch-fidelity's.

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
    std = float(np.std(values))
    return Kid(float(np.mean(values)), std, std / subsets**0.5)


def standard_error(x: np.ndarray, y: np.ndarray) -> float:
    """The standard deviation of `mmd2` over draws of n and m images, estimated from one: f[n, D], f[m, D] -> float.

    Hoeffding's decomposition of the U-statistic, with w(a) = E k(a, x) - E k(a, y) and k' the kernel centred on both sides,

        Var = 4/n Var w(x) + 4/m Var w(y) + S,  S = 2/n(n-1) E k'(x,x)² + 2/m(m-1) E k'(y,y)² + 4/nm E k'(x,y)²

    (Sutherland 2019, arXiv:1906.02104; the first two terms alone are Bounliphone et al. 2016's, arXiv:1511.04581).
    Means over samples in the place of E raise the first two terms by 2 S on average, which is subtracted as far as they stay
    positive. For equal distributions, where w is 0, S remains; the estimate is about 20 % too large there. ValueError as in `mmd2`.
    """
    x, y = _pair(x, y)

    def sums(a: np.ndarray, b: np.ndarray, skip: bool) -> tuple[np.ndarray, float]:
        """Row sums of the kernel and the sum of its squares; without i = j if `skip`."""
        rows, squares = [], 0.0
        for block in blocks(len(a)):
            k = kernel(a[block], b)
            if skip:
                k[np.arange(len(k)), np.arange(block.start, block.start + len(k))] = 0.0
            rows.append(k.sum(1))
            squares += (k * k).sum()
        return np.concatenate(rows), squares

    n, m = len(x), len(y)
    (xx, xx2), (yy, yy2) = sums(x, x, True), sums(y, y, True)
    (xy, xy2), (yx, _) = sums(x, y, False), sums(y, x, False)
    xx, yy, xy, yx = xx / (n - 1), yy / (m - 1), xy / m, yx / n
    first = 4 * np.var(xx - xy, ddof=1) / n + 4 * np.var(yy - yx, ddof=1) / m
    centred_xx = xx2 / (n * (n - 1)) - 2 * np.mean(xx**2) + xx.mean() ** 2
    centred_yy = yy2 / (m * (m - 1)) - 2 * np.mean(yy**2) + yy.mean() ** 2
    centred_xy = xy2 / (n * m) - np.mean(xy**2) - np.mean(yx**2) + xy.mean() ** 2
    second = 2 * centred_xx / (n * (n - 1)) + 2 * centred_yy / (m * (m - 1)) + 4 * centred_xy / (n * m)
    return float(np.sqrt(max(first - second, second, 0.0)))


def figure_name(network: str) -> str:
    """'kid' for Inception's features, else 'kd_<network>'."""
    return "kid" if network == "inception" else f"kd_{network}"


def figures(case: Case, network: str) -> dict[str, Any]:
    generated, real = subsets(case, network)
    size = min(SUBSET, len(generated), len(real))
    result, figure = kid(generated, real, subset_size=size), figure_name(network)
    error = standard_error(generated, real)
    return {figure: result.mean, f"{figure}_std": result.std, f"{figure}_error": error, "kid_subset_size": size}


METRIC = Metric(
    names=("kid",),
    of=GENERATED,
    help="kernel distance with its standard error; called kid with Inception's features alone, else kd_...",
    figures=figures,
    gives=lambda network: (Figure(figure_name(network)),),
    networks=("any",),
    takes=(("subset", "features"),),
    compares=(("subset", "features"),),
    least=4,
)
