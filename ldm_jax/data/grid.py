"""Many small images as one picture for eyes: a grid, enlarged to be seen, with captions under the images if there are any."""

import math
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (250, 250, 250), (40, 40, 40)


def make(
    images: np.ndarray, captions: list[str] | None = None, columns: int | None = None, side: int = 96
) -> Image.Image:
    """u8[N, H, W, 3] -> one RGB picture, row by row; images below `side` pixels are enlarged by a whole factor."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images {images.dtype}{list(images.shape)}: expected uint8[N, H, W, 3] with N > 0")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    count, height, width = images.shape[:3]
    factor = max(1, round(side / max(height, width)))
    height, width = height * factor, width * factor
    columns = columns or min(count, max(1, math.isqrt(count - 1) + 1))
    gap, lines, text = 4, 0, []
    font = ImageFont.load_default(size=11)
    if captions is not None:
        text = [textwrap.wrap(caption, max(8, int(width / 5.6))) for caption in captions]
        lines = max(map(len, text))
    cell = (width + gap, height + gap + 13 * lines)
    sheet = Image.new("RGB", (columns * cell[0] + gap, -(-count // columns) * cell[1] + gap), BACKGROUND)
    paint = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + (i % columns) * cell[0], gap + (i // columns) * cell[1]
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(text[i] if text else ()):
            paint.text((x, y + height + 1 + 13 * n), line, fill=INK, font=font)
    return sheet
