"""CMMD: its definition term by term, blocks, lengths, and figures that are known."""

import numpy as np
import pytest

from ldm_jax.evaluation import cmmd


def embeds(seed: int, n: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, 12)) + shift).astype(np.float32)


def directly(x: np.ndarray, y: np.ndarray) -> float:
    """The double sums, pair by pair."""
    x, y = ([row / np.sqrt((row**2).sum()) for row in rows.astype(np.float64)] for rows in (x, y))

    def mean(a, b):
        return np.mean([np.exp(-((p - q) ** 2).sum() / 200) for p in a for q in b])

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_the_definition(monkeypatch):
    x, y = embeds(0, 30), embeds(1, 23, 0.7)
    expected = directly(x, y)
    assert expected > 1
    for block in (1024, 7, 1):
        monkeypatch.setattr(cmmd, "BLOCK", block)
        np.testing.assert_allclose(cmmd.cmmd(x, y), expected, rtol=1e-9)
    np.testing.assert_allclose(cmmd.cmmd(y, x), expected, rtol=1e-9)
    np.testing.assert_allclose(cmmd.cmmd(3 * x, y), expected, rtol=1e-6)


def test_known_figures():
    x = embeds(0, 20)
    assert abs(cmmd.cmmd(x, x[::-1])) < 1e-9
    one, other = np.eye(2)[:1], -np.eye(2)[:1]
    np.testing.assert_allclose(cmmd.cmmd(one, other), 2000 * (1 - np.exp(-0.02)), rtol=1e-12)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((4,), (3, 4)), ((0, 4), (3, 4))], ids=str)
def test_refusals(shapes):
    with pytest.raises(ValueError, match=r"expected \[n, P\] and \[m, P\]"):
        cmmd.cmmd(*(np.ones(shape) for shape in shapes))
