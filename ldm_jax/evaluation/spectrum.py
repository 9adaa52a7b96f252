"""The metric latents: mean and variance of each channel of an autoencoder's latents, and their spectra.

The spectra say how much of the latents is fine detail, which diffusion makes last and worst:

    radial      power |F z|² of the Fourier transform by radial frequency
    high_share  share of it above half the Nyquist frequency
    profile     amplitude |DCT z| of 8 x 8 blocks, low to high frequency, over that of the blocks' constant
    excess      mean of log10 profile(latents) - log10 profile(images)

The profiles are after Skorokhodov et al. 2025 (arXiv:2502.14831). They compare those of latents and of RGB, and find that diffusion in
latents is the harder, the further their profile lies above that of images ('diffusability'). `excess`, one number of the two curves in
decades, is not from the paper; it is 0 for latents that decay as images do, and larger for rougher ones.

Every channel is whitened over the whole set first, so that figures of different autoencoders can be compared: the mean and scale of a
channel, which training removes too, do not count.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.fft

from ldm_jax.evaluation.metrics import ORIGINALS, RECONSTRUCTIONS, Case, Figure, Metric

BLOCK = 8


class Radial(NamedTuple):
    """Mean power in each ring of frequencies: frequency f64[K] in cycles a sample, 0 to 0.5; power f64[K], 1 for white noise."""

    frequency: np.ndarray
    power: np.ndarray


def _white(z: np.ndarray) -> np.ndarray:
    """f64[N, h, w, C] with mean 0 and variance 1 in each channel; constant channels are left out."""
    z = np.asarray(z, np.float64)
    if z.ndim != 4 or min(z.shape) < 1 or not np.isfinite(z).all():
        raise ValueError(f"latents of shape {z.shape}, expected finite numbers [N, h, w, C]")
    spread = z.std((0, 1, 2))
    there = spread > 1e-7 * np.abs(z).max()
    if not there.any():
        raise ValueError(f"all {z.shape[-1]} channels of the latents are constant")
    return (z[..., there] - z[..., there].mean((0, 1, 2))) / spread[there]


def _power(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(radial frequency in cycles a sample, mean power) of whitened latents, both f64[h, w]."""
    power = np.mean(np.abs(scipy.fft.fft2(_white(z), axes=(1, 2), norm="ortho")) ** 2, axis=(0, 3))
    return np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in z.shape[1:3]), indexing="ij")), power


def radial(z: np.ndarray) -> Radial:
    """The radial spectrum of latents f[N, h, w, C].

    The rings have width 1 / min(h, w) and lie about 0, 1 / min(h, w), ... up to the Nyquist frequency.

    Raises ValueError for another shape, numbers that are not finite, or latents without any spread.
    """
    frequency, power = _power(z)
    side = min(frequency.shape)
    ring = np.rint(frequency * side).astype(int)
    rings = np.arange(side // 2 + 1)
    return Radial(rings / side, np.array([power[ring == r].mean() for r in rings]))


def high_share(z: np.ndarray) -> float:
    """The share of the power (the constant's excepted) above 0.25 cycles a sample, in [0, 1]; about 0.8 for white noise.

    ValueError as in `radial`.
    """
    frequency, power = _power(z)
    return float(power[frequency > 0.25].sum() / power[frequency > 0].sum())


def profile(z: np.ndarray) -> np.ndarray:
    """f64[15]: mean |DCT| of 8 x 8 blocks of f[N, h, w, C] by diagonal u + v of the zigzag, over that of u = v = 0.

    Blocks lie side by side from the corner; what is left at the edge does not count. ValueError as in `radial`, and for sides
    under 8.
    """
    z = _white(z)
    n, h, w, c = z.shape
    if min(h, w) < BLOCK:
        raise ValueError(f"latents of {h}x{w}, expected sides of {BLOCK} or more for blocks of {BLOCK}x{BLOCK}")
    rows, columns = h // BLOCK, w // BLOCK
    cut = z[:, : rows * BLOCK, : columns * BLOCK].reshape(n, rows, BLOCK, columns, BLOCK, c)
    amplitude = np.abs(scipy.fft.dctn(cut, axes=(2, 4), norm="ortho")).mean((0, 1, 3, 5))
    diagonal = np.add.outer(np.arange(BLOCK), np.arange(BLOCK))
    return np.array([amplitude[diagonal == d].mean() for d in range(2 * BLOCK - 1)]) / amplitude[0, 0]


def excess(z: np.ndarray, images: np.ndarray) -> float:
    """The excess in decades of latents f[N, h, w, C] over the images [N, H, W, 3] that they encode; positive: rougher than images.

    Each is cut into blocks at the resolution that it has. ValueError as in `profile`.
    """
    return float(np.mean(np.log10(profile(z)[1:]) - np.log10(profile(images)[1:])))


def each(case: Case, batch: dict[str, np.ndarray], which: slice) -> dict[str, Any]:
    """First and second moments f64[b, C] of the drawn latents of each image."""
    z = batch["mean"].astype(np.float64)
    square = z**2 + np.square(batch["std"], dtype=np.float64) if "std" in batch else z**2
    return {"latent_mean": z.mean((1, 2)), "latent_square": square.mean((1, 2))}


def figures(case: Case, network: str) -> dict[str, Any]:
    """Mean and variance of each channel of drawn latents; the power of their means by radial frequency."""
    mean, square = (case.seen.values[name].mean(0) for name in ("latent_mean", "latent_square"))
    z, originals = (case.seen.rows["some", "", name] for name in ("mean", "original"))
    row = {
        "latent_mean": mean.tolist(),
        "latent_variance": (square - mean**2).tolist(),
        "latent_power": radial(z).power.tolist(),
        "latent_high_share": high_share(z),
    }
    if min(*z.shape[1:3], *originals.shape[1:3]) >= BLOCK:
        row["latent_excess"] = excess(z, originals)
    return row


METRIC = Metric(
    names=("latents",),
    of=RECONSTRUCTIONS,
    help="mean and variance of the latents by channel, and their spectrum",
    figures=figures,
    gives=lambda network: (Figure("latent_high_share", "share"), Figure("latent_excess", "decades")),
    takes=(("some", "mean"), ("some", "original")),
    needs=(ORIGINALS,),
    each=each,
)
