"""The metric shapes: what a picture of coloured shapes shows, and whether that is what its caption asks for.

The scenes and their captions are those of data/shapes.py. The reader needs no training: shapes are regions whose colour differs from
the background's, and their kind and size are those of the nearest rendering.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm_jax.data.shapes import COLOURS, KINDS, SIZES, UNITS, Description, Scene, Shape, parse, relation, render
from ldm_jax.evaluation.metrics import GENERATED, PROMPTS, Case, Figure, Metric

SCORES = ("kind", "colour", "both", "size", "count", "relation", "all")

READ_SIDE = 128  # every picture is read at this size
MIN_AREA = 0.008  # of the picture; the smallest shape, a small cross, covers 0.03
BLURS = (0.0, 0.8, 1.2)  # pixels of a 32-pixel picture
FORM = 24  # side of the normalised form that tells the kinds apart


def _coverage(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """How far each pixel is from the background towards a palette colour, f32[H, W] in [0, 1]."""
    palette = np.asarray(list(COLOURS.values()), np.float32) - background
    length = np.linalg.norm(palette, axis=-1)
    along = (image - background).astype(np.float32) @ (palette / length[:, None]).T
    best = along.argmax(-1)  # the ray that passes nearest
    return np.clip(along.max(-1) / length[best], 0, 1)


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Opponent coordinates f32[..., 2]: their angle is the hue, their length the chroma."""
    r, g, b = np.moveaxis(np.asarray(rgb, np.float32), -1, 0)
    return np.stack([r - (g + b) / 2, np.sqrt(3) / 2 * (g - b)], -1)


def _nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """Index of the palette colour of nearest hue, i64[...]."""
    palette = _hue(list(COLOURS.values()))
    return (_hue(rgb) @ (palette / np.linalg.norm(palette, axis=-1, keepdims=True)).T).argmax(-1)


def _form(cover: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The coverage inside its bounding box, resized to f32[FORM, FORM]; and the box (left, top, right, bottom)."""
    rows, columns = np.flatnonzero((cover > 0.5).any(1)), np.flatnonzero((cover > 0.5).any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    form = Image.fromarray(cover).resize((FORM, FORM), Image.Resampling.BOX, box=box)
    return np.asarray(form), tuple(float(v) for v in box)


class Template(NamedTuple):
    """How a shape of one kind and size looks to the reader: its `form` f32[FORM, FORM] and `side` (units) after a blur."""

    kind: str
    size: str
    blur: float
    form: np.ndarray
    side: float


@functools.cache
def _templates() -> tuple[Template, ...]:
    """What the reader sees of each kind and diameter in a rendering of 32 pixels, sharp and blurred."""
    from scipy import ndimage

    templates = []
    background = np.full(3, 240, np.float32)
    for blur, kind, size in itertools.product(BLURS, KINDS, SIZES):
        for d in SIZES[size]:
            shape = Shape(kind, "blue", size, 32, 32, d, COLOURS["blue"])
            picture = ndimage.gaussian_filter(render(Scene((shape,), (240, 240, 240)), 32), (blur, blur, 0))
            cover = _coverage(_smooth(picture), background)
            level = _level(cover)
            form, box = _form(np.minimum(cover * (0.5 / level), 1))
            templates.append(Template(kind, size, blur, form, _side(box)))
    return tuple(templates)


def _side(box: tuple[float, float, float, float]) -> float:
    return max(box[2] - box[0], box[3] - box[1]) * UNITS / READ_SIDE


def _level(cover: np.ndarray) -> float:
    """Half of the full colour in this picture, which may be paler than the palette's."""
    strong = cover[cover > 0.25]
    return 0.5 * float(np.quantile(strong, 0.8)) if len(strong) else 0.5


def _smooth(image: np.ndarray) -> np.ndarray:
    """The picture at READ_SIDE, f32[READ_SIDE, READ_SIDE, 3], with pixel noise blurred away."""
    from scipy import ndimage

    picture = Image.fromarray(image).resize((READ_SIDE, READ_SIDE), Image.Resampling.BICUBIC)
    return ndimage.gaussian_filter(np.asarray(picture, np.float32), (1.5, 1.5, 0))


def _components(mask: np.ndarray) -> list[np.ndarray]:
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    parts = (labels == n for n in range(1, count + 1))
    return [p for p in parts if p.sum() >= MIN_AREA * mask.size]


def read(image: np.ndarray) -> Scene:
    """The scene in a picture u8[R, R, 3] of any resolution, which may be imperfect, as generated pictures are.

    Shapes are connected regions whose colour differs from the background's; touching shapes are separated by hue. The colour is the
    palette's of nearest hue, kind and size are those of the nearest rendering, sharp or blurred. Shapes come largest first; a region
    smaller than about a quarter of the smallest shape is left out.
    """
    from scipy import ndimage

    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image {image.dtype}{list(image.shape)}: expected uint8 [R, R, 3]")
    picture = _smooth(image)
    rim = np.concatenate([e.reshape(-1, 3) for e in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:])])
    background = np.median(rim, axis=0)
    cover = _coverage(picture, background)
    level = _level(cover)
    nearest = _nearest_colour(picture)
    parts = []
    for part in _components(cover > level):
        share = np.bincount(nearest[part], minlength=len(COLOURS)) / part.sum()
        by_hue = [p for c in np.flatnonzero(share > 0.25) for p in _components(part & (nearest == c))]
        parts += by_hue if len(by_hue) > 1 else [part]
    templates = _templates()
    forms = np.stack([t.form for t in templates])
    shapes = []
    for part in sorted(parts, key=lambda p: -p.sum()):
        around = ndimage.binary_dilation(part, iterations=4)
        form, box = _form(np.where(around, np.minimum(cover * (0.5 / level), 1), 0))
        best = templates[np.square(forms - form).mean((-1, -2)).argmin()]
        side = _side(box)
        alike = [t for t in templates if (t.kind, t.blur) == (best.kind, best.blur)]
        size = min(alike, key=lambda t: abs(t.side - side)).size
        core = part & (cover >= np.quantile(cover[part], 0.5))
        rgb = np.median(picture[core], axis=0)
        colour = tuple(COLOURS)[_nearest_colour(rgb)]
        x, y = ((box[i] + box[i + 2]) / 2 * UNITS / READ_SIDE for i in (0, 1))
        shapes.append(Shape(best.kind, colour, size, x, y, side, tuple(int(v) for v in rgb)))
    return Scene(tuple(shapes), tuple(int(v) for v in background))


def score(images: np.ndarray, captions: list[str]) -> dict[str, float | None]:
    """How well pictures u8[N, R, R, 3] show what their captions ask for, as fractions of the N pictures.

    The n shapes that a caption asks for are matched with the n largest shapes in the picture, in the order that makes most attributes
    right. A picture is right in an attribute if all n shapes are. 'count': the picture has exactly n shapes. 'relation': all relations
    hold, over the pictures whose caption has one (None if no caption has). 'all': all of these.

    Returns {'kind', 'colour', 'both' (kind and colour), 'size', 'count', 'relation', 'all'}.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: expected equally many")
    rows = [_compare(read(image), parse(text)) for image, text in zip(images, captions)]
    result = {}
    for name in SCORES:
        values = [r[name] for r in rows if r[name] is not None]
        result[name] = float(np.mean(values)) if values else None
    return result


def _compare(seen: Scene, asked: Description) -> dict[str, bool | None]:
    n = len(asked.shapes)
    best = None
    for chosen in itertools.permutations(seen.shapes[:n]) if len(seen.shapes) >= n else ():
        kind = [s.kind == k for s, (_, _, k) in zip(chosen, asked.shapes)]
        colour = [s.colour == c for s, (_, c, _) in zip(chosen, asked.shapes)]
        size = [s.size == z for s, (z, _, _) in zip(chosen, asked.shapes)]
        holds = [relation(a, b) == r for a, b, r in zip(chosen, chosen[1:], asked.relations)]
        right = sum(kind) + sum(colour) + sum(size) + sum(holds)
        if best is None or right > best[0]:
            best = right, all(kind), all(colour), all(size), all(holds)
    _, kind, colour, size, holds = best or (0, False, False, False, False)
    count = len(seen.shapes) == n
    return {
        "kind": kind,
        "colour": colour,
        "both": kind and colour,
        "size": size,
        "count": count,
        "relation": holds if asked.relations else None,
        "all": kind and colour and size and count and holds,
    }


def check(case: Case) -> None:
    """Raise ValueError for a prompt that is no caption of shapes."""
    for prompt in case.images.prompts:
        parse(prompt)


def each(case: Case, batch: dict[str, np.ndarray], which: slice) -> dict[str, Any]:
    pairs = zip(batch["image"], case.images.prompts[which])
    scores = [score(image[None], [prompt]) for image, prompt in pairs]
    return {f"shapes_{name}": [np.nan if s[name] is None else s[name] for s in scores] for name in SCORES}


def figures(case: Case, network: str) -> dict[str, Any]:
    """Means over the images whose caption speaks of it; None where none does."""
    values = {f"shapes_{name}": case.seen.values[f"shapes_{name}"] for name in SCORES}
    return {name: float(np.nanmean(v)) if np.isfinite(v).any() else None for name, v in values.items()}


METRIC = Metric(
    names=("shapes",),
    of=GENERATED,
    help="how often the picture shows the coloured shapes that its caption asks for",
    figures=figures,
    gives=lambda network: tuple(Figure(f"shapes_{name}", "share", higher=True) for name in SCORES),
    needs=(PROMPTS,),
    each=each,
    check=check,
)
