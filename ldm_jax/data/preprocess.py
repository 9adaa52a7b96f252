"""From an image of any size to a square of `resolution` pixels; random horizontal flip.

'adm': the crop of Dhariwal & Nichol, 2021 (guided-diffusion): halve with a box filter while the short side is at least
twice the resolution, reduce the short side to it (bicubic), cut out the centre. 'lanczos': cut out the largest centred
square, resize it with Lanczos. 'none': the image must have the resolution already.
"""

import numpy as np
from PIL import Image


def _adm(image: Image.Image, resolution: int) -> Image.Image:
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _lanczos(image: Image.Image, resolution: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # not resize(box=...), whose filter sees beyond the box
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)


CROPS = {"adm": _adm, "lanczos": _lanczos, "none": None}


def check_crop(crop: str) -> str:
    """`crop` itself; ValueError if it is not one of CROPS."""
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
    """Mirrors u8[..., W, C] left to right with probability 1/2."""
    return image[..., ::-1, :] if rng.random() < 0.5 else image
