"""Spectra that are known: white noise, one wave, and a power law."""

import numpy as np
import pytest
import scipy.fft

from ldm_jax.evaluation import spectrum


def noise(n=400, side=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, side, side, 3))


def coloured(power, n=40, side=32, seed=0):
    """Noise whose amplitude falls with the radial frequency as its `power`."""
    f = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(side)], indexing="ij"))
    gain = np.maximum(f, 1 / side) ** -power
    return scipy.fft.ifft2(scipy.fft.fft2(noise(n, side, seed), axes=(1, 2)) * gain[..., None], axes=(1, 2)).real


def test_white_noise_is_flat():
    result = spectrum.radial(5 + np.array([1, 2, 3]) * noise())
    np.testing.assert_allclose(result.frequency, np.arange(9) / 16)
    np.testing.assert_allclose(result.power, 1, atol=0.12)
    # Of the 255 frequencies but 0, those beyond a circle of radius 4 of 16.
    y, x = np.mgrid[-8:8, -8:8]
    assert spectrum.high_share(noise()) == pytest.approx((x**2 + y**2 > 16).sum() / 255, abs=0.01)
    np.testing.assert_allclose(spectrum.profile(noise(2000)), 1, atol=0.03)


@pytest.mark.parametrize(("wave", "ring", "high"), [((2, 0), 2, 0), ((3, 4), 5, 1), ((0, 4), 4, 0), ((7, 0), 7, 1)])
def test_one_wave(wave, ring, high):
    y, x = np.mgrid[0:16, 0:16]
    z = np.cos(2 * np.pi * (wave[0] * y + wave[1] * x) / 16 + 0.3)[None, ..., None]
    z = np.concatenate([z, np.full_like(z, 7)], -1)  # a constant channel counts for nothing
    result = spectrum.radial(z)
    assert result.power.argmax() == ring and result.power.sum() == pytest.approx(result.power[ring])
    assert spectrum.high_share(z) == pytest.approx(high, abs=1e-12)


def test_power_law():
    """Amplitude 1 / f is power 1 / f²: a slope of -2 in the logarithm of both."""
    result = spectrum.radial(coloured(1))
    slope = np.polyfit(np.log(result.frequency[2:]), np.log(result.power[2:]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.15)


def test_excess():
    images = coloured(1)
    assert spectrum.excess(3 * images - 1, images) == pytest.approx(0, abs=1e-12)
    rough, white = spectrum.excess(coloured(0.5, seed=1), images), spectrum.excess(noise(40, seed=2), images)
    assert 0.1 < rough < white
    assert spectrum.excess(coloured(1.5, seed=3), images) < -0.1
    assert spectrum.high_share(images) < spectrum.high_share(coloured(0.5)) < spectrum.high_share(noise())


def test_blocks_are_cosines():
    """One cosine in each block has one coefficient; the rest at the edge does not count."""
    wave = np.cos(np.pi * (np.arange(8) + 0.5) * 3 / 8)
    z = np.tile(wave[:, None] * np.ones(8), (2, 2))[None, ..., None] + np.arange(2)[:, None, None, None]
    edge = np.pad(z, ((0, 0), (0, 3), (0, 5), (0, 0)), mode="reflect")
    for latents in (z, edge):
        result = spectrum.profile(latents)
        assert result[3] > 100 * np.delete(result, (0, 3)).max()


def test_refusals():
    with pytest.raises(ValueError, match="all 3 channels of the latents are constant"):
        spectrum.radial(np.ones((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\), expected finite numbers"):
        spectrum.high_share(np.ones((8, 8, 3)))
    with pytest.raises(ValueError, match="latents of 7x16, expected sides of 8"):
        spectrum.profile(noise(2)[:, :7])
