"""Our preparation of CIFAR-10 from an archive of the official layout, and reading it by TFDS without TensorFlow."""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from ldm_jax.data import SOURCES, cifar10

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PER_BATCH = 40


def _old_pickle(content) -> bytes:
    """As Python 2 and an old numpy wrote it: protocol 2 and numpy's former module name."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def _archive(path, batches: dict[str, object]) -> str:
    """Writes the tar; returns its MD5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in batches.items():
            data = content if isinstance(content, bytes) else _old_pickle(content)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return hashlib.md5(path.read_bytes()).hexdigest()


def _batches() -> dict[str, object]:
    rng = np.random.default_rng(0)
    content: dict[str, object] = {"batches.meta": {"label_names": NAMES, "num_vis": 3072}, "readme.html": b"hello"}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (PER_BATCH, 3072)).astype(np.uint8)
        labels = [i % 10 for i in range(PER_BATCH)]
        content[name] = {"batch_label": name, "labels": labels, "data": data, "filenames": ["x.png"] * PER_BATCH}
    return content


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    batches = _batches()
    md5 = _archive(folder / "cifar-10-python.tar.gz", batches)
    cifar10.prepare(str(folder / "cifar-10-python.tar.gz"), str(folder / "out"), md5)
    return folder / "out", batches


def _image(batches, name: str, row: int) -> np.ndarray:
    return batches[name]["data"][row].reshape(3, 32, 32).transpose(1, 2, 0)


def test_prepared_splits_hold_every_image(prepared):
    folder, batches = prepared
    sources = {s: SOURCES["cifar10"](split=s, data_dir=str(folder), val_per_class=5) for s in ("train", "val", "test")}
    assert {s: len(v) for s, v in sources.items()} == {"train": 150, "val": 50, "test": 40}
    assert sources["train"].class_names == tuple(NAMES)
    found = {
        s: {(x["image"].tobytes(), int(x["label"])) for x in map(v.__getitem__, range(len(v)))}
        for s, v in sources.items()
    }
    tests = {(_image(batches, "test_batch", i).tobytes(), i % 10) for i in range(PER_BATCH)}
    train = {(_image(batches, f"data_batch_{b}", i).tobytes(), i % 10) for b in range(1, 6) for i in range(PER_BATCH)}
    assert found["test"] == tests and found["train"] | found["val"] == train and not found["train"] & found["val"]
    # The last five of each class in the archive's order: all four of batch 5 and the last one of batch 4.
    tail = {(_image(batches, "data_batch_5", i).tobytes(), i % 10) for i in range(40)}
    tail |= {(_image(batches, "data_batch_4", i).tobytes(), i % 10) for i in range(30, 40)}
    assert found["val"] == tail


def test_the_official_name_reads_it_without_tensorflow(prepared):
    code = f"""
import sys, tensorflow_datasets as tfds
train = tfds.data_source('cifar10', data_dir={str(prepared[0])!r}, split='train[:50%]')
row = train[0]
print(len(train), row['image'].shape, row['image'].dtype, sorted(row), 'tensorflow' in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "100 (32, 32, 3) uint8 ['id', 'image', 'label'] False"


def test_any_data_source(prepared):
    folder, _ = prepared
    block = {"dataset": "cifar10", "data_dir": str(folder), "splits": {"train": "train[:90%]", "val": "train[90%:]"}}
    train, val = SOURCES["tfds"](split="train", **block), SOURCES["tfds"](split="val", **block)
    assert (len(train), len(val), train.num_classes) == (180, 20, 10)
    assert SOURCES["tfds"](split="train", text="id", **block)[0]["text"].startswith("train_")
    assert SOURCES["tfds"](split="train", label="", **block).num_classes == 0
    assert train.fingerprint() != val.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "val"}, "no split 'val'; there are train, test|no split 'val'; there are test, train"),
        ({"image": "img"}, "no feature 'img'; there are id, image, label"),
        ({"label": "id"}, "feature 'id' is no ClassLabel"),
        ({"dataset": "cifar11"}, "tfds/cifar11/train: no such data set"),
        ({"dataset": "mnist"}, "tfds/mnist/train: is not prepared|tfds/mnist/train: no such data set"),
        ({"val_from_train": 20}, "val_from_train=20, but class 0 has 20 images"),
    ],
)
def test_bad_requests(prepared, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        SOURCES["tfds"](**{"split": "train", "dataset": "cifar10", "data_dir": str(prepared[0]), **change})
    assert "\n" not in str(caught.value)


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_3": _old_pickle(_Evil())}, "data_batch_3: cannot be read as CIFAR-10 .*builtin.*print"),
        ({"data_batch_3": b"junk"}, "data_batch_3: cannot be read as CIFAR-10"),
        ({"data_batch_3": None}, "'cifar-10-batches-py/data_batch_3' is not in it"),
        (
            {"test_batch": {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}},
            r"test_batch: label 10 is out of range",
        ),
        ({"test_batch": {"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}}, r"test_batch: 'data' is not u8"),
        ({"test_batch": {"data": np.zeros((2, 3072), np.uint8), "labels": [0]}}, "'labels' is not a list of 2"),
    ],
)
def test_a_bad_archive_is_refused_before_anything_is_written(tmp_path, change, message, capsys):
    batches = {k: v for k, v in {**_batches(), **change}.items() if v is not None}
    path = tmp_path / "a.tar.gz"
    md5 = _archive(path, batches)
    with pytest.raises(ValueError, match=message):
        cifar10.prepare(str(path), str(tmp_path / "out"), md5)
    assert not (tmp_path / "out").exists() and "executed" not in capsys.readouterr().out


def test_the_published_hash_is_asked_for(tmp_path, capsys):
    path = tmp_path / "a.tar.gz"
    _archive(path, _batches())
    assert cifar10.main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert "expected c58f30108f718f92721af3b95e74349a" in capsys.readouterr().err
    assert cifar10.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "none" in capsys.readouterr().err and not (tmp_path / "out").exists()
