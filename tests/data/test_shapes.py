"""Scenes and captions of ldm_jax.data.shapes."""

import itertools

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import shapes


def _pictures(split: str, count: int, resolution: int, first: int = 0):
    scenes = [shapes.scene(i, split=split) for i in range(first, first + count)]
    return scenes, [shapes.render(s, resolution) for s in scenes]


def test_shapes_lie_apart_inside_and_in_clear_relation():
    for i in range(400):
        what = shapes.scene(i).shapes
        for s in what:
            assert all(s.diameter / 2 + 1 <= v <= shapes.UNITS - s.diameter / 2 - 1 for v in (s.x, s.y))
        for a, b in itertools.combinations(what, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.diameter + b.diameter) / 2 + shapes.GAP
        for a, b in itertools.pairwise(what):
            assert abs(abs(a.x - b.x) - abs(a.y - b.y)) >= shapes.LEAD
            assert shapes.relation(b, a) == shapes.INVERSE[shapes.relation(a, b)]


def test_heldout_combinations_never_occur_in_training():
    """Counted from captions and positions here, not by the function that the generator asks."""
    for split in ("train", "val", "heldout"):
        found = 0
        for i in range(1500):
            what = shapes.scene(i, split=split).shapes
            unseen = any((s.kind, s.colour) in shapes.HELDOUT_PAIRS for s in what)
            for a, b in itertools.permutations(what, 2):
                dx, dy = a.x - b.x, a.y - b.y
                unseen |= (a.kind, b.kind) == ("triangle", "circle") and dy < 0 and abs(dy) >= abs(dx)
                unseen |= (a.kind, b.kind) == ("cross", "square") and dx < 0 and abs(dx) > abs(dy)
            found += unseen
        assert found == (1500 if split == "heldout" else 0)


def test_every_single_attribute_occurs_in_training():
    words = {w for i in range(300) for s in shapes.scene(i).shapes for w in (s.kind, s.colour, s.size)}
    assert words == {*shapes.KINDS, *shapes.COLOURS, *shapes.SIZES}
    links = {r for i in range(100) for r in shapes.parse(shapes.caption(shapes.scene(i))).relations}
    assert links == set(shapes.RELATIONS)


def test_captions_are_exact_and_parse_back():
    longest = 0
    for i in range(300):
        scene = shapes.scene(i)
        text = shapes.caption(scene)
        wanted = shapes.parse(text)
        assert wanted.shapes == tuple((s.size, s.colour, s.kind) for s in scene.shapes)
        assert len(wanted.relations) == len(scene.shapes) - 1
        longest = max(longest, len(text))
    assert longest <= shapes.CAPTION_BYTES
    assert shapes.parse("a large green triangle") == ((("large", "green", "triangle"),), ())
    three = shapes.parse("a small red circle above a large blue square, which is left of a small cyan cross")
    assert three.relations == ("above", "left of")
    for text in ("a red circle", "a small red circle over a large blue square", ""):
        with pytest.raises(ValueError, match="not a caption of shapes"):
            shapes.parse(text)


def test_a_scene_is_a_function_of_seed_split_and_index():
    assert shapes.scene(7) == shapes.scene(7)
    others = [shapes.scene(8), shapes.scene(7, seed=1), *(shapes.scene(7, split=s) for s in ("val", "test", "heldout"))]
    assert len({shapes.scene(7), *others}) == 6
    source = shapes.shapes("val", size=5, resolution=48, objects=(2, 2))
    item = source[3]
    assert len(source) == 5 and item["image"].shape == (48, 48, 3) and item["image"].dtype == np.uint8
    assert item["text"] == shapes.caption(source.scene(3))
    assert source.class_names[item["label"]] == source.scene(3).shapes[0].kind
    small, large = shapes.shapes(size=3)[2], shapes.shapes(size=300)[2]
    assert (small["image"] == large["image"]).all()


def test_no_picture_is_in_two_splits():
    pictures = {
        split: {shapes.render(shapes.scene(i, split=split, objects=(1, 1)), 32).tobytes() for i in range(300)}
        for split in shapes.SPLITS
    }
    for a, b in itertools.combinations(shapes.SPLITS, 2):
        assert not pictures[a] & pictures[b]


def test_anti_aliasing_and_scale():
    """A rendering at 128 pixels, reduced to 32 by boxes, is the rendering at 32; the edge of a circle has mixed pixels."""
    for i in range(20):
        scene = shapes.scene(i)
        fine = np.asarray(Image.fromarray(shapes.render(scene, 128)).reduce(4), float)
        assert np.abs(fine - shapes.render(scene, 32)).max() < 14
    disc = shapes.Shape("circle", "blue", "large", 32, 32, 26, (0, 0, 255))
    picture = shapes.render(shapes.Scene((disc,), (255, 255, 255)), 32)
    cover = 1 - picture[..., 0] / 255
    assert abs(cover.sum() - np.pi * 6.5**2) < 1.5
    assert np.unique(picture[..., 0]).size > 8


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"split": "training"}, "no split 'training'; expected one of train, val, test, heldout"),
        ({"objects": (0, 2)}, "objects=\\(0, 2\\)"),
        ({"resolution": 16}, "resolution=16"),
        ({"size": 0}, "size=0"),
    ],
)
def test_bad_arguments(block, message):
    with pytest.raises(ValueError, match=message):
        shapes.shapes(**block)
