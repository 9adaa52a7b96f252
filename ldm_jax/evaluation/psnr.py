"""The metric psnr: the peak signal-to-noise ratio of reconstructions.

PSNR = 10 log10(255² / mean (x - y)²)
"""

import numpy as np

from ldm_jax.evaluation.metrics import ORIGINALS, RECONSTRUCTIONS, Figure, Metric, means


def check_pair(x: np.ndarray, y: np.ndarray) -> None:
    """Raise ValueError unless both are [N, H, W, C] of the same shape."""
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"images of shapes {x.shape} and {y.shape}, expected two [N, H, W, C] alike")


def psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The ratio f64[N] in dB of u8[N, H, W, C], or of floats in [0, 255].

    The mean squared error counts as 1e-10 at least, so that equal images have 148 dB and a mean over images is finite.
    ValueError for shapes that differ.
    """
    check_pair(x, y)
    error = [np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2) for a, b in zip(x, y)]
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-10))


METRIC = Metric(
    names=("psnr",),
    of=RECONSTRUCTIONS,
    help="peak signal-to-noise ratio",
    figures=means("psnr"),
    gives=lambda network: (Figure("psnr", "dB", higher=True),),
    needs=(ORIGINALS,),
    each=lambda case, batch, which: {"psnr": psnr(batch["image"], batch["original"])},
)
