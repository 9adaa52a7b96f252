"""The score's two extremes, and its definition."""

import numpy as np
import pytest

from ldm_jax.evaluation.inception_score import inception_score


def test_extremes():
    certain = 200.0 * np.eye(8)[np.arange(80) % 8]
    assert inception_score(certain, splits=1).mean == pytest.approx(8, rel=1e-9)
    assert inception_score(certain[:8].repeat(10, 0), splits=8, seed=None).mean == pytest.approx(1, rel=1e-9)
    assert inception_score(np.zeros((40, 5)), splits=4) == (1, 0)


def test_definition():
    logits = np.random.default_rng(0).normal(size=(30, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    halves = [np.exp(np.mean(np.sum(q * np.log(q / q.mean(0)), 1))) for q in (p[:15], p[15:])]
    result = inception_score(logits, splits=2, seed=None)
    np.testing.assert_allclose(result, (np.mean(halves), np.std(halves)), rtol=1e-10)


def test_refusals():
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        inception_score(np.zeros((3, 4)))
