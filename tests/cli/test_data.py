"""`ldm data`, and `ldm train --dry-run`, which says the same."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax import cli
from ldm_jax.data import SOURCES
from ldm_jax.training import dataset, experiment, streams
from tests.data.sets import png, write
from tests.training import tiny

FILES = {
    f"{s}/{c}/{i}.png": png(40 * i, (8, 6)) for s in ("Train", "Val", "Test") for c in ("cat", "dog") for i in range(3)
}
FILES |= {
    "Train/cat/0.txt": "a cat\nanother",
    "Val/dog/1.png": b"broken",
    "Train/cat/x.heic": b"x",
    "Train/cat/y.HEIC": b"x",
}


@pytest.fixture
def config(tmp_path):
    """A config file over a small folder of images, and the folder."""
    folder = write(tmp_path / "set", FILES)
    (tmp_path / "config.py").write_text(
        "from configs import cifar10_classifier\n"
        "def get_config(arg=''):\n"
        "    c = cifar10_classifier.get_config('smoke')\n"
        f"    c.data = {{'name': 'folder', 'path': {folder!r}, 'skip_broken': True}}\n"
        "    c.model.update(num_classes=2, widths=(8,))\n"
        "    c.input.update(resolution=6, crop='adm', flip=True)\n"
        "    return c\n"
    )
    return tmp_path / "config.py"


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_read_is_said_and_shown(config, tmp_path, capsys, dry_run):
    picture = tmp_path / "new" / "data.png"
    words = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--dry-run={picture}"]
    assert cli.main(words if dry_run else ["data", str(config), f"--out={picture}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        f"data: {tmp_path / 'set'} (class folders): train 6 images, tune on val 5; also there: test 6; 2 classes; "
        "captions of 1 of 6 images, several of 1 (up to 2; one is drawn each time)",
        "data: left out: 2 .heic, 1 broken images of tune",
        "classes (train + tune): cat 3 + 3, dog 3 + 2",
        "caption: a cat",
    ]
    assert said[-1] == f"{picture}: 6 training images of 6 pixels; in training, each is mirrored half of the times"
    # The crop, enlarged by repeating pixels: three images in a row, two pixels apart.
    pixels = np.asarray(Image.open(picture))
    assert [int(pixels[10, 2 + 68 * i + 10, 0]) for i in range(3)] == [0, 40, 80]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data"], "expected one config file, as in: ldm data configs/quickstart.py"),
        (["data", "--config={config}", "--out=x.jpg"], "--out=x.jpg; expected"),
        (["data", "{config}", "--out=x.jpg"], "--out=x.jpg; expected a name that ends in .png"),
        (["data", "{config}", "--config.data.path={config}.zip"], "no data at '"),
        (["data", "{config}", "--config.split.tune=tune"], "no split 'tune'; there are test (6), train (6), val (6)"),
        (["train", "--config={config}", "--workdir=x", "--dry-run", "--config.train.images=0"], "train.images"),
    ],
)
def test_bad_input_is_one_line(config, words, said, capsys):
    assert cli.main([word.format(config=config) for word in words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_other_sources_are_said_too():
    config = experiment.parse(tiny.config())
    train, tune = (streams.source(config, role) for role in ("train", "tune"))
    assert dataset.lines(config, train, tune) == [
        "data: shapes/train: train 64 images, tune on val 64; 4 classes; captions"
    ]


def test_each_split_counts_its_broken_images(tmp_path):
    """A validation on fewer images than it should have was recorded as none skipped."""
    path = write(tmp_path / "set", FILES)
    train, tune = (SOURCES["folder"](split, path=path, skip_broken=True) for split in ("train", "val"))
    dataset.write(tmp_path, train, tune)
    assert json.loads((tmp_path / "dataset.json").read_text())["skipped"] == {"train": 0, "tune": 1}
