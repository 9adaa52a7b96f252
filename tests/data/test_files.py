"""Folders and zip files: layouts, splits, and each bad input with its message."""

import json
import os
import pickle
import threading
import zipfile

import numpy as np
import pytest

from ldm_jax.data import SOURCES
from ldm_jax.data.archive import resolve
from tests.data.sets import png as _png
from tests.data.sets import write as _write
from tests.data.sets import zipped as _zip


def _lines(*rows: dict) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


CLASSES = {f"train/{c}/{i:02d}.png": _png(10 * i + n) for n, c in enumerate(("cat", "dog")) for i in range(5)}
CLASSES |= {f"test/{c}/{i:02d}.png": _png(100 + 10 * i + n) for n, c in enumerate(("cat", "dog")) for i in range(2)}


def _values(source) -> list[int]:
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


def test_class_folders(build):
    open_ = build(CLASSES | {"README.md": "about", "train/cat/.hidden.png": b"no image"})
    train, test = open_(), open_("test")
    assert (len(train), len(test), train.num_classes, train.class_names) == (10, 4, 2, ("cat", "dog"))
    assert not train.has_text and train[0]["text"] == ""
    assert [int(train[i]["label"]) for i in range(10)] == [0] * 5 + [1] * 5
    assert _values(train) == [0, 10, 20, 30, 40, 1, 11, 21, 31, 41]
    assert train[0]["image"].shape == (4, 4, 3) and train[0]["image"].dtype == np.uint8


def test_val_from_train_is_the_tail_of_each_class(build):
    open_ = build(CLASSES)
    options = {"val_from_train": 2}
    assert _values(open_("val", **options)) == [30, 40, 31, 41]
    assert _values(open_("train", **options)) == [0, 10, 20, 1, 11, 21]
    assert _values(open_("test", **options)) == [100, 110, 101, 111]
    with pytest.raises(ValueError, match="val_from_train=5, but class 'cat' has 5 images"):
        open_("train", val_from_train=5)


def test_without_split_folders_everything_is_training(build):
    open_ = build({"cat/1.png": _png(1), "dog/deep/2.png": _png(2)})
    assert open_().class_names == ("cat", "dog") and len(open_()) == 2
    with pytest.raises(ValueError, match=r"no split 'test'; there are train \(2\)"):
        open_("test")


def test_flat_images_are_unlabelled(build):
    source = build({"1.png": _png(1), "2.png": _png(2)})()
    assert source.num_classes == 0 and source[1]["label"] == 0


def test_metadata(build):
    rows = [
        {"file_name": "a/1.png", "text": "one\u2028eins", "label": 1, "split": "train"},
        {"file_name": "a/2.png", "text": "two", "label": 0, "split": "validation"},
        {"file_name": "a/3.png", "text": "three", "label": 1, "split": "test_tone"},
    ]
    metadata = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    files = {f"a/{i}.png": _png(i) for i in (1, 2, 3)} | {"metadata.jsonl": metadata}
    open_ = build(files | {"classes.json": json.dumps({"labels": ["x", "y", "z"]})})
    train = open_()
    assert train.has_text and train.class_names == ("x", "y", "z") and train.num_classes == 3
    assert train[0]["text"] == "one\u2028eins" and train[0]["label"] == 1
    assert _values(open_("val")) == [2] and _values(open_("test_tone")) == [3]
    with pytest.raises(ValueError, match=r"no split 'test'; there are test_tone \(1\), train \(1\), val \(1\)"):
        open_("test")


def test_metadata_inside_split_folders_with_label_names(build):
    files = {f"{s}/{i}.png": _png(i) for s, i in (("train", 1), ("train", 2), ("test", 3))}
    files["train/metadata.jsonl"] = _lines({"file_name": "1.png", "label": "b"}, {"file_name": "2.png", "label": "a"})
    files["test/metadata.jsonl"] = _lines({"file_name": "3.png", "label": "b"})
    open_ = build(files)
    assert open_().class_names == ("a", "b")
    assert [int(open_()[i]["label"]) for i in range(2)] == [1, 0]
    assert _values(open_("test")) == [3] and open_("test")[0]["label"] == 1


def test_edm_layout(build):
    files = {f"00000/img{i:08d}.png": _png(i) for i in range(6)}
    listed = json.dumps({"labels": [[n, i % 3] for i, n in enumerate(files)]})
    source = build(files | {"dataset.json": listed})()
    assert source.num_classes == 3 and [int(source[i]["label"]) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert _values(build(files | {"dataset.json": listed})("val", val_from_train=1)) == [3, 4, 5]


def test_edm_layout_without_labels(build):
    source = build({"00000/a.png": _png(1), "dataset.json": json.dumps({"labels": None})})()
    assert source.num_classes == 0 and len(source) == 1


IMAGE = {"a.png": _png(1)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": "x"}, "holds no image"),
        (
            IMAGE | {"metadata.jsonl": _lines({"file_name": "../b.png"})},
            r"metadata.jsonl:1: the path '\.\./b.png' leads out",
        ),
        (IMAGE | {"metadata.jsonl": _lines({"file_name": "/b.png"})}, "the path '/b.png' leads out"),
        (
            IMAGE | {"metadata.jsonl": _lines({"file_name": "b.png"})},
            "metadata.jsonl:1: 'b.png' is listed but not there",
        ),
        (IMAGE | {"metadata.jsonl": "{"}, "metadata.jsonl:1: not valid JSON"),
        (IMAGE | {"metadata.jsonl": _lines({"file": "a.png"})}, "expected an object with a file_name"),
        (
            IMAGE | {"metadata.jsonl": _lines(*[{"file_name": "a.png"}] * 2)},
            "metadata.jsonl:2: 'a.png' is listed twice",
        ),
        (
            IMAGE
            | {"metadata.jsonl": _lines({"file_name": "a.png", "label": 2}), "classes.json": '{"labels": ["x", "y"]}'},
            r"'a.png': label 2 is out of range; expected 0\.\.1",
        ),
        (IMAGE | {"metadata.jsonl": _lines({"file_name": "a.png", "label": -1})}, "'a.png': label -1 is out of range"),
        (IMAGE | {"metadata.jsonl": _lines({"file_name": "a.png", "label": 0.5})}, "label 0.5 is not a class index"),
        (
            IMAGE
            | {"b.png": _png(2), "metadata.jsonl": _lines({"file_name": "a.png", "label": 0}, {"file_name": "b.png"})},
            "'b.png' has no label while others have one",
        ),
        (IMAGE | {"dataset.json": '{"labels": [["b.png", 0]]}'}, "dataset.json: 'b.png' is listed but not there"),
        (IMAGE | {"dataset.json": '{"labels": [["a.png", -3]]}'}, "'a.png': label -3 is out of range"),
        (IMAGE | {"dataset.json": '{"labels": [["../a.png", 0]]}'}, r"the path '\.\./a.png' leads out"),
        (IMAGE | {"b.png": _png(2), "dataset.json": '{"labels": [["a.png", 0]]}'}, "'b.png' has no label"),
        ({"train/x/a.png": _png(1), "b.png": _png(2)}, "b.png: lies outside the split folders"),
        ({"x/a.png": _png(1), "b.png": _png(2)}, "'b.png' has no label while others have one"),
    ],
)
def test_bad_sets_are_named(build, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(files)()
    assert "\n" not in str(caught.value)


def test_label_beyond_declared_classes(build):
    with pytest.raises(ValueError, match=r"dog.01.png: label 1 is out of range; expected 0\.\.0"):
        build({"cat/00.png": _png(0), "dog/01.png": _png(1)})(num_classes=1)
    assert build({"cat/00.png": _png(0)})(num_classes=3).num_classes == 3


@pytest.mark.parametrize("damage", ["text", "cut"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_broken_image_is_named_or_skipped(build, kind, damage, caplog):
    good = _png(9, (40, 40), kind)
    broken = b"not an image" if damage == "text" else good[: len(good) // 2]
    extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    files = {f"x/{i}.{extension}": good for i in range(3)} | {f"x/1.{extension}": broken}
    open_ = build(files)
    source = open_()
    assert len(source) == 3
    with pytest.raises(ValueError, match=f"x/1.{extension}: broken image") as caught:
        source[1]
    assert "\n" not in str(caught.value)
    kept = open_(skip_broken=True)
    assert (len(kept), kept.skipped) == (2, 1)
    assert not any(f"x/1.{extension}" in kept.where(i) for i in range(2))
    assert "skipped 1 broken of 3 images" in caplog.text and f"x/1.{extension}" in caplog.text


def test_all_broken(build):
    with pytest.raises(ValueError, match=r"every image of split 'train' is broken; first: .*1.png"):
        build({"x/1.png": b"?"})(skip_broken=True)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"])
def test_escaping_zip_member(tmp_path, name):
    path = _zip(tmp_path / "bad.zip", {"ok.png": _png(1), name: _png(2)})
    with pytest.raises(ValueError, match=r"bad.zip: the path '.*evil.png' leads out of the data set"):
        SOURCES["zip"](path=path)


def test_not_a_zip_and_damaged_zip(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"no.zip: cannot be read as a zip file"):
        SOURCES["zip"](path=str(tmp_path / "no.zip"))
    path = tmp_path / "flip.zip"
    data = _png(77, (32, 32), "BMP")
    _zip(path, {"x/1.bmp": data, "x/2.bmp": data})
    content = bytearray(path.read_bytes())
    content[content.index(data) + 200] ^= 1
    path.write_bytes(content)
    source = SOURCES["zip"](path=str(path))
    with pytest.raises(ValueError, match=r"x/1.bmp: its checksum does not match"):
        source[0]
    assert source[1]["image"][0, 0, 0] == 77


def test_wrong_kind_of_path(tmp_path):
    with pytest.raises(ValueError, match="not a folder; a zip file is read with name='zip'"):
        SOURCES["folder"](path=_zip(tmp_path / "a.zip", IMAGE))
    with pytest.raises(ValueError, match="a folder, not a zip file; it is read with name='folder'"):
        SOURCES["zip"](path=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no image"):
        SOURCES["folder"](path=str(tmp_path / "empty"))


def test_paths_are_looked_for_here_and_in_ldm_data(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    _write(home, {"set/a.png": _png(1)})
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("LDM_DATA", str(home))
    assert resolve("set") == home / "set"
    _write(here, {"set/a.png": _png(2)})
    assert resolve("set") == here / "set"
    with pytest.raises(FileNotFoundError, match=f"no data at 'none': looked for {here}/none and {home}/none"):
        resolve("none")
    monkeypatch.delenv("LDM_DATA")
    with pytest.raises(FileNotFoundError, match="LDM_DATA is unset"):
        resolve("none")


def test_zip_members_deflated_or_stored_in_many_threads_and_after_pickling(tmp_path):
    files = {f"x/{i:03d}.png": _png(i) for i in range(100)}
    for n, kind in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)):
        source = SOURCES["zip"](path=_zip(tmp_path / f"{n}.zip", files, kind))
        again = pickle.loads(pickle.dumps(source))
        seen = [None] * 8

        def work(t, source=source, seen=seen):
            order = np.random.default_rng(t).permutation(100)
            seen[t] = all(int(source[i]["image"][0, 0, 0]) == i for i in order)

        threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert all(seen) and _values(again) == list(range(100))


def test_fingerprint_follows_content(tmp_path):
    def of(name, files):
        return SOURCES["zip"](path=_zip(tmp_path / name, files)).fingerprint()

    one = of("1.zip", {"x/1.png": _png(1)})
    assert one == of("2.zip", {"x/1.png": _png(1)})
    assert one != of("3.zip", {"x/1.png": _png(2)}) and one != of("4.zip", {"y/2.png": _png(1)})


# Real data


@pytest.mark.data
def test_cifar10_splits(ldm_data):
    block = {"path": str(ldm_data / "cifar10_jpeg.zip"), "val_from_train": 500}
    sources = {split: SOURCES["zip"](split=split, **block) for split in ("train", "val", "test")}
    assert {s: len(v) for s, v in sources.items()} == {"train": 45_000, "val": 5_000, "test": 10_000}
    names = {s: set(v.names) for s, v in sources.items()}
    assert not names["train"] & names["val"] and not (names["train"] | names["val"]) & names["test"]
    assert names["val"] == {f"train/{c}/{i}.jpg" for c in sources["val"].class_names for i in range(4500, 5000)}
    for source in sources.values():
        assert (np.bincount(source.labels) == len(source) // 10).all()
        assert source[17]["image"].shape == (32, 32, 3)
    assert sources["test"].class_names[9] == "truck" and "truck" in sources["test"].where(9999)


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "counts", "classes"),
    [
        ("emoji128.zip", {"train": 5241, "val": 172, "test_tone": 247, "test_style": 120, "test_concept": 355}, 9),
        ("caltech101_128.zip", {"train": 5362, "val": 337, "test": 1008}, 94),
    ],
)
def test_captioned_sets(ldm_data, file, counts, classes):
    seen: set[str] = set()
    for split, count in counts.items():
        source = SOURCES["zip"](split=split, path=str(ldm_data / file))
        assert (len(source), source.num_classes, source.has_text) == (count, classes, True)
        assert not seen & set(source.names)
        seen |= set(source.names)
        item = source[count // 2]
        assert item["image"].shape == (128, 128, 3) and item["text"] and source.where(0).endswith(source.names[0])
    assert len(seen) == sum(counts.values())


def test_a_folder_read_while_a_file_goes(tmp_path):
    source = SOURCES["folder"](path=_write(tmp_path / "s", {"x/1.png": _png(1), "x/2.png": _png(2)}))
    os.remove(tmp_path / "s/x/1.png")
    with pytest.raises(FileNotFoundError, match=r"x/1.png"):
        source[0]
