"""The reader of pictures of shapes: its own renderings, imperfect ones, wrong ones."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm_jax.data import shapes
from ldm_jax.evaluation import shapes as judge


def _pictures(split: str, count: int, resolution: int, first: int = 0):
    scenes = [shapes.scene(i, split=split) for i in range(first, first + count)]
    return scenes, [shapes.render(s, resolution) for s in scenes]


def _right(scene: shapes.Scene, seen: shapes.Scene) -> bool:
    """The same shapes at the same places: kinds, colours, sizes, and so every relation."""
    near = lambda a, b: np.hypot(a.x - b.x, a.y - b.y) < 2.5  # noqa: E731
    pairs = [(a, b) for a in scene.shapes for b in seen.shapes if near(a, b)]
    same = all((a.kind, a.colour, a.size) == (b.kind, b.colour, b.size) for a, b in pairs)
    return len(seen.shapes) == len(scene.shapes) == len(pairs) and same


@pytest.mark.parametrize(
    ("resolution", "split", "count"), [(32, "train", 250), (64, "train", 120), (32, "heldout", 80)]
)
def test_reads_its_own_renderings(resolution, split, count):
    scenes, pictures = _pictures(split, count, resolution, first=10_000)
    right = np.mean([_right(s, judge.read(p)) for s, p in zip(scenes, pictures)])
    assert right >= 0.995
    assert judge.score(pictures[:40], [shapes.caption(s) for s in scenes[:40]])["all"] == 1.0


def test_reads_imperfect_pictures():
    scenes, pictures = _pictures("train", 60, 32)
    rng = np.random.default_rng(0)
    worse = []
    for picture in pictures:
        blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.8)), float)
        ground = np.median(blurred.reshape(-1, 3), 0)
        noisy = ground + 0.75 * (blurred - ground) + rng.normal(0, 12, blurred.shape)
        worse.append(np.clip(noisy, 0, 255).astype(np.uint8))
    assert np.mean([_right(s, judge.read(p)) for s, p in zip(scenes, worse)]) >= 0.95


def test_judges_by_attribute():
    """One picture, captions with one wrong word each: that attribute alone is wrong."""
    a = shapes.Shape("circle", "red", "small", 32, 14, 16, shapes.COLOURS["red"])
    b = shapes.Shape("square", "blue", "large", 30, 46, 24, shapes.COLOURS["blue"])
    picture = shapes.render(shapes.Scene((a, b), (240, 240, 240)), 64)

    def judged(text):
        return {k for k, v in judge.score(picture[None], [text]).items() if v == 0}

    assert judged("a small red circle above a large blue square") == set()
    assert judged("a large blue square below a small red circle") == set()
    assert judged("a small red circle below a large blue square") == {"relation", "all"}
    assert judged("a small red cross above a large blue square") == {"kind", "both", "all"}
    assert judged("a small red circle above a large cyan square") == {"colour", "both", "all"}
    assert judged("a large red circle above a large blue square") == {"size", "all"}
    assert judged("a large blue square") == {"count", "all"}
    assert judge.score(picture[None], ["a large blue square"])["relation"] is None


def test_wrong_and_empty_pictures_do_not_score():
    scenes, pictures = _pictures("train", 60, 32)
    texts = [shapes.caption(s) for s in scenes]
    assert judge.score(pictures, texts[1:] + texts[:1])["both"] < 0.15
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    assert judge.score(noise, texts[:20])["both"] <= 0.1
    flat = np.full((3, 32, 32, 3), 240, np.uint8)
    assert judge.read(flat[0]).shapes == ()
    assert judge.score(flat, texts[:3])["kind"] == 0


def test_read_refuses_floats():
    with pytest.raises(ValueError, match="expected uint8"):
        judge.read(np.zeros((32, 32, 3), np.float32))


def test_reads_a_jpeg():
    scenes, pictures = _pictures("train", 20, 64)
    for scene, picture in zip(scenes, pictures):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=75)
        assert _right(scene, judge.read(np.asarray(Image.open(file))))
