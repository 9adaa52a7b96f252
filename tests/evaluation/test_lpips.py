"""LPIPS of pairs of images, with a network in the place of the published one (which tests/metrics compares with torch)."""

import numpy as np

from ldm_jax.evaluation import lpips
from ldm_jax.weights.tree_hash import tree_sha256
from tests.evaluation.fake import PIXELS


def test_lpips_is_of_an_image_and_its_own_original(monkeypatch):
    """A network that treats its first image otherwise than its second; 70 pairs are more than a batch."""

    class Network:
        def apply(self, variables, x, y):
            return variables["params"]["w"] * (x[:, :, :, 0] - y[:, :, :, 1] ** 2).sum((1, 2))

    params = {"w": np.float32(3)}
    monkeypatch.setattr(lpips.lpips_weights, "load", lambda vgg, heads: (Network(), params))
    loaded = lpips.load("vgg.pth", "heads.pth")
    x, y = PIXELS / 127.5 - 1, PIXELS[::-1] / 127.5 - 1
    expected = 3 * (x[..., 0] - y[..., 1] ** 2).sum((1, 2))
    np.testing.assert_allclose(loaded.distance(PIXELS, PIXELS[::-1]), expected, rtol=1e-4, atol=1e-3)
    assert loaded.sha256 == tree_sha256(params)
