"""The metric ssim: structural similarity (Wang et al. 2004, eq. 13, "Image quality assessment").

    SSIM = mean over windows of (2 mx my + C1)(2 sxy + C2) / ((mx² + my² + C1)(sx² + sy² + C2))

with means, variances and covariance under an 11 x 11 Gaussian window of sigma 1.5, C1 = (0.01 255)², C2 = (0.03 255)².
Wang et al. measure luminance; of colour images the mean over channels is taken, as everyone does. Windows lie inside the
image, as in their own code.
"""

import numpy as np
import scipy.ndimage

from ldm_jax.evaluation.metrics import ORIGINALS, RECONSTRUCTIONS, Figure, Metric, means
from ldm_jax.evaluation.psnr import check_pair

WINDOW = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
WINDOW /= WINDOW.sum()
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The similarity f64[N], at most 1, of u8[N, H, W, C], or of floats in [0, 255]. ValueError for other shapes or sides under 11."""
    check_pair(x, y)
    if min(x.shape[1:3]) < len(WINDOW):
        raise ValueError(
            f"images of {x.shape[1]}x{x.shape[2]}, expected sides of {len(WINDOW)} or more for SSIM's window"
        )

    def mean(a: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            a = scipy.ndimage.correlate1d(a, WINDOW, axis)
        return a[5:-5, 5:-5]

    values = []
    for a, b in zip(x.astype(np.float64), y.astype(np.float64)):
        ma, mb = mean(a), mean(b)
        va, vb, vab = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
        index = (2 * ma * mb + C1) * (2 * vab + C2) / ((ma * ma + mb * mb + C1) * (va + vb + C2))
        values.append(index.mean())
    return np.array(values)


METRIC = Metric(
    names=("ssim",),
    of=RECONSTRUCTIONS,
    help="structural similarity",
    figures=means("ssim"),
    gives=lambda network: (Figure("ssim", higher=True),),
    needs=(ORIGINALS,),
    each=lambda case, batch, which: {"ssim": ssim(batch["image"], batch["original"])},
)
