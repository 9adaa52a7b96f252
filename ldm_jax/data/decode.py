"""One rule by which every picture is read: training data, `--init-image`, `--mask`, pictures that Python passes to a pipeline.

- The first frame of an animation, or the first page, is read.
- Orientation (EXIF, else XMP): the picture is turned upright, in all eight cases; a tag that cannot be read is ignored.
- Transparency is composited on white; the transparency of a mask is the mask (`mask`).
- 8 bits a channel: grey, palette, CMYK, YCbCr and Lab become RGB as Pillow converts them; colour profiles are not applied.
- 16-bit grey: v / 257, rounded; of 16-bit colours Pillow keeps the upper byte. A TIFF states its range: v / (2^bits - 1), white first
  or last.
- Grey in 32-bit integers: unsigned TIFF likewise; other formats hold 16-bit levels, as PGM does. Other levels, and signed TIFF, are
  refused.
- Grey in floats: 255 v, rounded; values outside [0, 1] are refused.
- More than 2 PIL.Image.MAX_IMAGE_PIXELS (179 million) pixels are refused.

JPEG is decoded by simplejpeg where it is installed: 2-6 times faster, same pixels.
"""

import io
import logging
import struct
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
    logging.getLogger(__name__).info("simplejpeg is not installed: JPEG files are decoded by Pillow, 2-6 times slower")

# What Pillow opens by itself, without documents, films, data of instruments, and formats that another program has to draw.
NO_PICTURES = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "PCD", "WMF"}
Image.init()
EXTENSIONS = tuple(
    sorted(e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_PICTURES)
)

# TIFF's tags of the levels' size, of whether white comes first, and of their kind (1: unsigned).
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
# JPEG: how a segment begins, how a frame's (bits, height, width, channels), and the kinds of segments that are looked at.
SEGMENT, FRAME = struct.Struct(">BBH").unpack_from, struct.Struct(">BHHB").unpack_from
SCAN, APP1 = 0xDA, 0xE1
READ = frozenset({SCAN, APP1, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})


def decode(data: bytes, where: str) -> np.ndarray:
    """The pixels of an image file, u8[H, W, 3], by the rule above. Raises ValueError that names `where` if they cannot be read."""
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        size, tagged = _jpeg_header(data)
        if 0 < size <= 2 * (Image.MAX_IMAGE_PIXELS or size):
            try:
                pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
            except ValueError:
                pass  # a broken file, which Pillow names
            else:
                return _read(data, where, lambda image: _upright(pixels, _orientation(image))) if tagged else pixels
    return _read(data, where, rgb)


def decode_mask(data: bytes, where: str) -> np.ndarray:
    """The levels of an image file that is a mask, u8[H, W], by `mask`. Raises as `decode`."""
    return _read(data, where, mask)


def rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an open picture, u8[H, W, 3], by the rule above. Raises ValueError for levels that have no stated range."""
    image.load()
    plain = _plain(image)
    if plain.mode == "RGBA":
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain).convert("RGB")
    return _upright(np.asarray(plain), _orientation(image))


def mask(image: Image.Image) -> np.ndarray:
    """The levels of a picture that is a mask, u8[H, W]: its luminance, or, where anything is transparent, its alpha channel.

    A mask that is painted on an empty layer therefore means what was painted, in any colour, as in AUTOMATIC1111's interface. Raises as
    `rgb`.
    """
    image.load()
    plain = _plain(image)
    if plain.mode == "RGBA" and plain.getextrema()[3][0] < 255:
        levels = plain.getchannel("A")
    else:
        levels = plain.convert("L")
    return _upright(np.asarray(levels), _orientation(image))


def _read(data: bytes, where: str, rule: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    # The content counts, not the name: for an EPS file Pillow would let Ghostscript execute the program in it.
    kinds = [kind for kind in Image.ID if kind not in NO_PICTURES]
    try:
        with Image.open(io.BytesIO(data), formats=kinds) as image:
            if 0 in image.size:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            return rule(image)
    except UnidentifiedImageError:
        raise ValueError(f"{where}: broken image (not a picture of a kind that can be read)") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise all kinds of errors for damaged files
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{where}: broken image ({lines[0]})") from error


def _plain(image: Image.Image) -> Image.Image:
    """A loaded picture in 8 bits: of mode RGBA if any of it may be transparent, else RGB; not yet turned."""
    if not image.mode.startswith(("I", "F")):
        if not image.has_transparency_data:
            return image.convert("RGB")
        colour = image.info.get("transparency")
        if isinstance(colour, tuple) and max(colour) > 255:  # of a 16-bit PNG, of which the pixels are the upper bytes
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in colour)
        return image.convert("RGBA")
    grey = Image.fromarray(_levels(image)).convert("RGB")
    if "transparency" in image.info:  # one level of a 16-bit PNG
        opaque = np.asarray(image) != image.info["transparency"]
        grey.putalpha(Image.fromarray(np.uint8(255) * opaque))
    return grey


def _levels(image: Image.Image) -> np.ndarray:
    """u8[H, W] of a grey picture in more than 8 bits or in floats."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if values.dtype.kind == "f":
        white, low, high = 1.0, values.min(), values.max()
        if not (low >= 0 and high <= 1):  # NaN is refused as well
            raise ValueError(f"its floats run from {low:g} to {high:g}; expected [0, 1]")
        levels = np.floor(values * 255.0 + 0.5)
    else:
        if tags.get(SAMPLE_FORMAT, (1,))[0] == 2:
            raise ValueError("its levels are signed, so that nothing says which is white; expected unsigned ones")
        white = (1 << tags[BITS][0]) - 1 if BITS in tags else 65535
        values = values.view(np.uint32) if BITS in tags and values.dtype == np.int32 else values
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > white:
            raise ValueError(f"its levels run from {low} to {high}; expected 0 to {white}")
        levels = (values.astype(np.uint64) * 510 + white) // (2 * white)
    levels = levels.astype(np.uint8)
    return 255 - levels if tags.get(PHOTOMETRIC) == 0 else levels


def _orientation(image: Image.Image) -> int:
    """The orientation, 1 to 8 as EXIF counts them; 1, upright, where there is no valid tag."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata of an intact picture
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, ...] turned and mirrored as the orientation says (what PIL.ImageOps.exif_transpose does), contiguous."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _jpeg_header(data: bytes) -> tuple[int, bool]:
    """(pixels, whether EXIF or XMP may turn them) of a JPEG file.

    (0, True) for a file that is left to Pillow: CMYK, which simplejpeg rounds otherwise, and segments that cannot be parsed.
    """
    i, size, tagged = 2, 0, False
    try:
        while True:
            first, kind, length = SEGMENT(data, i)
            if first != 0xFF or kind == 0xFF:
                break
            if kind in READ:
                if kind == SCAN:
                    return size, tagged
                if kind == APP1:
                    tagged = True
                else:
                    _, height, width, channels = FRAME(data, i + 4)
                    if channels == 4:
                        break
                    size = height * width
            i += 2 + length
    except struct.error:
        pass
    return 0, True
