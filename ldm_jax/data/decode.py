"""Bytes of an image file -> u8[H, W, 3]; JPEG by simplejpeg where it is installed: 2-6 times faster, same pixels."""

import io
import logging

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
    logging.getLogger(__name__).info("simplejpeg is not installed: JPEG files are decoded by Pillow, 2-6 times slower")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def decode(data: bytes, where: str) -> np.ndarray:
    """The pixels of an image file, u8[H, W, 3]; transparency is composited on white, greyscale repeated.

    Raises ValueError that names `where` if the bytes are not a whole image of at most 8 bits a channel.
    """
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # CMYK files, which Pillow reads, and broken ones, which it names
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {image.mode}; expected at most 8 bits a channel")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: broken image ({error})") from error
