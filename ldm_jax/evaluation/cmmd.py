"""The metric cmmd: the squared maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603, eq. 4-6).

    k(a, b) = exp(-|a - b|² / (2 sigma²)),    sigma = 10
    CMMD = 1000 (mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j))

over embeddings of length 1, where |a - b|² = 2 - 2 a·b. The means include i = j, as in the code that published figures were made with.
This adds about 5 / n for each set of n images (1000 (1 - k) of two of its images): nothing with the published 30,000, 0.05 with 100.
"""

from typing import Any

import numpy as np

from ldm_jax.evaluation.metrics import GENERATED, Case, Figure, Metric, subsets

SIGMA, SCALE, BLOCK = 10.0, 1000.0, 1024


def _unit(embeds: np.ndarray) -> np.ndarray:
    embeds = np.asarray(embeds, np.float64)
    return embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)


def _mean(a: np.ndarray, b: np.ndarray) -> float:
    """The mean of k - 1: the ones cancel in the sum of the three means, and k itself would lose its digits there."""
    blocks = (a[start : start + BLOCK] @ b.T for start in range(0, len(a), BLOCK))
    return sum(np.expm1((cosines - 1) / SIGMA**2).sum() for cosines in blocks) / (len(a) * len(b))


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CMMD of image embeddings f[n, P] and f[m, P] of any length, in float64 and in blocks: n m numbers are never in memory at once.

    0 for equal sets, up to about 40. ValueError for other shapes.
    """
    x, y = _unit(x), _unit(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (len(x), len(y)):
        raise ValueError(f"embeddings of shapes {x.shape} and {y.shape}, expected [n, P] and [m, P]")
    return float(SCALE * (_mean(x, x) + _mean(y, y) - 2 * _mean(x, y)))


def figures(case: Case, network: str) -> dict[str, Any]:
    return {"cmmd": cmmd(*subsets(case, network))}


METRIC = Metric(
    names=("cmmd",),
    of=GENERATED,
    help="maximum mean discrepancy of CLIP's embeddings",
    figures=figures,
    gives=lambda network: (Figure("cmmd"),),
    networks=("clip",),
    takes=(("subset", "features"),),
    compares=(("subset", "features"),),
)
