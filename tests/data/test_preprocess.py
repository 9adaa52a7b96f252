"""Crops and flips, against slow arithmetic written out here."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import preprocess
from ldm_jax.data.preprocess import crop_image, random_flip


def _smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.stack([255 * x, 255 * y, 127 * (x + y)], -1).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (70, 64), (64, 130), (500, 333), (33, 32), (31, 90), (257, 256)])
@pytest.mark.parametrize("crop", ["adm", "lanczos"])
def test_the_shape_is_right_and_the_centre_stays(shape, crop):
    image = _smooth(*shape)
    out = crop_image(image, 32, crop)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8
    centre = image[shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1].mean((0, 1))
    slope = 255 * min(shape) / max(shape) / 32
    assert np.abs(out[15:17, 15:17].mean((0, 1)) - centre).max() <= 1.2 * slope + 2


def test_adm_halves_with_a_box_filter():
    """From 4R the crop is two means over 2 x 2 pixels, rounded along rows and then along columns, and nothing else."""
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.float64)
    expected = image
    for _ in range(2):
        expected = np.floor((expected[:, ::2] + expected[:, 1::2]) / 2 + 0.5)
        expected = np.floor((expected[::2] + expected[1::2]) / 2 + 0.5)
    assert (crop_image(image.astype(np.uint8), 32, "adm") == expected).all()


def test_adm_then_reduces_bicubically_and_cuts_the_centre():
    image = np.random.default_rng(0).integers(0, 256, (50, 80, 3)).astype(np.uint8)
    whole = np.asarray(Image.fromarray(image).resize((51, 32), Image.Resampling.BICUBIC))
    assert (crop_image(image, 32, "adm") == whole[:, 9:41]).all()


def test_the_middle_of_an_extreme_shape_is_that_of_the_whole(monkeypatch):
    """To the bit, on shapes of every kind; where the whole would not fit, no more than the middle is made."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        resolution, short = int(rng.choice([8, 30, 32, 64])), int(rng.integers(1, 30))
        shape = [short, int(rng.integers(short, 12 * short + 60))][:: rng.choice([-1, 1])]
        image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
        whole, middle = [], []
        for out, long in ((whole, 10**9), (middle, 0)):
            monkeypatch.setattr(preprocess, "LONG", long)
            out.append(crop_image(image, resolution, "adm"))
        np.testing.assert_array_equal(middle, whole, f"{shape} to {resolution}")
    monkeypatch.undo()
    for shape in ((1, 500_000), (500_000, 1)):
        image = np.broadcast_to(np.uint8(np.arange(500_000) // 1960).reshape(*shape, 1), (*shape, 3))
        tracemalloc.start()
        out = crop_image(image, 256)
        assert tracemalloc.get_traced_memory()[1] < 2**25  # 32 MiB; enlarged to 256 it would be 98 GB
        tracemalloc.stop()
        assert out.shape == (256, 256, 3) and abs(int(out[128, 128, 0]) - 127) <= 1


def test_lanczos_cuts_the_largest_square_first():
    image = np.random.default_rng(0).integers(0, 256, (50, 80, 3)).astype(np.uint8)
    square = Image.fromarray(image[:, 15:65])
    assert (crop_image(image, 32, "lanczos") == np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))).all()


def test_a_fitting_image_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    for crop in ("adm", "lanczos", "none"):
        assert (crop_image(image, 32, crop) == image).all()
    with pytest.raises(ValueError, match=r"f.png: 32x32 pixels with crop='none'; expected 16x16"):
        crop_image(image, 16, "none", "f.png")


def test_flip_mirrors_left_and_right():
    image = _smooth(4, 6)
    seen = {random_flip(image, np.random.default_rng(s)).tobytes() for s in range(20)}
    assert seen == {image.tobytes(), np.ascontiguousarray(image[:, ::-1]).tobytes()}
