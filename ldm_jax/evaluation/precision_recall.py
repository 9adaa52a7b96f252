"""The metric prdc: improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), with density and coverage beside them.

The ball of a sample reaches to its k-th nearest neighbour within the same set.
    precision: share of generated samples inside some real sample's ball
    recall:    share of real samples inside some generated sample's ball
    density:   real balls that hold a generated sample, on average, over k     (Naeem et al. 2020, arXiv:2002.09797)
    coverage:  share of real samples whose ball holds a generated one
"""

from typing import Any, NamedTuple

import numpy as np

from ldm_jax.evaluation.metrics import GENERATED, Case, Figure, Metric, subsets


class Manifold(NamedTuple):
    """Shares of the generated (precision, density) and of the real images (recall, coverage); density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """f[n, D], f[m, D] -> f64[n, m]; the rounding error of |a|² + |b|² - 2 a·b is cut off at 0."""
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0.0)


def blocks(n: int, size: int = 1024) -> list[slice]:
    """The numbers 0 .. n - 1 in slices, so that a matrix of distances is never whole in memory."""
    return [slice(start, start + size) for start in range(0, n, size)]


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each row to its k-th nearest other row."""
    result = []
    for block in blocks(len(features)):
        d = squared_distances(features[block], features)
        d[np.arange(len(d)), np.arange(block.start, block.start + len(d))] = 0.0
        result.append(np.partition(d, k, axis=1)[:, k])
    return np.concatenate(result)


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> Manifold:
    """The four shares of features f[n, D] and f[m, D], in float64. They depend on n and m, so state both.

    ValueError unless n, m > k.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1] or k < 1:
        raise ValueError(
            f"features of shapes {real.shape} and {generated.shape}, k = {k}: expected [n, D], [m, D], k >= 1"
        )
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"{len(real)} real and {len(generated)} generated images, expected more than k = {k}")
    # Distances are small against |f|² when features have a common offset.
    offset = real.mean(0)
    real, generated = real - offset, generated - offset
    real_radii, generated_radii = radii(real, k), radii(generated, k)
    inside_real = np.zeros(len(generated))
    recalled, covered = [], []
    for block in blocks(len(real)):
        d = squared_distances(real[block], generated)
        within = d <= real_radii[block, None]
        inside_real += within.sum(0)
        covered.append(within.any(1))
        recalled.append((d <= generated_radii).any(1))
    return Manifold(
        float((inside_real > 0).mean()),
        float(np.concatenate(recalled).mean()),
        float(inside_real.mean() / k),
        float(np.concatenate(covered).mean()),
    )


def figures(case: Case, network: str) -> dict[str, Any]:
    generated, real = subsets(case, network)
    return {f"{name}_{network}": value for name, value in precision_recall(real, generated)._asdict().items()}


METRIC = Metric(
    names=("prdc",),
    of=GENERATED,
    help="precision, recall, density and coverage",
    figures=figures,
    gives=lambda network: tuple(Figure(f"{name}_{network}", "share", higher=True) for name in Manifold._fields),
    networks=("any",),
    takes=(("subset", "features"),),
    compares=(("subset", "features"),),
    least=4,
)
