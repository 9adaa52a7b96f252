"""Which images are in which split and class, by the names of folders and by metadata; and what can be read in two ways."""

import json
import os

import pytest

from ldm_jax.data import SOURCES
from ldm_jax.data.splits import read_name
from tests.data.sets import png, write, zipped

PICTURE = png(1)


def _files(*names: str) -> dict[str, bytes | str]:
    return {name: PICTURE for name in names}


def _lines(*rows: dict) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


# Hugging Face's imagefolder knows each of these words, between separators and digits (datasets/data_files.py).
@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train Train TRAIN training Training training_set trainset TrainSet train2017 train_images X_train images-train",
        ),
        ("val", "val valid validation dev Val VALID val2017 devset dev-data Validation.Images valid_1"),
        ("test", "test Test testing eval evaluation test_set test1 TestData evaluation-set test_256x256"),
        ("", "cat contest latest trained device value invalid evaluate n01440764 тест"),
        ("?", "train_val trainval2012 test-dev2017"),
    ],
)
def test_names_of_splits(split, names):
    assert {name: read_name(name) for name in names.split()} == {
        name: (split, read_name(name).rest if split == "" else "") for name in names.split()
    }
    assert read_name("Validation Set").split == "val" and read_name("cats_train") == ("train", "cats")


def _tree(*folders: str) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(2)]


# What train and test hold, and the classes: folders are written '{split}/CLASS'.
LAYOUTS = {
    "split/class": (_tree("train/cat", "train/dog"), _tree("test/cat", "test/dog"), ("cat", "dog")),
    "any case": (_tree("Training/cat", "Training/dog"), _tree("TESTING/cat"), ("cat", "dog")),
    "one folder on top": (_tree("data/train/cat", "data/train/dog"), _tree("data/test/cat"), ("cat", "dog")),
    "two folders on top": (_tree("a/b/train/cat", "a/b/train/dog"), _tree("a/b/test/cat"), ("cat", "dog")),
    "images": (_tree("train/images/cat", "train/images/dog"), _tree("test/images/cat"), ("cat", "dog")),
    "images on top": (_tree("images/train2017"), _tree("images/test2017"), ()),
    "no classes": (_tree("train"), _tree("test"), ()),
    "a folder twice": (_tree("train/train/cat", "train/train/dog"), _tree("test/test/cat"), ("cat", "dog")),
    "a compound twice": (_tree("seg_train/seg_train/cat"), _tree("seg_test/seg_test/cat"), ("cat",)),
    "class/split": (_tree("cat/train", "dog/train"), _tree("cat/test", "dog/test"), ("cat", "dog")),
    "one word apart": (_tree("DIV2K_train_HR"), _tree("DIV2K_test_HR"), ()),
    "classes": (_tree("cat", "dog"), [], ("cat", "dog")),
    "classes below one folder": (_tree("data/cat", "data/dog"), [], ("cat", "dog")),
    "class named like a compound": (_tree("bullet_train", "cat"), [], ("bullet_train", "cat")),
    "names of files": (["train_1.png", "train_2.png"], [], ()),
}


@pytest.mark.parametrize("backslash", [False, True], ids=["", "windows"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_test_images_are_not_trained_on(tmp_path, name, backslash):
    train, test, classes = LAYOUTS[name]
    top = train[0].split("/")[0]
    junk = {
        "__MACOSX/test/._1.png": b"x",
        "Thumbs.db": b"x",
        f"{top}/@eaDir/9.png": PICTURE,
        f"{top}/.a/9.png": PICTURE,
    }
    files = _files(*train, *test) | (junk if "/" in train[0] else {})
    if backslash:
        path = zipped(
            tmp_path / "set.zip", {n.replace("/", "\\"): data for n, data in files.items()} | {f"{top}\\": b""}
        )
    else:
        path = write(tmp_path / "set", files)
    make = SOURCES["zip" if backslash else "folder"]
    source = make("train", path=path)
    assert (sorted(source.names), source.class_names) == (sorted(train), classes)
    assert source.left_out == {} and source.split_sizes == {"train": len(train)} | ({"test": len(test)} if test else {})
    if classes:
        assert [classes[k] for k in source.labels] == [
            next(c for c in classes if c in n.split("/")) for n in source.names
        ]
    if test:
        held = make("test", path=path)
        assert sorted(held.names) == sorted(test) and held.class_names == classes


AMBIGUOUS = {
    "a class beside a split": (["train/cat/1.png", "cat/1.png"], r"cat/1.png: lies outside the split folders 'train'"),
    "a class named like a split": (["car/1.png", "train/1.png"], "car/1.png: lies outside the split folders 'train'"),
    "an image beside splits": (
        ["train/1.png", "test/1.png", "3.png"],
        "3.png: lies outside the split folders 'test', 'train'",
    ),
    "a class of a split's name": (["train/train/1.png", "train/cat/1.png"], "'train/train': named like a split inside"),
    "two folders of one split": (
        ["train2014/1.png", "train2017/1.png"],
        "'train2014', 'train2017' mean the same split 'train'",
    ),
    "val and dev": (["train/1.png", "val/1.png", "dev/1.png"], "'dev', 'val' mean the same split 'val'"),
    "a split below one class": (
        ["cat/test/1.png", "dog/1.png"],
        "dog/1.png: lies outside the split folders 'cat/test'",
    ),
    "splits at two depths": (["a/train/1.png", "test/b/1.png"], "'a/train', 'test' do not lie at one depth"),
    "compounds": (
        [f"{c}_{s}/1.png" for c in ("cats", "dogs") for s in ("train", "test")],
        "'cats_test', 'cats_train', .*or as splits",
    ),
    "unlike compounds": (["train_clean/1.png", "test_noisy/1.png"], "'test_noisy', 'train_clean' can be read"),
    "two splits in one name": (["train_val/1.png", "test/1.png"], "'train_val' names two splits"),
    "names of files": (["train_1.png", "test_1.png"], "the file names 'test_1.png', 'train_1.png' name splits"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused_with_the_names(tmp_path, name):
    names, message = AMBIGUOUS[name]
    with pytest.raises(ValueError, match=message) as caught:
        SOURCES["folder"](path=write(tmp_path / "set", _files(*names)))
    assert "\n" not in str(caught.value) and "config.data.splits" in str(caught.value)
    if name != "an image beside splits":  # which has no class while others have one
        assert len(SOURCES["folder"](path=str(tmp_path / "set"), splits={})) == len(names)


@pytest.mark.parametrize(
    ("names", "splits", "train", "classes", "left_out"),
    [
        (["car/1.png", "train/1.png"], {}, 2, ("car", "train"), 0),
        (["train/train/1.png", "test/train/1.png"], {"train": "train", "test": "test"}, 1, ("train",), 0),
        (["a1/x/1.png", "a2/y/1.png", "b/x/1.png"], {"train": ["a1", "a2"], "test": "b"}, 2, ("x", "y"), 0),
        (["w/a/x/1.png", "w/b/x/1.png"], {"train": "a"}, 1, ("x",), 1),
        (["w/a/x/1.png", "w/b/x/1.png"], {"train": "w/a/", "validation": "w\\b"}, 1, ("x",), 0),
    ],
)
def test_splits_as_the_config_says(build, names, splits, train, classes, left_out):
    source = build(_files(*names))(splits=splits)
    assert (len(source), source.class_names) == (train, classes)
    assert source.left_out == ({"images outside config.data.splits": left_out} if left_out else {})


def test_splits_that_are_not_there(build):
    open_ = build(_files("a/1.png", "b/1.png"))
    with pytest.raises(ValueError, match=r"splits\['test'\] is 'c', where no image lies; there are 'a', 'b'"):
        open_(splits={"train": "a", "test": "c"})
    with pytest.raises(ValueError, match="gives 'a' to two splits"):
        open_(splits={"train": "a", "test": "a"})
    for splits in ("a", {"train": 3}, {"train": ["a", 3]}, ["a"]):
        with pytest.raises(ValueError, match=r"config.data.splits=.*; expected {split: folder or folders}"):
            open_(splits=splits)


def test_a_class_of_another_case_in_another_split(tmp_path):
    path = write(tmp_path / "set", _files("train/Cat/1.png", "train/dog/1.png", "test/cat/1.png"))
    with pytest.raises(ValueError, match="'cat' and 'Cat' are one class in two splits"):
        SOURCES["folder"](path=path)
    letters = SOURCES["folder"](path=write(tmp_path / "b", _files("train/A/1.png", "train/a/1.png", "test/a/1.png")))
    assert letters.class_names == ("A", "a")


ROWS = [{"file_name": "1.png", "text": "a"}, {"file_name": "2.png", "text": "b"}]


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        ({"metadata.jsonl": _lines(*({"file_name": f"{s}/1.png"} for s in ("Train", "Test")))}, "Train/1.png", "Test/1.png"),
        ({"d/metadata.jsonl": _lines(*({"file_name": f"{s}/1.png"} for s in ("train", "eval")))}, "d/train/1.png", "d/eval/1.png"),
        ({f"d/{s}/metadata.jsonl": _lines({"file_name": "1.png"}) for s in ("training", "test")}, "d/training/1.png", "d/test/1.png"),
        ({"metadata.csv": "file_name,split\n1.png,Training\n2.png,testing\n"}, "1.png", "2.png"),
        ({"metadata.tsv": "split\tfile_name\r\ntrain\ta\\1.png\r\ntest\t./a/2.png\r\n"}, "a/1.png", "a/2.png"),
        ({"d/dataset.json": json.dumps({"labels": [["train/1.png", 0], ["test/1.png", 1]]})}, "d/train/1.png", "d/test/1.png"),
        ({f"{s}/dataset.json": json.dumps({"labels": [["1.png", 0]]}) for s in ("train", "test")}, "train/1.png", "test/1.png"),
        ({"dataset.json": json.dumps({"labels": None})}, "train/1.png", "test/1.png"),
    ],
)  # fmt: skip
def test_splits_in_metadata(build, files, train, test):
    open_ = build(files | _files(train, test))
    assert (open_("train").names, open_("test").names) == ([train], [test])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.jsonl": _lines({"file_name": "1.png", "split": "test"}, {"file_name": "2.png"})}, "'2.png' has no split"),
        ({"metadata.jsonl": _lines({"file_name": "1.png", "split": 3})}, "jsonl:1: the split 3 is not text"),
        ({"metadata.csv": "file_name,split\n1.png,val\n2.png,dev\n"}, "'val' and 'dev' mean the same split 'val'"),
        ({"metadata.csv": "file_name,set\n1.png,train\n2.png,test\n"}, r"'set' names splits \(test, train\); expected .*'split'"),
        ({"metadata.csv": "image,text\n1.png,a\n"}, "csv:1: expected a header with file_name .*met image, text"),
        ({"metadata.csv": "file_name,text,text\n1.png,a,b\n"}, "csv:1: .*met 'text' twice"),
        ({"metadata.csv": "file_name,text\n1.png,a,b\n"}, "csv:2: 3 cells; the header has 2"),
        ({"metadata.csv": 'file_name,text\n1.png,"a\n'}, "csv:2: not a table"),
        ({"metadata.csv": "file_name\n1.png\n", "metadata.jsonl": _lines(*ROWS)}, "there is metadata.csv beside it"),
        ({"metadata.jsonl": ""}, "metadata.jsonl: lists no image"),
        ({"metadata.jsonl": _lines({"file_name": "1.png", "label": 10**9})}, r"label 1000000000 is out .*expected 0\.\.1048575"),
        ({"metadata.jsonl": _lines({"file_name": "1.png", "label": "a"}, {"file_name": "2.png"})}, "'2.png' has no label while"),
        ({"metadata.jsonl": "[" * 100_000}, "jsonl:1: not valid JSON"),
        ({"metadata.parquet": "PAR1"}, "metadata.parquet: cannot be read; expected metadata.jsonl, metadata.csv"),
        ({"dataset.json": "{}", "metadata.jsonl": _lines(*ROWS)}, "dataset.json: there is metadata.jsonl besides"),
        ({"dataset.json": '{"images": [], "dataset": "coco"}'}, r"expected EDM's {'labels': .*; met images, dataset"),
        ({"metadata.jsonl": _lines(*ROWS), "classes.json": '{"names": ["a"]}'}, "classes.json: expected 'labels', a list"),
        ({"metadata.jsonl": _lines({"file_name": "C:\\1.png"})}, r"the path 'C:\\1.png' leads out"),
        ({"metadata.jsonl": _lines({"file_name": "a\0.png"})}, "leads out"),
    ],
)  # fmt: skip
def test_bad_metadata_is_named(build, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(files | _files("1.png", "2.png"))()
    assert "\n" not in str(caught.value)


def test_names_in_metadata_may_be_written_on_another_system(build):
    """macOS takes accents off their letters in the names of files."""
    files = {"a/cafe\u0301.png": PICTURE, "metadata.jsonl": _lines({"file_name": "a\\caf\u00e9.png"})}
    assert build(files)().names == ["a/cafe\u0301.png"]


def test_labels_of_a_table_are_numbers_where_all_are(build):
    names = _files("1.png", "2.png")
    source = build(names | {"metadata.csv": "file_name,label\n1.png,2\n2.png,0\n"})()
    assert (source.labels.tolist(), source.class_names) == ([2, 0], ("0", "1", "2"))
    source = build(names | {"metadata.csv": "file_name,label\n1.png,tabby\n2.png,0\n"})()
    assert (source.labels.tolist(), source.class_names) == ([1, 0], ("0", "tabby"))


def test_class_names_beside_metadata_below_one_folder(build):
    files = {"d/metadata.jsonl": _lines({"file_name": "1.png", "label": 1}), "d/classes.json": '["x", "y"]'}
    assert build(files | _files("d/1.png"))().class_names == ("x", "y")


def test_what_is_left_out_is_counted_by_kind(build):
    names = ["cat/1.PNG", "cat/2.jfif", "dog/3.JPE", "dog/4.avif", "dog/5.jp2", "dog/6.pgm", "dog/7.TGA"]
    source = build(
        _files(*names) | {"dog/8.heic": b"x", "dog/9.HEIC": b"x", "dog/a.pdf": b"x", "dog/b.eps": b"x", "LICENSE": "x"}
    )()
    assert len(source) == 7
    assert source.left_out == {".heic": 2, ".pdf": 1, ".eps": 1, "files without an extension": 1}
    source = build(_files("1.png", "2.png", "3.png") | {"metadata.jsonl": _lines(*ROWS)})()
    assert source.left_out["images that the metadata does not list"] >= 1


@pytest.mark.parametrize("name", ["Screenshot 2016-01-11 21:37:54.png", "cat/12:00.png", "C:evil.png"])
def test_a_colon_leads_nowhere(build, name):
    assert build(_files(name) | {"metadata.jsonl": _lines({"file_name": name})})().names == [name]


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    root = tmp_path / "home" / "set"
    write(root, _files("train/cat/1.png", "test/cat/2.png"))
    write(tmp_path / "pool", _files("3.png", "4.png"))
    write(tmp_path / "home" / "other", _files("5.png"))
    for link, target in {
        "train/dog": tmp_path / "pool",  # elsewhere: a class like any other
        "train/cat/all": root,  # a parent
        "train/up": tmp_path,  # what the set itself lies in
        "train/again": root / "train" / "cat",  # a sibling
        "train/loop": root / "train" / "loop",  # itself: no folder
    }.items():
        os.symlink(target, root / link)
    os.symlink(root, tmp_path / "pool" / "back")
    source = SOURCES["folder"](path=str(root))
    assert source.names == ["train/cat/1.png", "train/dog/3.png", "train/dog/4.png"]
    assert source.left_out["links to folders that are read already"] == 4


def test_a_pipe_is_no_image(tmp_path):
    write(tmp_path, _files("1.png"))
    os.mkfifo(tmp_path / "2.png")
    assert SOURCES["folder"](path=str(tmp_path)).names == ["1.png"]
