"""Captions: what is read as one, several of an image, and which of them a visit sees."""

import json

import numpy as np
import pytest

from ldm_jax.data import SOURCES, TOKENIZERS, captions, eval_batches, latent_cache, train_batches
from ldm_jax.data.tokenize import decode_bytes
from tests.data.sets import png, write

A, B = {"1.png": png(1)}, {"1.png": png(1), "2.png": png(2)}


def _row(**values) -> str:
    return json.dumps({"file_name": "1.png", **values}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"metadata.jsonl": _row(text="a")}, ("a",)),
        ({"metadata.jsonl": b"\xef\xbb\xbf" + _row(text="a").encode() + b"\r\n"}, ("a",)),
        ({"metadata.jsonl": _row(text="café").encode("utf-16")}, ("café",)),
        ({"metadata.jsonl": _row(text=["a cat", None, " ", "a feline"])}, ("a cat", "a feline")),
        ({"metadata.jsonl": _row(text="['a cat', \"it's\"]")}, ("a cat", "it's")),
        ({"metadata.jsonl": _row(text="[sic] a cat [sic]")}, ("[sic] a cat [sic]",)),
        ({"metadata.jsonl": _row(text=7)}, ("7",)),
        ({"metadata.jsonl": _row(text=None)}, ()),
        ({"metadata.jsonl": _row(text="  ")}, ()),
        ({"metadata.jsonl": _row(text=[])}, ()),
        ({"metadata.jsonl": _row(caption="a")}, ("a",)),
        ({"metadata.jsonl": _row(prompt="a", style="b")}, ("a",)),
        ({"metadata.jsonl": _row(caption="b", text="a")}, ("a",)),
        ({"metadata.csv": 'file_name,text\n1.png,"a, b"\n'}, ("a, b",)),
        ({"metadata.csv": "file_name,caption\n1.png,\"['a', 'b']\"\n"}, ("a", "b")),
        ({"metadata.csv": 'file_name,text\n1.png,"two\nlines"\n'}, ("two\nlines",)),
        ({"metadata.csv": "file_name,text\n1.png,\n"}, ()),
        ({"metadata.tsv": "file_name\ttext\n1.png\ta, b\n"}, ("a, b",)),
        ({"1.txt": "a cat\n\n a feline \r\n"}, ("a cat", "a feline")),
        ({"1.TXT": "a", "2.txt": "of no image"}, ("a",)),
        ({"1.caption": "a"}, ("a",)),
        ({"1.txt": "0 0.5 0.5 0.2 1e-3\n1 .1 .1 .1 .1\n"}, ()),
        ({"1.txt": ""}, ()),
    ],
)
def test_what_is_a_caption(build, files, expected):
    source = build(A | files)()
    assert source.captions == [expected]
    assert (source.has_text, source.several_captions) == (bool(expected), len(expected) > 1)
    item = source[0]
    assert item["text"] == (expected[0] if expected else "") and item.get("captions", expected) == expected


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"metadata.jsonl": _row(text={"en": "a"})}, {}, r"metadata.jsonl:1: the caption {'en': 'a'} is a dict; expected text"),
        ({"metadata.jsonl": _row(text=True)}, {}, "metadata.jsonl:1: the caption True is a bool"),
        ({"metadata.jsonl": _row(text=[["a"]])}, {}, r"metadata.jsonl:1: the caption \['a'\] is a list within a list"),
        ({"metadata.jsonl": '{"file_name": "1.png", "text": NaN}'}, {}, "the caption nan is a float"),
        ({"metadata.jsonl": '{"file_name": "1.png", "text": "\\ud83d"}'}, {}, "metadata.jsonl:1: .* half a character"),
        ({"metadata.jsonl": b"\n" + _row(text="café").encode("latin1")}, {}, r"metadata.jsonl:2: not UTF-8 \(byte 0xe9\)"),
        ({"metadata.csv": "file_name,text\n1.png,café".encode("cp1252")}, {}, "metadata.csv:2: not UTF-8"),
        ({"1.txt": "a\ncafé".encode("cp1252")}, {}, "1.txt:2: not UTF-8"),
        ({"metadata.jsonl": _row(caption="b", prompt="a")}, {}, "holds captions as caption, prompt; config.data.text_key says"),
        ({"metadata.jsonl": _row(text="a")}, {"text_key": "txt"}, "config.data.text_key='txt'; there are file_name, text"),
    ],
)  # fmt: skip
def test_what_is_none_is_named_with_its_line(build, files, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(A | files)(**options)
    assert "\n" not in str(caught.value)


def test_an_explicit_key_beats_all_others(build):
    assert build(A | {"metadata.jsonl": _row(text="a", style="b")})(text_key="style").texts == ["b"]


def test_some_may_have_none_and_class_folders_may_have_text_files(build):
    source = build({"cat/1.png": png(1), "cat/1.txt": "a cat", "dog/1.png": png(2), "notes.txt": "x"})()
    assert source.texts == ["a cat", ""] and source.class_names == ("cat", "dog") and source.left_out == {".txt": 1}


def test_the_fingerprint_sees_every_caption(tmp_path):
    def of(name, text):
        write(tmp_path / name, {"metadata.jsonl": _row(text=text)})
        (tmp_path / name / "1.png").hardlink_to(tmp_path / "1.png")
        return SOURCES["folder"](path=str(tmp_path / name)).fingerprint()

    write(tmp_path, A)
    assert (
        of("a", "x") == of("b", ["x"])
        and len({of("c", ["x", "y"]), of("d", ["y", "x"]), of("e", ["x", "z"]), of("f", "x")}) == 4
    )


# --- several captions of an image ----------------------------------------------------------------------------------------

COUNT = 60  # grain's shuffle of a handful is slow
TEXTS = [[f"{i}{c}" for c in "abc"[: 1 + i % 3]] for i in range(COUNT)]  # one, two or three captions
TOKENIZER = TOKENIZERS["bytes"](8)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": texts}) for i, texts in enumerate(TEXTS)]
    files = {f"{i:02d}.png": png(i, (8, 8)) for i in range(COUNT)} | {"metadata.jsonl": "\n".join(rows)}
    return SOURCES["folder"](path=write(tmp_path_factory.mktemp("several"), files))


@pytest.fixture(scope="module")
def cached_latents(source, tmp_path_factory):
    """The same items as latents, whose mean is the image's number."""
    meta = latent_cache.plan(count=COUNT, shape=(1, 1, 1), has_text=True, several_captions=True)
    out = tmp_path_factory.mktemp("latents")
    latent_cache.begin(out / "train", meta)
    value = np.arange(COUNT, dtype=np.float32).reshape(COUNT, 1, 1, 1)
    latent_cache.write_shard(
        out / "train", meta, 0, [({"mean": value, "std": value}, np.zeros(COUNT, np.int32), source.captions)]
    )
    latent_cache.finish(out / "train", meta)
    return SOURCES["latents"](path=str(out))


def _take(source, n: int = 20, **options) -> list[tuple[int, str]]:
    """(number of the image, caption drawn) in the order of the stream."""
    options = {"batch_size": 4, "seed": 3, "resolution": 8, "tokenizer": TOKENIZER, **options}
    batches = train_batches(source, **options)
    batches = [next(batches) for _ in range(n)]
    numbers = [b["mean" if "mean" in b else "image"][:, 0, 0, 0].astype(int) for b in batches]
    return [(int(i), decode_bytes(t)) for ids, b in zip(numbers, batches) for i, t in zip(ids, b["tokens"])]


def test_each_visit_draws_one_of_the_captions(source):
    drawn = _take(source, 150)
    assert all(text in TEXTS[i] for i, text in drawn)
    for several in (2, 3):
        counts = [sum(len(TEXTS[i]) == several and TEXTS[i][k] == text for i, text in drawn) for k in range(several)]
        assert min(counts) > 0.7 * sum(counts) / several, counts
    visits = {i: {text for j, text in drawn if j == i} for i in range(COUNT)}
    assert sum(len(texts) > 1 for texts in visits.values()) > COUNT / 2  # another one at another visit


@pytest.mark.parametrize("options", [{"num_threads": 1, "prefetch": 1}, {"num_threads": 8}, {"cache": True}])
def test_the_draws_do_not_depend_on_threads_or_cache(source, options):
    assert _take(source, **options) == _take(source)
    assert _take(source, seed=4) != _take(source)


def test_the_draws_of_the_cached_latents_are_those_of_the_images(source, cached_latents):
    assert cached_latents.several_captions and [cached_latents[i]["captions"] for i in range(COUNT)] == source.captions
    assert cached_latents[4]["text"] == "4a"
    assert _take(cached_latents) == _take(source)


def test_resume_and_processes_draw_the_same(source):
    whole = _take(source, 12)
    assert _take(source, 7, start_batch=5) == whole[20:48]
    parts = [_take(source, 12, process_index=p, process_count=2) for p in range(2)]
    assert [row for k in range(0, 24, 2) for p in parts for row in p[k : k + 2]] == whole


def test_draws_and_flips_leave_each_other_alone(source):
    class First:  # the same source with the first captions alone
        several_captions = False

        def __getattr__(self, name):
            return getattr(source, name)

        def __len__(self):
            return len(source)

        def __getitem__(self, i):
            return {k: v for k, v in source[i].items() if k != "captions"}

    assert [i for i, _ in _take(First())] == [i for i, _ in _take(source)] == [i for i, _ in _take(source, flip=True)]


def test_evaluation_takes_the_first(source):
    (batch,) = eval_batches(source, batch_size=COUNT, resolution=8, tokenizer=TOKENIZER)
    assert [decode_bytes(t) for t in batch["tokens"]] == [texts[0] for texts in TEXTS]


def test_a_draw_is_even():
    rng = np.random.default_rng(0)
    counts = np.bincount([int(captions.draw("012", rng)) for _ in range(3000)])
    assert abs(counts - 1000).max() < 100
