"""Every picture by one rule, whoever opens it: against Pillow's own orientation, compositing and conversions, and by arithmetic."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldm_jax.data import decode as decoding
from ldm_jax.data.decode import decode, decode_mask
from ldm_jax.pipelines.latents import pixels

GENERATOR = np.random.default_rng(0)
SMOOTH = Image.fromarray(GENERATOR.integers(0, 256, (6, 5, 3)).astype(np.uint8)).resize((40, 24))
RGBA = Image.fromarray(GENERATOR.integers(0, 256, (6, 5, 4)).astype(np.uint8))


def written(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(header: tuple[int, ...], rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG from (width, height, bits, colour type) and its raw rows, with chunks before the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(bits: int, values: np.ndarray, photometric: int = 1, kind: int = 1) -> bytes:
    """A TIFF of one row of grey levels."""
    rows = [(256, 4, values.size), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 134)]
    rows += [(277, 3, 1), (278, 4, 1), (279, 4, values.nbytes), (339, 3, kind)]
    table = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in rows)
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + table + struct.pack("<I", 0) + values.tobytes()


KINDS = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "MPO": {}}


@pytest.mark.parametrize("fast", [True, False], ids=["simplejpeg", "pillow"])
@pytest.mark.parametrize("kind", KINDS)
def test_orientation_is_that_of_pillow(kind, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    for orientation in range(10):  # 0 and 9 are none
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = written(SMOOTH, kind, exif=exif, **KINDS[kind])
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(decode(data, "x"), np.asarray(upright), f"{kind} {orientation}")
        np.testing.assert_array_equal(decode_mask(data, "x"), np.asarray(upright.convert("L")))
        np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data)))[0] * 255, np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_elsewhere_and_damaged():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="8"/></x:xmpmeta>'
    data = written(SMOOTH, "JPEG", quality=95, xmp=xmp)
    assert decode(data, "x").shape == (40, 24, 3)
    plain = written(SMOOTH, "JPEG", quality=95)
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"):
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
        np.testing.assert_array_equal(decode(data, "x"), decode(plain, "x"))


def test_simplejpeg_and_pillow_agree():
    pytest.importorskip("simplejpeg")
    image = SMOOTH.resize((50, 41), Image.Resampling.BICUBIC)
    for options in ({"quality": 75}, {"quality": 95, "subsampling": 0}, {"quality": 60, "progressive": True}):
        data = written(image, "JPEG", **options)
        assert (decode(data, "x") == np.asarray(Image.open(io.BytesIO(data)))).all()
    data = written(image.convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decode(data, "x"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    data = written(image.convert("L"), "JPEG")
    assert (decode(data, "x") == np.asarray(Image.open(io.BytesIO(data)))[..., None]).all()


def on_white(rgba: Image.Image) -> np.ndarray:
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


PALETTE = RGBA.convert("RGB").quantize(8)


@pytest.mark.parametrize(
    ("data", "transparent"),
    [
        (written(RGBA, "PNG"), None),
        (written(RGBA, "WEBP", lossless=True), None),
        (written(RGBA, "TIFF"), None),
        (written(RGBA.convert("LA"), "PNG"), None),
        (written(PALETTE, "PNG", transparency=bytes([0, 128, 255, 9])), None),
        (written(PALETTE, "PNG", transparency=3), None),
        (written(PALETTE, "GIF", transparency=3), None),
        # One grey, one colour: of 8 and of 16 bits, and of one bit.
        (png((2, 1, 8, 0), b"\0\x07\x08", (b"tRNS", b"\0\x07")), [True, False]),
        (png((2, 1, 8, 2), b"\0\1\2\3\1\2\4", (b"tRNS", b"\0\1\0\2\0\3")), [True, False]),
        (png((8, 1, 1, 0), b"\0\x0f", (b"tRNS", b"\0\0")), [True] * 4 + [False] * 4),
        (png((2, 1, 16, 0), b"\0\x01\x02\x01\x03", (b"tRNS", b"\1\2")), [True, False]),
        (png((2, 1, 16, 2), b"\0" + b"\1\2" * 3 + b"\3\2" * 3, (b"tRNS", b"\1\2" * 3)), [True, False]),
    ],
    ids="rgba webp tiff la bytes index gif grey colour bit deep deepcolour".split(),
)
def test_transparency_is_on_white_and_is_the_mask(data, transparent):
    out, levels = decode(data, "x"), decode_mask(data, "x")
    if transparent is None:
        rgba = Image.open(io.BytesIO(data)).convert("RGBA")
        np.testing.assert_array_equal(out, on_white(rgba))
        np.testing.assert_array_equal(levels, np.asarray(rgba)[..., 3])
    else:
        np.testing.assert_array_equal((out == 255).all(-1)[0][: len(transparent)] >= transparent, True)
        np.testing.assert_array_equal(levels[0] == 0, transparent)
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data)))[0], np.float32(out) / 255)
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data)), channels=1)[0, ..., 0], np.float32(levels) / 255)


def test_a_mask_without_anything_transparent_is_its_luminance():
    opaque = Image.merge("RGBA", (*RGBA.convert("RGB").split(), Image.new("L", RGBA.size, 255)))
    np.testing.assert_array_equal(
        decode_mask(written(opaque, "PNG"), "m"), np.asarray(RGBA.convert("RGB").convert("L"))
    )


U16 = np.array([[0, 1, 128, 129, 40000, 65535]], np.uint16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (written(Image.fromarray(U16), "PNG"), U16 / 257),
        (written(Image.fromarray(U16), "TIFF"), U16 / 257),
        (tiff(16, U16[0], photometric=0), 255 - U16 / 257),
        (tiff(32, np.array([0, 2**31, 2**32 - 1], np.uint32)), [[0, 127.51, 255]]),
        (b"P5 3 1 1000\n" + struct.pack(">HHH", 0, 250, 1000), [[0, 63.8, 255]]),
        (tiff(32, np.array([0, 0.5, 1], np.float32), kind=3), [[0, 127.5, 255]]),
        (written(Image.new("1", (3, 1), 1), "PNG"), [[255] * 3]),
    ],
    ids="png tiff whitefirst tiff32 pgm float bit".split(),
)
def test_deep_greys_keep_their_levels(data, expected):
    expected = np.floor(np.asarray(expected) + 0.5)
    np.testing.assert_array_equal(decode(data, "x"), np.repeat(expected[..., None], 3, -1))
    np.testing.assert_array_equal(decode_mask(data, "x"), expected)


def test_deep_greys_in_memory():
    for values in (U16, U16.astype(np.int32), U16.astype(np.float32) / 65535):
        np.testing.assert_array_equal(pixels(Image.fromarray(values), channels=1)[0, ..., 0] * 255, np.round(U16 / 257))
    big = Image.frombytes("I;16B", (6, 1), U16.astype(">u2").tobytes())
    np.testing.assert_array_equal(decoding.mask(big), np.round(U16 / 257))


def test_sixteen_bit_colour_keeps_its_upper_byte():
    data = png((1, 1, 16, 2), b"\0\x12\xff\x34\xff\x56\xff")
    np.testing.assert_array_equal(decode(data, "x"), [[[0x12, 0x34, 0x56]]])


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr", "HSV", "P", "1"])
def test_other_colours_are_those_of_pillow(mode):
    image = SMOOTH.convert(mode) if mode != "LAB" else Image.frombytes(mode, (4, 2), bytes(range(24)))
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decoding.rgb(image), expected)
    if mode not in ("YCbCr", "HSV"):
        np.testing.assert_array_equal(decode(written(image, "TIFF"), "x"), expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    data = written(frames[0], kind, save_all=True, append_images=frames[1:])
    assert (decode(data, "x") == 255).all()


def jpeg_of_size(height: int, width: int) -> bytes:
    """A JPEG whose header lies about its size."""
    data = written(SMOOTH, "JPEG")
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a picture", "not a picture of a kind"),
        (b"", "not a picture of a kind"),
        (written(SMOOTH, "EPS"), "not a picture of a kind"),
        (written(SMOOTH, "PNG")[:200], ""),
        (written(SMOOTH, "JPEG")[:400], "[Tt]runcated"),
        (jpeg_of_size(65000, 65000), "decompression bomb"),
        (jpeg_of_size(0, 40), ""),
        (png((60000, 60000, 8, 0), b"\0"), "decompression bomb"),
        (png((0, 5, 8, 0), b"\0"), ""),
        (tiff(32, np.array([0, 7], np.int32), kind=2), "signed"),
        (tiff(32, np.array([0, 1.5], np.float32), kind=3), "floats run from 0 to 1.5"),
        (tiff(32, np.array([0, np.nan], np.float32), kind=3), "floats run"),
    ],
    ids="text empty eps cutpng cutjpeg bombjpeg zerojpeg bombpng zeropng signed float nan".split(),
)
def test_refusals_are_one_line(data, message):
    for read in (decode, decode_mask):
        with pytest.raises(ValueError, match=rf"^set/a\.x: broken image \(.*{message}") as caught:
            read(data, "set/a.x")
        assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_levels_in_memory_that_have_no_range():
    with pytest.raises(ValueError, match="levels run from -1 to 70000; expected 0 to 65535"):
        pixels(Image.fromarray(np.array([[-1, 70000]], np.int32)), channels=1)


@pytest.mark.filterwarnings("ignore")
def test_no_damage_raises_anything_else():
    """Bytes turned one by one: each file is read or refused in one line."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, step in itertools.product(("JPEG", "PNG", "GIF", "TIFF", "BMP"), (7, 11)):
        data = written(SMOOTH, kind, exif=exif)
        for at in range(0, min(len(data), 900), step):
            try:
                decode(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :], "x")
            except ValueError as error:
                assert str(error).startswith("x: broken image")
