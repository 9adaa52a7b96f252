"""The batch stream: deterministic, sharded, resumable; and what goes into a batch."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import SOURCES, TOKENIZERS, eval_batches, train_batches


class Numbers:
    """`count` images of 8 x 8 pixels that say their own index: red = index, and left half dark, right half bright."""

    name, num_classes, class_names, has_text = "numbers", 0, (), True

    def __init__(self, count: int = 23, broken: int | None = None):
        self.count, self.broken = count, broken

    def where(self, i: int) -> str:
        return f"numbers[{i}]"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        if i == self.broken:
            raise ValueError(f"numbers/{i}.jpg: broken image")
        image = np.zeros((8, 8, 3), np.uint8)
        image[..., 0], image[:, 4:, 1] = i, 255
        return {"image": image, "label": np.int32(i % 5), "text": f"n{i}"}


def _take(n: int, source=None, **options):
    options = {"batch_size": 8, "seed": 3, "resolution": 8, "flip": True, **options}
    batches = train_batches(Numbers() if source is None else source, **options)
    return [next(batches) for _ in range(n)], batches


def _same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x) for x, y in zip(a, b))


def test_an_epoch_shows_each_image_once_and_the_next_in_another_order():
    seen = np.concatenate([b["image"][:, 0, 0, 0] for b in _take(23)[0]])
    epochs = seen.reshape(8, 23)
    assert all(sorted(e) == list(range(23)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 8


def test_flips_half_of_them_and_anew_each_epoch():
    batches = _take(46)[0]
    flipped = np.concatenate([b["image"][:, 0, 0, 1] for b in batches]) == 255
    index = np.concatenate([b["image"][:, 0, 0, 0] for b in batches])
    assert 0.4 < flipped.mean() < 0.6
    assert all(0 < flipped[index == i].sum() < 16 for i in range(23))
    assert not any((b["image"][:, 0, 0, 1] == 255).any() for b in _take(5, flip=False)[0])


def test_the_stream_does_not_depend_on_threads_prefetch_or_cache():
    one = _take(9, num_threads=1, prefetch=1)[0]
    assert _same(one, _take(9, num_threads=8, prefetch=16)[0])
    assert _same(one, _take(9, cache=True)[0])
    assert not _same(one, _take(9, seed=4)[0])
    assert not _same(one, _take(9, seed=2**63 + 3)[0])


def test_resume_equals_uninterrupted():
    whole, batches = _take(12)
    assert batches.position == 12
    first, batches = _take(5)
    rest, batches = _take(7, start_batch=batches.position)
    assert _same(whole, first + rest) and batches.position == 12
    far = train_batches(Numbers(), batch_size=8, seed=3, resolution=8, start_batch=10**9)
    assert next(far)["image"].shape == (8, 8, 8, 3)  # at once: nothing is replayed


def _rows(batches: list[dict]) -> list[tuple]:
    return [(int(x[0, 0, 0]), int(x[0, 0, 1])) for b in batches for x in b["image"]]


@pytest.mark.parametrize("count", [2, 4])
def test_the_processes_batches_together_are_the_global_batch(count):
    """Images and flips, row for row; also when the number of processes changes on the way."""
    whole = _take(8)[0]
    parts = [_take(5, process_index=p, process_count=count)[0] for p in range(count)]
    for k in range(5):
        assert all(len(p[k]["label"]) == 8 // count for p in parts)
        assert _rows([p[k] for p in parts]) == _rows([whole[k]])
    later = [_take(3, process_index=p, process_count=8 // count, start_batch=5)[0] for p in range(8 // count)]
    for k in range(3):
        assert _rows([p[k] for p in later]) == _rows([whole[5 + k]])


def test_processes_draw_different_flips():
    parts = [_take(20, process_index=p, process_count=2)[0] for p in range(2)]
    flips = [np.concatenate([b["image"][:, 0, 0, 1] for b in p]) for p in parts]
    assert (flips[0] != flips[1]).any()


def test_a_batch():
    tokenizer = TOKENIZERS["bytes"](8)
    (batch,), _ = _take(1, tokenizer=tokenizer, resolution=4, crop="lanczos")
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((8, 4, 4, 3), "uint8"),
        "label": ((8,), "int32"),
        "tokens": ((8, 8), "int32"),
    }
    for image, label, tokens in zip(batch["image"], batch["label"], batch["tokens"]):
        i = int(image[0, 0, 0])
        assert label == i % 5 and (tokens == tokenizer.encode(f"n{i}")).all()


@pytest.mark.parametrize("options", [{}, {"limit": 10}, {"limit": 23}, {"limit": 100}, {"process_count": 2}])
def test_evaluation_is_one_ordered_padded_pass(options):
    count = min(options.get("limit", 23), 23)
    parts = options.get("process_count", 1)
    runs = [
        list(
            eval_batches(
                Numbers(), batch_size=8, resolution=8, **options, **({"process_index": p} if parts > 1 else {})
            )
        )
        for p in range(parts)
    ]
    assert {len(r) for r in runs} == {-(-count // 8)}
    for p, batches in enumerate(runs):
        assert all(len(b["valid"]) == 8 // parts for b in batches)
        index = np.concatenate([b["image"][:, 0, 0, 0] for b in batches])
        valid = np.concatenate([b["valid"] for b in batches])
        mine = 8 // parts
        assert index[valid].tolist() == [i for i in range(count) if i % 8 // mine == p]
        assert not any((b["image"][:, 0, 0, 1] == 255).any() for b in batches)


@pytest.mark.parametrize("cache", [False, True])
def test_an_error_in_a_thread_is_the_one_clear_error(cache):
    with pytest.raises(ValueError, match="broken") as caught:
        _take(6, Numbers(broken=13), num_threads=4, cache=cache)
    assert str(caught.value) == "numbers/13.jpg: broken image"
    with pytest.raises(ValueError, match="broken") as caught:
        list(eval_batches(Numbers(broken=13), batch_size=8, resolution=8))
    assert str(caught.value) == "numbers/13.jpg: broken image"


def test_one_image_is_enough():
    batches, _ = _take(3, Numbers(1), batch_size=4)
    assert all((b["image"][:, 0, 0, 0] == 0).all() for b in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0: expected a positive multiple of the 1 processes"),
        ({"batch_size": 9, "process_count": 2}, "batch_size 9: expected a positive multiple of the 2 processes"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2: expected 0\.\.1"),
        ({"crop": "center"}, "crop 'center' is unknown; expected one of adm, lanczos, none"),
        ({"source": Numbers(0)}, "numbers: is empty"),
        ({"resolution": 4, "crop": "none"}, r"numbers\[\d+\]: 8x8 pixels with crop='none'; expected 4x4"),
        ({"source": SOURCES["shapes"]()}, "shapes/train: flip=True, but its captions"),
        ({"cache": True, "resolution": None}, "cache=True needs a resolution"),
        ({"start_batch": -1}, "start_batch -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        _take(1, **options)


@pytest.mark.data
def test_cached_real_images_are_the_decoded_ones(ldm_data):
    source = SOURCES["zip"](split="val", path=str(ldm_data / "caltech101_128.zip"))
    options = {"batch_size": 16, "seed": 0, "resolution": 64, "crop": "adm", "flip": True}
    plain, cached = (train_batches(source, cache=c, **options) for c in (False, True))
    assert _same([next(plain) for _ in range(3)], [next(cached) for _ in range(3)])


@pytest.mark.data
def test_validation_pass_over_real_data_sees_each_image_once(ldm_data):
    source = SOURCES["zip"](split="val", path=str(ldm_data / "emoji128.zip"))
    tokenizer = TOKENIZERS["bytes"](128)
    batches = list(eval_batches(source, batch_size=50, resolution=32, crop="lanczos", tokenizer=tokenizer))
    assert sum(int(b["valid"].sum()) for b in batches) == 172 and len(batches) == 4
    expected = np.asarray(Image.fromarray(source[171]["image"]).resize((32, 32), Image.Resampling.LANCZOS))
    assert (batches[-1]["image"][21] == expected).all()
    assert (batches[-1]["tokens"][21] == tokenizer.encode(source[171]["text"])).all()
