"""From an image of any size to a square of `resolution` pixels; random horizontal flip.

'adm': the crop of Dhariwal & Nichol, 2021 (guided-diffusion): halve with a box filter while the short side is at least
twice the resolution, then reduce the short side to it (bicubic) and cut out the centre. 'lanczos': cut out the largest centred
square and resize it with Lanczos. 'none': the image must have the resolution already.
"""

import numpy as np
from PIL import Image

LONG = 8  # times as long as wide: of a longer picture the crop keeps a small part


def _adm(image: Image.Image, resolution: int) -> Image.Image:
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    if scale > 1 and max(image.size) > LONG * min(image.size):
        return _middle(image, resolution, scale)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _middle(image: Image.Image, resolution: int, scale: float) -> Image.Image:
    """The square of 'adm' of a long picture, computed alone: enlarged whole, 20000 x 2 pixels take two gigabytes."""
    pixels = np.asarray(image)
    if image.width > image.height:  # Pillow enlarges along the rows first
        length = round(image.width * scale)
        part = _enlarged(pixels.swapaxes(0, 1), length, (length - resolution) // 2, resolution).swapaxes(0, 1)
        part = Image.fromarray(np.ascontiguousarray(part))
        return part.resize((resolution, resolution), Image.Resampling.BICUBIC)
    length = round(image.height * scale)
    first = (length - resolution) // 2
    # The rows from which the middle is interpolated: two more on each side than it covers, and one for rounding.
    low, high = (
        max(int(place * image.height / length) + more, 0) for place, more in ((first, -3), (first + resolution, 4))
    )
    rows = image.crop((0, low, image.width, min(high, image.height)))
    rows = rows.resize((resolution, rows.height), Image.Resampling.BICUBIC)
    return Image.fromarray(_enlarged(np.asarray(rows), length, first, resolution, low, image.height))


def _enlarged(
    pixels: np.ndarray, length: int, first: int, count: int, offset: int = 0, whole: int | None = None
) -> np.ndarray:
    """Rows first .. first + count of u8[H, W, 3] enlarged bicubically to `length` rows, equal to Pillow's Resample.c to the bit.

    `pixels` are rows offset .. offset + H of a picture of `whole` rows. Four neighbours, weights in 22-bit fixed point.
    """
    whole = whole or len(pixels)
    centre = (np.arange(first, first + count) + 0.5) * (whole / length)
    low = np.maximum((centre - 1.5).astype(int), 0)
    high = np.minimum((centre + 2.5).astype(int), whole)
    row = low[:, None] + np.arange(5)
    x = np.abs(row - centre[:, None] + 0.5)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = np.where(x < 1, near, np.where(x < 2, far, 0)) * (row < high[:, None])
    weight = weight / np.cumsum(weight, 1)[:, -1:]  # summed in order
    fixed = np.trunc(weight * (1 << 22) + np.copysign(0.5, weight)).astype(np.int64)
    taken = pixels[np.clip(row - offset, 0, len(pixels) - 1)].astype(np.int64)
    out = (np.einsum("rk,rkwc->rwc", fixed, taken) + (1 << 21)) >> 22
    return np.clip(out, 0, 255).astype(np.uint8)


def _lanczos(image: Image.Image, resolution: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # the filter of resize(box=...) would read beyond the box
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)


CROPS = {"adm": _adm, "lanczos": _lanczos, "none": None}


def check_crop(crop: str) -> str:
    """Raise ValueError if `crop` is not one of CROPS; else return it."""
    if crop not in CROPS:
        raise ValueError(f"crop '{crop}' is unknown; expected one of {', '.join(CROPS)}")
    return crop


def crop_image(image: np.ndarray, resolution: int, crop: str = "adm", where: str = "image") -> np.ndarray:
    """u8[H, W, 3] -> u8[resolution, resolution, 3]. Raises ValueError if `crop` is 'none' and the size is another."""
    check_crop(crop)
    if image.shape[:2] == (resolution, resolution):
        return image
    if crop == "none":
        size = f"{image.shape[0]}x{image.shape[1]}"
        raise ValueError(f"{where}: {size} pixels with crop='none'; expected {resolution}x{resolution}")
    return np.asarray(CROPS[crop](Image.fromarray(image), resolution))


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """u8[..., W, C], mirrored left to right with probability 1/2."""
    return image[..., ::-1, :] if rng.random() < 0.5 else image
