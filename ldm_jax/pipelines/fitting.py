"""Pictures and masks cut to the sizes that networks take: their proportions are kept, and what is cut off is said.

without a size   the middle of the picture; height and width are the multiples next below those of the picture
with a size      the picture is scaled until it covers the size, and its middle is taken

diffusers scales each side for itself instead, which squeezes; where nothing has to be cut the two are the same.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.data import decode

Size = tuple[int, int]


def rows_of(images: Any, channels: int = 3) -> list:
    """One or several pictures (PIL images, arrays [H, W], [H, W, C] or [N, H, W, C]) as a list of them.

    PIL images in 8 bits, upright and on white, those of one channel as masks, as data/decode.py reads files. ValueError for paths.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        read = decode.rgb if channels == 3 else decode.mask
        return [Image.fromarray(read(image)) if isinstance(image, Image.Image) else image for image in images]
    if np.ndim(images) < 2:
        raise ValueError(f"images are {images!r:.80}; expected PIL images, or arrays [H, W, C] or [N, H, W, C]")
    images = np.asarray(images)
    one = images.ndim == 2 or (images.ndim == 3 and images.shape[-1] == channels)
    return [images] if one else list(images)


def size_of(image: Any) -> Size:
    """(H, W) of a picture."""
    return image.size[::-1] if isinstance(image, Image.Image) else tuple(np.shape(image)[:2])


def middle(image: Any, size: Size) -> Any:
    """The middle of a picture that is at least as large."""
    (top, left), (height, width) = ((full - new) // 2 for full, new in zip(size_of(image), size)), size
    if isinstance(image, Image.Image):
        return image.crop((left, top, left + width, top + height))
    return np.asarray(image)[top : top + height, left : left + width]


def covering(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """The picture scaled until it covers `size`, and the middle of that."""
    full = size_of(image)
    if full == size:
        return image
    scale = min(o / s for o, s in zip(full, size))
    # What is kept of each side, in pixels of the picture; a side that fits is kept whole, to the last bit.
    kept = [min(scale * s, o) for o, s in zip(full, size)]
    top, left = ((o - k) / 2 for o, k in zip(full, kept))
    return image.resize(size[::-1], resample, (left, top, left + kept[1], top + kept[0]))


def proportional(one: Size, other: Size) -> bool:
    """Whether two sizes have the same proportions, to a pixel of the smaller one."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(min(one), min(other))


def below(size: Size, step: int) -> Size:
    """The multiples of `step` next below height and width. ValueError where one would be 0."""
    if min(size) < step:
        raise ValueError(f"the picture is {size} pixels, expected at least {step}")
    return tuple(n // step * step for n in size)


def framed(rows: Sequence[Any], size: Size | None, step: int) -> tuple[list, Size]:
    """(rows of one size, it): without a size the middle of each, at most step - 1 smaller, with a warning that says so.

    With a size nothing is done here but to warn of rows that have other proportions: latents.pixels scales and cuts them.
    """
    met = sorted({size_of(row) for row in rows})
    if size is None:
        if len(met) > 1:
            raise ValueError(
                f"pictures of {' and '.join(map(_shown, met))} pixels, expected one size, or a size to draw"
            )
        size = below(met[0], step)
        if size != met[0]:
            warnings.warn(
                f"of the picture of {_shown(met[0])} pixels the middle {_shown(size)} is taken: sizes are multiples of {step}",
                stacklevel=3,
            )
        return [middle(row, size) for row in rows], size
    for other in met:
        if other[0] * size[1] != other[1] * size[0]:
            warnings.warn(
                f"the picture of {_shown(other)} pixels is scaled, and its middle cut to {_shown(size)}", stacklevel=3
            )
    return list(rows), size


def masked(masks: Sequence[Any], pictures: Sequence[Any], size: Size | None, step: int) -> list:
    """The masks cut as `framed` cuts their pictures. ValueError for a mask of other proportions than its picture's.

    A mask of another size than its picture's stands for all of it; as an array of floats it must have the picture's size.
    """
    fitted = []
    for i, mask in enumerate(masks):
        area, picture = size_of(mask), size_of(pictures[i % len(pictures)])
        if not proportional(area, picture):
            raise ValueError(
                f"the mask has {_shown(area)} pixels, its picture {_shown(picture)}; expected the same proportions"
            )
        if isinstance(mask, np.ndarray) and mask.dtype == np.uint8:
            mask = Image.fromarray(mask.squeeze(-1) if mask.ndim == 3 else mask)
        if isinstance(mask, Image.Image) and area != picture and size is None:
            mask = mask.convert("L").resize(picture[::-1], Image.Resampling.LANCZOS)
        fitted.append(middle(mask, below(picture, step)) if size is None and size_of(mask) == picture else mask)
    return fitted


def over(depth: np.ndarray, picture: Size, size: Size, scaled: bool) -> np.ndarray:
    """The part of depth maps f32[..., H', W'] that lies over what is kept of their picture; each map stands for all of it."""
    scale = min(o / s for o, s in zip(picture, size)) if scaled else 1
    places = []
    for n, o, s in zip(depth.shape[-2:], picture, size):
        kept = max(round(n * min(scale * s / o, 1)), 1)
        places.append(slice((n - kept) // 2, (n - kept) // 2 + kept))
    return depth[(..., *places)]


def _shown(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
