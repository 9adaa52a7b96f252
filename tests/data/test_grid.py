"""Every image is found again, whole, at its place."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from ldm_jax.data import grid

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (7, 5, 6, 3), np.uint8)


@pytest.mark.parametrize(("columns", "scale", "pad"), [(3, 1, 2), (7, 2, 0), (10, 3, 1)])
def test_images_lie_row_by_row(columns, scale, pad):
    out = grid.grid(IMAGES, columns, pad=pad, scale=scale)
    across = min(columns, 7)
    rows = -(-7 // columns)
    assert out.shape == (rows * (5 * scale + pad) + pad, across * (6 * scale + pad) + pad, 3)
    for i, image in enumerate(IMAGES):
        top, left = pad + i // columns * (5 * scale + pad), pad + i % columns * (6 * scale + pad)
        tile = out[top : top + 5 * scale, left : left + 6 * scale]
        np.testing.assert_array_equal(tile, image.repeat(scale, 0).repeat(scale, 1))


def test_captions_do_not_touch_the_images():
    labels = [
        "cat",
        "",
        "a small red circle above a large blue square, left of a green triangle",
        "é 中",
        "b",
        "c",
        "d",
    ]
    images = IMAGES.repeat(16, 1).repeat(16, 2)
    plain = grid.grid(images, 4)
    out = grid.grid(images, 4, labels=labels)
    assert out.shape[1] == plain.shape[1] and out.shape[0] > plain.shape[0] + 20
    np.testing.assert_array_equal(out[: 2 + 80], plain[: 2 + 80])
    below = out[82:100, 2:98]
    assert below.min() < 100 and (out[82:110, 100:196] == 255).all()  # 'cat' is drawn, '' is not
    second = next(top for top in range(90, len(out)) if (out[top : top + 80, 2:98] == images[4]).all())
    np.testing.assert_array_equal(out[second : second + 80, 100:196], images[5])


def test_wrap_stays_within_the_width():
    font = ImageFont.load_default(size=12)
    for text in ("one two three four five six seven eight nine ten " * 3, "unbreakable" * 9):
        lines = grid.wrap(text, font, 80)
        assert 1 < len(lines) <= 4 and lines[-1].endswith("…")
        assert all(font.getlength(line) <= 82 for line in lines[:-1])
    assert grid.wrap("short", font, 80) == ["short"]


def test_grey_images_small_images_and_files(tmp_path):
    grey = IMAGES[..., :1]
    path = grid.save(tmp_path / "deep" / "a.png", grey, 2)
    with Image.open(path) as picture:
        out = np.asarray(picture)
    assert out.shape[1] == 2 * 66 + 6  # 6 pixels wide, 11 times as large
    np.testing.assert_array_equal(out[2, 2], [grey[0, 0, 0, 0]] * 3)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGES.astype(np.float32), {}, "float32"),
        (IMAGES[0], {}, r"expected uint8\[N, H, W, 3\]"),
        (IMAGES[:0], {}, "N >= 1"),
        (IMAGES, {"labels": ["a"]}, "1 labels for 7 images"),
        (IMAGES, {"columns": -1}, "columns -1"),
    ],
)
def test_refusals(images, options, message):
    with pytest.raises(ValueError, match=message):
        grid.grid(images, **options)
