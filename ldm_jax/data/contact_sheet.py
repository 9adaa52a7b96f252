"""A contact sheet: images side by side in one picture, with captions below them."""

import bisect
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm_jax.data import fonts

LINES = 4  # of a caption, at most


def compose(
    images: np.ndarray,
    columns: int | None = None,
    pad: int = 2,
    labels: Sequence[str] | None = None,
    scale: int | None = None,
    background: int = 255,
) -> np.ndarray:
    """u8[N, H, W, 3] or u8[N, H, W, 1] -> u8[rows, cols, 3], row by row.

    `columns` defaults to the square root of N. Images are enlarged by repeating pixels, `scale` times (default: until
    they are at least 64 pixels wide), so that nothing is smoothed. `labels` are drawn below, wrapped to the image's width.
    Raises ValueError for another shape or dtype, or a number of labels that is not N.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images {images.dtype}{list(images.shape)}, expected uint8[N, H, W, 3] with N >= 1")
    n, height, width, _ = images.shape
    if labels is not None and len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} images")
    columns = columns or math.ceil(math.sqrt(n))
    scale = scale or max(1, math.ceil(64 / width))
    if columns < 1 or scale < 1 or pad < 0:
        raise ValueError(f"columns {columns}, scale {scale}, pad {pad}: expected at least 1, 1 and 0")
    height, width = height * scale, width * scale
    captions, drawn_with, line = [[] for _ in range(n)], [], 0
    if labels is not None:
        size = max(10, min(16, width // 9))
        line = math.ceil(1.25 * size)
        # A line has at most as many letters as pixels: what comes later is never seen.
        shown = [" ".join(label.split())[: LINES * width + 1] for label in labels]
        texts, drawn_with = zip(*(fonts.fitting(label, size) for label in shown))
        captions = [wrap(text, font, width) for text, font in zip(texts, drawn_with)]
    # Captions of one row share their height, so that the rows below stay aligned.
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    gap = line // 2
    heights = [height + line * max(len(captions[i]) for i in row) + gap for row in rows]
    across = min(columns, n)
    canvas = Image.new("RGB", (across * (width + pad) + pad, sum(heights) + pad * (len(rows) + 1)), (background,) * 3)
    draw, top = ImageDraw.Draw(canvas), pad
    for row, row_height in zip(rows, heights):
        for column, i in enumerate(row):
            left = pad + column * (width + pad)
            pixels = np.broadcast_to(images[i], (*images.shape[1:3], 3)).repeat(scale, 0).repeat(scale, 1)
            canvas.paste(Image.fromarray(pixels), (left, top))
            for k, text in enumerate(captions[i]):
                at = (left + width // 2, top + height + k * line)
                draw.text(at, text, fill=(0,) * 3 if background > 127 else (255,) * 3, font=drawn_with[i], anchor="ma")
        top += row_height + pad
    return np.asarray(canvas)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = LINES) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; what does not fit ends in an ellipsis.

    Lines break at blanks, and within a word that is wider than a line (scripts without blanks). What cannot be seen is not measured.
    """

    def fits(part: str) -> bool:
        # No letter is narrower than a pixel: what is longer than that need not be measured.
        return len(part) <= width and font.getlength(part) <= width

    out, line = [], ""
    for word in text.split():
        while word and len(out) <= lines:
            if fits(joined := f"{line} {word}" if line else word):
                line, word = joined, ""
            elif line:
                out.append(line)
                line = ""
            else:
                most = max(bisect.bisect_left(range(len(word)), True, key=lambda n: not fits(word[: n + 1])), 1)
                out.append(word[:most])
                word = word[most:]
    out += [line] if line else []
    if len(out) > lines:
        last = out[lines - 1]
        while last and not fits(last + "…"):
            last = last[:-1]
        out = [*out[: lines - 1], last + "…"]
    return out


def save(path: str | pathlib.Path, images: np.ndarray, columns: int | None = None, **options) -> pathlib.Path:
    """Writes what `compose` returns as a PNG, in a folder that is made if it is missing; returns the path."""
    path = pathlib.Path(path)
    picture = Image.fromarray(compose(images, columns, **options))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG")
    return path
