"""SSIM against the sum over each window written out (and against scikit-image in tests/metrics)."""

import numpy as np
import pytest

from ldm_jax.evaluation import psnr, ssim


def pictures(n, height, width):
    """A smooth picture and a noisy, darker one of it, u8[n, height, width, 3]."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    a, b, c = generator.uniform(0.05, 0.5, (3, n, 1, 1, 3))
    smooth = 128 + 90 * np.sin(a * y[..., None] + b * x[..., None] + 9 * c)
    noisy = 0.9 * smooth + generator.normal(0, 12, smooth.shape)
    return [np.clip(np.rint(p), 0, 255).astype(np.uint8) for p in (smooth, noisy)]


def test_ssim_equals_windows():
    x, y = pictures(2, 14, 17)
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    values = np.zeros((2, 4, 7, 3))
    for n, i, j, c in np.ndindex(*values.shape):
        a, b = (z[n, i : i + 11, j : j + 11, c].astype(float) for z in (x, y))
        ma, mb = np.sum(weights * a), np.sum(weights * b)
        va, vb, vab = (np.sum(weights * p * q) for p, q in ((a - ma, a - ma), (b - mb, b - mb), (a - ma, b - mb)))
        values[n, i, j, c] = (2 * ma * mb + 6.5025) * (2 * vab + 58.5225)
        values[n, i, j, c] /= (ma**2 + mb**2 + 6.5025) * (va + vb + 58.5225)
    result = ssim.ssim(x, y)
    np.testing.assert_allclose(result, values.mean((1, 2, 3)), rtol=1e-12)
    assert 0.2 < result.min() and result.max() < 0.99
    np.testing.assert_allclose(ssim.ssim(x, x), 1, rtol=1e-12)


def test_refusals():
    x = np.zeros((2, 10, 20, 3))
    with pytest.raises(ValueError, match="images of 10x20, expected sides of 11"):
        ssim.ssim(x, x)
    for function in (psnr.psnr, ssim.ssim):
        with pytest.raises(ValueError, match=r"\(2, 10, 20, 3\) and \(2, 20, 10, 3\)"):
            function(x, np.zeros((2, 20, 10, 3)))
