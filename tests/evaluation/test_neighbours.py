"""Neighbours against the whole matrix of distances, and figures on sets whose copies are known."""

import numpy as np
import pytest

from ldm_jax.evaluation import neighbours, precision_recall


def whole(a, b):
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


@pytest.mark.parametrize("block", [7, 1024])
def test_equals_the_whole_matrix(tmp_path, monkeypatch, block):
    monkeypatch.setattr(neighbours, "blocks", lambda n: precision_recall.blocks(n, block))
    generator = np.random.default_rng(0)
    training = generator.normal(1e3, 1, size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", training)
    features = generator.normal(1e3, 1, size=(20, 4)).astype(np.float32)
    features[:3] = training[[30, 2, 49]]
    rows, distances = neighbours.nearest(features, np.load(tmp_path / "a.npy", mmap_mode="r"), 5)
    expected = whole(features.astype(np.float64), training.astype(np.float64))
    np.testing.assert_array_equal(rows, np.argsort(expected, 1)[:, :5])
    np.testing.assert_allclose(distances, np.sort(expected, 1)[:, :5], rtol=1e-12)
    np.testing.assert_array_equal(distances[:3, 0], 0)


def test_memorised_by_definition():
    generator = np.random.default_rng(1)
    training, features = generator.normal(size=(80, 3)), generator.normal(size=(60, 3))
    result = neighbours.memorised(*neighbours.nearest(features, training, 3), training)
    d, own = whole(features, training), whole(training, training) + np.diag(np.full(80, np.inf))
    nearest = np.sort(d, 1)
    copied = np.mean([near[0] <= near[1] / 3 for near in nearest])
    authentic = np.mean([row.min() > own[row.argmin()].min() for row in d])
    assert result == (pytest.approx(copied), pytest.approx(authentic))
    assert 0 < copied < authentic < 1


def test_known_copies():
    generator = np.random.default_rng(2)
    training = generator.normal(size=(400, 32))
    fresh = generator.normal(size=(70, 32))
    made = np.concatenate([fresh, training[:30] + 1e-3 * generator.normal(size=(30, 32))])
    result = neighbours.memorised(*neighbours.nearest(made, training, 2), training)
    assert result.copied == pytest.approx(0.3)
    assert neighbours.memorised(*neighbours.nearest(training, training, 2), training) == (1, 0)
    alone = neighbours.memorised(*neighbours.nearest(fresh, training, 2), training)
    assert alone.copied == 0 and result.authentic == pytest.approx(0.7 * alone.authentic)
    # Both of two equal training images at distance 0.
    assert (
        neighbours.memorised(*neighbours.nearest(training, training.repeat(2, 0), 2), training.repeat(2, 0)).copied == 1
    )


def test_refusals():
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(4, 5\)"):
        neighbours.nearest(np.zeros((2, 3)), np.zeros((4, 5)), 1)
    with pytest.raises(ValueError, match="k = 5 neighbours among 4"):
        neighbours.nearest(np.zeros((2, 3)), np.zeros((4, 3)), 5)
    with pytest.raises(ValueError, match=r"\(2, 1\), expected \[N, k\] with k >= 2"):
        neighbours.memorised(*neighbours.nearest(np.zeros((2, 3)), np.zeros((4, 3)), 1), np.zeros((4, 3)))
