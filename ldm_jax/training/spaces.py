"""The space of the data itself, before any first stage: what a batch holds, of any rank.

    image  u8[B, H, W, 3]        video  u8[B, T, H, W, 3]        any other name, such as signal  f32[B, ..., C]

config.input.entry names the entry, config.input.shape says the shape of one item, (resolution, resolution, 3) where it is left out.
"""

from ldm_jax.sampling.model import Space, as_it_is

# Entries of bytes, which are shown as pictures are; the numbers of any other are taken and written as they are.
PICTURES = ("image", "video")


def of_data(entry: str, shape: tuple[int, ...]) -> Space:
    """The space of items of this shape, channels last, in the entry of that name."""
    space = Space(tuple(shape), entry=entry)
    return space if entry in PICTURES else space._replace(show=as_it_is, bounded=False)


def images(side: int) -> Space:
    """Images of so many pixels a side."""
    return of_data("image", (side, side, 3))
