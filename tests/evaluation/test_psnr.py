"""PSNR by hand."""

import numpy as np
import pytest

from ldm_jax.evaluation import psnr


def test_psnr():
    x = np.full((2, 4, 4, 3), 100, np.uint8)
    y = x.copy()
    y[0] += 16
    result = psnr.psnr(x, y)
    assert result[0] == pytest.approx(20 * np.log10(255 / 16)) and result[1] == pytest.approx(20 * np.log10(255) + 100)
    # Bytes do not wrap: 100 - 116 is -16, not 240.
    np.testing.assert_array_equal(psnr.psnr(y, x), result)
    np.testing.assert_allclose(psnr.psnr(x.astype(np.float32), y.astype(np.float32)), result)
