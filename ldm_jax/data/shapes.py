"""Scenes of one to three coloured shapes with exact captions; evaluation/shapes.py reads pictures of them.

A scene is a function of (seed, split, index) alone (one Philox stream a scene), rendered at any resolution from 32
pixels. Lengths are whole numbers of 1/64 of the picture's side, so that at 32 pixels shapes lie on half pixels.
'train', 'val' and 'test' have the same distribution and disjoint streams. The attribute combinations in HELDOUT_PAIRS and
HELDOUT_RELATIONS never occur in them; every scene of 'heldout' has at least one. What a model draws for the captions of 'heldout'
shows whether it composes attributes or recalls pictures.

Captions: `a SIZE COLOUR KIND [RELATION a SIZE COLOUR KIND [, which is RELATION a SIZE COLOUR KIND]]`.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

UNITS = 64
KINDS = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (219, 48, 44),
    "yellow": (244, 190, 24),
    "green": (40, 158, 72),
    "cyan": (38, 190, 214),
    "blue": (40, 80, 214),
    "purple": (152, 62, 190),
}
SIZES = {"small": (15, 16, 17), "large": (24, 25, 26)}
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(INVERSE)
HELDOUT_PAIRS = frozenset({("circle", "green"), ("square", "yellow"), ("triangle", "purple"), ("cross", "red")})
HELDOUT_RELATIONS = frozenset({("triangle", "above", "circle"), ("cross", "left of", "square")})
SPLITS = ("train", "val", "test", "heldout")
GAP, BORDER, LEAD = (
    4,
    2,
    8,
)  # distance between shapes, to the edge, and by which the axis of a relation is the longer one
CAPTION_BYTES = 100  # no caption is longer


class Shape(NamedTuple):
    """A shape: centre (x, y) and diameter in 1/64 of the picture's side, y downwards; rgb is its exact colour."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    diameter: float
    rgb: tuple[int, int, int]


class Scene(NamedTuple):
    """One to three shapes on a background, RGB of 0..255: what a picture shows."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]


class Description(NamedTuple):
    """What a caption asks for: (size, colour, kind) of each shape, and the relation of each to the next."""

    shapes: tuple[tuple[str, str, str], ...]
    relations: tuple[str, ...]


def relation(a: Shape, b: Shape) -> str:
    """Where `a` lies as seen from `b`: along the axis on which they are further apart."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dy) >= abs(dx):
        return "above" if dy < 0 else "below"
    return "left of" if dx < 0 else "right of"


def is_heldout(shapes: tuple[Shape, ...]) -> bool:
    """Whether a shape, or two of them, form a combination that training never sees."""
    if any((s.kind, s.colour) in HELDOUT_PAIRS for s in shapes):
        return True
    pairs = itertools.permutations(shapes, 2)
    return any((a.kind, relation(a, b), b.kind) in HELDOUT_RELATIONS for a, b in pairs)


def _place(diameters: list[int], draw: Callable[[int, int], int]) -> list[tuple[int, int]] | None:
    """Centres such that each shape has a clear relation to the next and none overlap; None if there is no room for them."""
    low = [d // 2 + 1 + BORDER for d in diameters]
    centres = [(draw(low[0], UNITS - low[0]), draw(low[0], UNITS - low[0]))]
    for n in range(1, len(diameters)):
        need = max((diameters[n - 1] + diameters[n] + 1) // 2 + GAP, LEAD)
        lowest, highest = low[n], UNITS - low[n]
        ways = [(axis, lowest, centres[-1][axis] - need) for axis in (0, 1) if centres[-1][axis] - need >= lowest]
        ways += [(axis, centres[-1][axis] + need, highest) for axis in (0, 1) if centres[-1][axis] + need <= highest]
        if not ways:
            return None
        axis, first, last = ways[draw(0, len(ways) - 1)]
        along = draw(first, last)
        reach, across = abs(along - centres[-1][axis]) - LEAD, centres[-1][1 - axis]
        across = draw(max(lowest, across - reach), min(highest, across + reach))
        x, y = (along, across) if axis == 0 else (across, along)
        for (u, v), d in zip(centres, diameters):
            if max(abs(u - x), abs(v - y)) < (d + diameters[n]) / 2 + GAP:
                return None
        centres.append((x, y))
    return centres


def scene(index: int, *, split: str = "train", seed: int = 0, objects: tuple[int, int] = (1, 3)) -> Scene:
    """The scene with number `index` of a split: `objects` = least and greatest number of shapes."""
    key = np.array([seed * len(SPLITS) + SPLITS.index(split), index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    uniforms: list[float] = []

    def draw(first: int, last: int) -> int:
        if not uniforms:
            uniforms.extend(rng.random(48).tolist())
        return first + int(uniforms.pop() * (last - first + 1))

    names, sizes = tuple(COLOURS), tuple(SIZES)
    count = draw(*objects)
    grey = draw(228, 250)
    background = (grey + draw(-4, 4), grey + draw(-4, 4), grey + draw(-4, 4))
    while True:
        attributes = []
        for _ in range(count):
            size = sizes[draw(0, 1)]
            attributes.append(
                (KINDS[draw(0, len(KINDS) - 1)], names[draw(0, len(names) - 1)], size, SIZES[size][draw(0, 2)])
            )
        centres = _place([a[3] for a in attributes], draw)
        if centres is None:
            continue
        shapes = tuple(
            Shape(kind, colour, size, x, y, d, tuple(c + draw(-8, 8) for c in COLOURS[colour]))
            for (kind, colour, size, d), (x, y) in zip(attributes, centres)
        )
        if is_heldout(shapes) == (split == "heldout"):
            return Scene(shapes, background)


def caption(scene: Scene) -> str:
    """The scene in words: `parse(caption(scene))` gives its exact attributes and relations."""
    words = [f"a {s.size} {s.colour} {s.kind}" for s in scene.shapes]
    text = words[0]
    for n in range(1, len(words)):
        link = " " if n == 1 else ", which is "
        text += f"{link}{relation(scene.shapes[n - 1], scene.shapes[n])} {words[n]}"
    return text


_NOUN = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
_LINK = rf" ({'|'.join(RELATIONS)}) "
_CAPTION = re.compile(rf"{_NOUN}(?:{_LINK}{_NOUN}(?:, which is{_LINK}{_NOUN})?)?")


def parse(text: str) -> Description:
    """What a caption asks for. Raises ValueError if it is not a caption of this module's grammar."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"not a caption of shapes: '{text}'; expected e.g. 'a small red circle above a large blue square'"
        )
    words = match.groups()
    shapes = [words[0:3], *(words[i + 1 : i + 4] for i in (3, 7) if words[i])]
    return Description(tuple(shapes), tuple(words[i] for i in (3, 7) if words[i]))


def _outline(kind: str, x: float, y: float, d: float) -> list[tuple[float, float]]:
    """Corners of a shape of diameter `d`; of a circle, which Pillow draws, the bounding box."""
    r = d / 2
    if kind == "circle":
        return [(x - r, y - r), (x + r, y + r)]
    if kind == "square":
        r *= 0.92
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if kind == "triangle":
        return [(x - r, y + 0.9 * r), (x, y - 0.9 * r), (x + r, y + 0.9 * r)]
    a = 0.36 * r
    quarter = [
        (-a, -r),
        (a, -r),
        (a, -a),
        (r, -a),
        (r, a),
        (a, a),
        (a, r),
        (-a, r),
        (-a, a),
        (-r, a),
        (-r, -a),
        (-a, -a),
    ]
    return [(x + u, y + v) for u, v in quarter]


@functools.lru_cache(maxsize=8192)
def _sprite(kind: str, diameter: float, fx: float, fy: float) -> np.ndarray:
    """Coverage f32[S, S, 1] of a shape of `diameter` pixels centred at (S // 2 + fx, S // 2 + fy), 0 <= f < 1."""
    scale = 16
    side = 2 * int(diameter / 2 + 2)
    image = Image.new("L", (side * scale, side * scale))
    x, y = side // 2 + fx, side // 2 + fy
    # Pillow counts pixel centres, truncates coordinates to integers, and paints the pixels at both ends.
    corners = [
        (round(u * scale - 0.5 - 0.5 * np.sign(u - x)), round(v * scale - 0.5 - 0.5 * np.sign(v - y)))
        for u, v in _outline(kind, x, y, diameter)
    ]
    paint = ImageDraw.Draw(image)
    if kind == "circle":
        paint.ellipse(corners, fill=255)
    else:
        paint.polygon(corners, fill=255)
    return np.asarray(image.reduce(scale), np.float32)[..., None] / 255


def render(scene: Scene, resolution: int) -> np.ndarray:
    """The picture u8[R, R, 3], anti-aliased (16 x 16 samples a pixel). Raises ValueError below 32 pixels."""
    if resolution < 32:
        raise ValueError(f"resolution {resolution} is too small for shapes; expected at least 32")
    image = np.empty((resolution, resolution, 3), np.uint8)
    image[:] = scene.background
    scale = resolution / UNITS
    for s in scene.shapes:
        x, y = s.x * scale, s.y * scale
        cover = _sprite(s.kind, s.diameter * scale, x % 1, y % 1)
        half = len(cover) // 2
        left, top = int(x) - half, int(y) - half
        cover = cover[max(-top, 0) : resolution - top, max(-left, 0) : resolution - left]
        patch = image[max(top, 0) : top + 2 * half, max(left, 0) : left + 2 * half]
        patch[:] = patch + (np.asarray(s.rgb, np.float32) - patch) * cover + 0.5
    return image


# The source


class Shapes:
    """`self[i] -> {'image': u8[R, R, 3], 'label': index of the first shape's kind, 'text': caption}`."""

    has_text = True
    may_flip = False  # a mirrored picture would no longer show what its caption says
    num_classes = len(KINDS)
    class_names = KINDS

    def __init__(self, split: str, size: int, resolution: int, objects: tuple[int, int], seed: int):
        self.split, self.size, self.resolution, self.objects, self.seed = split, size, resolution, objects, seed
        self.name = f"shapes/{split}"

    def where(self, i: int) -> str:
        return f"{self.name}[{i}]"

    def scene(self, i: int) -> Scene:
        return scene(i, split=self.split, seed=self.seed, objects=self.objects)

    def fingerprint(self) -> str:
        """A sha256 that changes when the arguments change, or the pictures that this code draws for them."""
        digest = hashlib.sha256(repr((self.name, self.size, self.resolution, self.objects, self.seed)).encode())
        for i in range(min(16, self.size)):
            digest.update(self[i]["image"].tobytes() + self[i]["text"].encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        what = self.scene(int(i))
        label = np.int32(KINDS.index(what.shapes[0].kind))
        return {"image": render(what, self.resolution), "label": label, "text": caption(what)}


def shapes(
    split: str = "train",
    *,
    size: int = 100_000,
    resolution: int = 32,
    objects: tuple[int, int] = (1, 3),
    seed: int = 0,
) -> Shapes:
    """The embedded data: `size` scenes of a split, with captions.

    Args:
        split: 'train', 'val', 'test', or 'heldout' (the combinations that the others never show).
        size: number of scenes; scene i is the same for any size.
        resolution: pixels, at least 32.
        objects: least and greatest number of shapes, between 1 and 3.
        seed: another seed is another data set of the same distribution.

    Raises ValueError for a value out of range.
    """
    least, greatest = objects
    if split not in SPLITS:
        raise ValueError(f"shapes: no split '{split}'; expected one of {', '.join(SPLITS)}")
    if not 1 <= least <= greatest <= 3:
        raise ValueError(f"shapes: objects={tuple(objects)}; expected 1 <= least <= greatest <= 3")
    if size < 1 or resolution < 32 or not 0 <= seed < 2**60:
        raise ValueError(
            f"shapes: size={size}, resolution={resolution}, seed={seed}; expected at least 1, at least 32, 0..2^60"
        )
    return Shapes(split, size, resolution, (least, greatest), seed)
