"""The metric is: the inception score (Salimans et al. 2016, arXiv:1606.03498): exp E_x KL(p(y | x) || p(y)).

Both come from a classifier's logits. p(y) is the mean over each split. Published scores take 10 splits, and Inception's logits without
their bias.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.special

from ldm_jax.evaluation.metrics import GENERATED, Case, Figure, Metric


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, splits: int = 10, seed: int | None = 2020) -> InceptionScore:
    """The score of logits f[N, K], shuffled with `seed` first (None: as they lie; 2020 is torch-fidelity's order).

    Between 1 (every image alike, or none decided) and K. Raises ValueError for fewer images than splits.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or len(logits) < splits or splits < 1:
        raise ValueError(f"logits of shape {logits.shape}, expected [N, K] with N >= the {splits} splits")
    order = np.arange(len(logits))
    if seed is not None:  # RandomState, because published scores were shuffled by its stream
        order = np.random.RandomState(seed).permutation(len(logits))
    scores = []
    for i in range(splits):
        part = np.asarray(logits[order[i * len(logits) // splits : (i + 1) * len(logits) // splits]], np.float64)
        log_p = scipy.special.log_softmax(part, axis=1)
        log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(part))
        scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def figures(case: Case, network: str) -> dict[str, Any]:
    score = inception_score(case.seen.rows["all", network, "logits"])
    return {"inception_score": score.mean, "inception_score_std": score.std}


METRIC = Metric(
    names=("is",),
    of=GENERATED,
    help="inception score",
    figures=figures,
    gives=lambda network: (Figure("inception_score", higher=True),),
    networks=("inception",),
    takes=(("all", "logits"),),
    least=10,
)
