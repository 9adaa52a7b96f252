"""Accuracy by class on logits whose confusion is written down first."""

import numpy as np
import pytest

from ldm_jax.evaluation.accuracy import accuracy


def test_confusion_is_recovered():
    confusion = np.array([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [5, 0, 0, 1]])
    labels, named = (np.repeat(axis.ravel(), confusion.ravel()) for axis in np.indices((4, 4)))
    order = np.random.default_rng(0).permutation(len(labels))
    result = accuracy(np.eye(4)[named][order] - 3, labels[order].astype(np.int32))
    np.testing.assert_array_equal(result.confusion, confusion)
    assert result.total == pytest.approx(6 / 14)
    np.testing.assert_allclose(result.by_class, [0.75, 0.5, np.nan, 1 / 6])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(4, int), r"shape \(3, 2\) and labels of \(4,\)"),
        (np.zeros((2, 2)), np.array([0, 2]), r"from 0 to 2, expected integers in \[0, 2\)"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "expected integers"),
        (np.full((2, 2), np.nan), np.array([0, 1]), "logits of 2 images are not finite"),
        (np.zeros((0, 2)), np.zeros(0, int), "N >= 1"),
    ],
)
def test_refusals(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        accuracy(logits, labels)
