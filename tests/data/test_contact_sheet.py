"""Every image is found again, whole, at its place."""

import itertools
import shutil

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFont

from ldm_jax.data import contact_sheet, fonts

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (7, 5, 6, 3), np.uint8)


@pytest.mark.parametrize(("columns", "scale", "pad"), [(3, 1, 2), (7, 2, 0), (10, 3, 1)])
def test_images_lie_row_by_row(columns, scale, pad):
    out = contact_sheet.compose(IMAGES, columns, pad=pad, scale=scale)
    across = min(columns, 7)
    rows = -(-7 // columns)
    assert out.shape == (rows * (5 * scale + pad) + pad, across * (6 * scale + pad) + pad, 3)
    for i, image in enumerate(IMAGES):
        top, left = pad + i // columns * (5 * scale + pad), pad + i % columns * (6 * scale + pad)
        tile = out[top : top + 5 * scale, left : left + 6 * scale]
        np.testing.assert_array_equal(tile, image.repeat(scale, 0).repeat(scale, 1))


@pytest.mark.filterwarnings("ignore:captions hold characters")
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
    plain = contact_sheet.compose(images, 4)
    out = contact_sheet.compose(images, 4, labels=labels)
    assert out.shape[1] == plain.shape[1] and out.shape[0] > plain.shape[0] + 20
    np.testing.assert_array_equal(out[: 2 + 80], plain[: 2 + 80])
    below = out[82:100, 2:98]
    assert below.min() < 100 and (out[82:110, 100:196] == 255).all()  # 'cat' is drawn, '' is not
    second = next(top for top in range(90, len(out)) if (out[top : top + 80, 2:98] == images[4]).all())
    np.testing.assert_array_equal(out[second : second + 80, 100:196], images[5])


def test_wrap_stays_within_the_width():
    font = ImageFont.load_default(size=12)
    for text in ("one two three four five six seven eight nine ten " * 3, "unbreakable" * 9):
        lines = contact_sheet.wrap(text, font, 80)
        assert 1 < len(lines) <= 4 and lines[-1].endswith("…")
        assert all(font.getlength(line) <= 82 for line in lines[:-1])
    assert contact_sheet.wrap("short", font, 80) == ["short"]


def test_wrap_breaks_at_blanks_and_within_what_is_wider_than_a_line():
    font = ImageFont.load_default(size=12)
    assert contact_sheet.wrap("", font, 80) == contact_sheet.wrap(" \n\t", font, 80) == []
    assert contact_sheet.wrap("one\ntwo\u3000three", font, 200) == ["one two three"]
    assert "".join(contact_sheet.wrap("w" * 20, font, 80)) == "w" * 20
    for width in (1, 5, 80):
        for text in ("a" * 50_000, "ab " * 50_000, "\u4e2d" * 50_000):
            lines = contact_sheet.wrap(text, font, width)
            assert len(lines) == 4 and lines[-1].endswith("…")
    # Every line is as full as it can be.
    words = "the a of light shadow composition detailed background foreground texture".split()
    lines = contact_sheet.wrap(" ".join(words), font, 120, lines=9)
    assert " ".join(lines).split() == words
    for line, following in itertools.pairwise(lines):
        assert font.getlength(line) <= 120 < font.getlength(f"{line} {following.split()[0]}")


def test_a_long_caption_costs_what_a_short_one_does():
    """Counted, not timed: the letters that the font is asked to measure do not grow with the caption."""

    class Counted:
        def __init__(self):
            self.font, self.letters = ImageFont.load_default(size=12), 0

        def getlength(self, text):
            self.letters += len(text)
            return self.font.getlength(text)

    short, long = Counted(), Counted()
    contact_sheet.wrap("warm light " * 20, short, 100), contact_sheet.wrap("warm light " * 20_000, long, 100)
    assert long.letters <= 2 * short.letters


def test_captions_in_other_scripts_are_drawn_or_spelt_out(recwarn, tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(fonts, "_said", set())
    fonts._paths.cache_clear()
    for text in ("Рыжая лиса", "αλεπού", "é “—” …", "ثعلب", "שועל", "a\u200bb\ufe0f"):
        drawn, font = fonts.fitting(text, 12)
        assert "\\" not in drawn and drawn[0] == text[0] and fonts._characters(font.path) >= set(map(ord, drawn))
    assert not recwarn.list
    assert fonts.fitting("plain", 12)[1].getname()[0] == "Aileron"  # as ever
    for _ in range(2):
        assert fonts.fitting("狐 fox \udc80\x07", 12)[0] == "\\u72d0 fox \\udc80"
    (warning,) = recwarn.list
    assert "U+72D0 (CJK UNIFIED IDEOGRAPH-72D0)" in str(warning.message)
    # A font of the system that has them is found; files that are none are passed by.
    (tmp_path / "broken.ttf").write_bytes(b"no font" * 100_000)
    (tmp_path / "gone.otf").symlink_to(tmp_path / "nowhere.otf")
    (tmp_path / "deep").mkdir()
    shutil.copy(matplotlib.get_data_path() + "/fonts/ttf/LastResortHE-Regular.ttf", tmp_path / "deep" / "all.TTF")
    fonts._paths.cache_clear()
    drawn, font = fonts.fitting("狐 fox", 12)
    assert drawn == "狐 fox" and font.path.endswith("all.TTF")
    out = contact_sheet.compose(np.zeros((2, 64, 64, 3), np.uint8), labels=["狐" * 500, "fox"])
    assert out.shape[0] < 200
    fonts._paths.cache_clear()


def test_grey_images_small_images_and_files(tmp_path):
    grey = IMAGES[..., :1]
    path = contact_sheet.save(tmp_path / "deep" / "a.png", grey, 2)
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
        contact_sheet.compose(images, **options)
