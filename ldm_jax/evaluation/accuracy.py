"""The metric accuracy: how often a classifier names the class that an image was generated for, in total and by class."""

from typing import Any, NamedTuple

import numpy as np

from ldm_jax.evaluation.metrics import GENERATED, LABELS, Case, Figure, Metric


class Accuracy(NamedTuple):
    """`total` and `by_class` f64[K] are in [0, 1] (NaN for a class without images); `confusion` is i64[label, predicted class]."""

    total: float
    by_class: np.ndarray
    confusion: np.ndarray


def accuracy(logits: np.ndarray, labels: np.ndarray) -> Accuracy:
    """The accuracy of logits f[N, K] for images that were generated with labels i[N] in [0, K).

    `total` is the share over all images, whatever their balance. Raises ValueError for shapes that do not match, labels
    out of range, logits that are not finite, or no image.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"logits of shape {logits.shape} and labels of {labels.shape}, expected [N, K] and [N], N >= 1"
        )
    classes = logits.shape[1]
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels {labels.dtype} from {labels.min()} to {labels.max()}, expected integers in [0, {classes})"
        )
    if not np.isfinite(logits).all():
        raise ValueError(f"the logits of {np.count_nonzero(~np.isfinite(logits).all(1))} images are not finite")
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, logits.argmax(1)), 1)
    count = confusion.sum(1)
    by_class = np.where(count > 0, np.diag(confusion) / np.maximum(count, 1), np.nan)
    return Accuracy(float(np.trace(confusion) / len(labels)), by_class, confusion)


def check(case: Case) -> None:
    """Raise ValueError where the classifier has fewer classes than the images were drawn for."""
    classifier = case.networks["classifier"]
    blank = np.zeros((1, classifier.resolution, classifier.resolution, 3), np.uint8)
    classes = classifier.outputs(blank)["logits"].shape[-1]
    if classes < case.images.classes:
        raise ValueError(f"accuracy: the classifier knows {classes} classes; these images are of {case.images.classes}")


def figures(case: Case, network: str) -> dict[str, Any]:
    rows = case.seen.rows
    result = accuracy(rows["all", network, "logits"], rows["all", "", "label"])
    by_class = [None if np.isnan(v) else round(float(v), 4) for v in result.by_class]  # None: a class without images
    return {"accuracy": result.total, "accuracy_by_class": by_class}


METRIC = Metric(
    names=("accuracy",),
    of=GENERATED,
    help="how often the classifier names the class that an image was generated for",
    figures=figures,
    gives=lambda network: (Figure("accuracy", "share", higher=True),),
    networks=("classifier",),
    takes=(("all", "logits"), ("all", "label")),
    needs=(LABELS,),
    check=check,
)
