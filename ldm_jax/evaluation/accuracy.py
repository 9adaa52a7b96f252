"""Does a classifier name the class that an image was generated for? In total, by class, and what it says instead."""

from typing import NamedTuple

import numpy as np


class Accuracy(NamedTuple):
    """total and by_class f64[K] in [0, 1] (NaN for a class without images); confusion i64[asked for, named]."""

    total: float
    by_class: np.ndarray
    confusion: np.ndarray


def accuracy(logits: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Of logits f[N, K] for images generated with labels i[N] in [0, K).

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
    asked = confusion.sum(1)
    by_class = np.where(asked > 0, np.diag(confusion) / np.maximum(asked, 1), np.nan)
    return Accuracy(float(np.trace(confusion) / len(labels)), by_class, confusion)
