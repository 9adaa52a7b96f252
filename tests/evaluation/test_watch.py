"""Following a training: each checkpoint once, and the best of them kept."""

import json
import os
import pathlib
import shutil

import pytest

from ldm_jax.evaluation import watch
from ldm_jax.evaluation.metrics import Figure
from ldm_jax.evaluation.table import METRICS, choices
from ldm_jax.runs import checkpoint
from tests.evaluation.fake import config
from tests.training import tiny


def saved(workdir, step, content=b"x"):
    """A folder like a checkpoint's, with its manifest."""
    folder = checkpoint.folder(workdir) / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "data").write_bytes(content + str(step).encode())
    checkpoint.write_manifest(folder)


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(tiny.config().to_json())
    (tmp_path / "dataset.json").write_text("{}")
    for step in (4, 8):
        saved(tmp_path, step)
    return tmp_path


def keep(workdir, step, value, **origin):
    origin = {"num": 8, "step": step, "checkpoint": f"sha{step}", **origin}
    held = watch.hold(workdir, config(), step)
    try:
        return watch.keep_if_best(held, origin | {"fid": value}, origin, Figure("fid"))
    finally:
        watch.drop(workdir)


def kept(workdir):
    row = json.loads((workdir / "best" / "row.json").read_text())
    assert checkpoint.steps(workdir / "best") == [row["step"]]
    assert checkpoint.damage(checkpoint.folder(workdir / "best") / str(row["step"])) is None
    assert json.loads((workdir / "best" / "config.json").read_text())["task"]["name"] == "autoencoder"
    return row["step"], row["fid"]


def test_the_best_checkpoint_is_copied_and_training_loses_nothing(workdir):
    assert not keep(workdir, 4, float("nan")) and not (workdir / "best").exists()
    assert keep(workdir, 4, 9.0) and kept(workdir) == (4, 9.0)
    assert not keep(workdir, 8, 9.5) and kept(workdir) == (4, 9.0)
    assert keep(workdir, 8, 7.0) and kept(workdir) == (8, 7.0)
    assert not keep(workdir, 4, 8.0), "restarted: what is kept stays"
    assert keep(workdir, 4, 8.0, num=99) and kept(workdir) == (4, 8.0), "figures of other settings are no rivals"
    assert checkpoint.steps(workdir) == [8, 4] and all(wrong is None for _, wrong in checkpoint.intact(workdir))
    with pytest.raises(ValueError, match="--keep-best=fod is no figure of this evaluation; there are fid"):
        watch.keep_if_best(workdir / "best" / "held", {"step": 4, "fid": 1.0}, {}, Figure("fod"))


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_held_outlives_what_training_removes(workdir, monkeypatch, links):
    def link(*_):
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", link)
    watch.hold(workdir, config(), 4)  # by a --watch that was killed
    held = watch.hold(workdir, config(), 8)
    assert checkpoint.steps(held) == [8]
    pruned = checkpoint.folder(workdir) / "8"
    assert (pruned / "state" / "data").stat().st_nlink == (2 if links else 1)
    shutil.rmtree(pruned)
    assert checkpoint.damage(pruned) == "it is gone"
    assert watch.keep_if_best(held, {"step": 8, "fid": 1.0}, {}, Figure("fid"))
    watch.drop(workdir)
    assert kept(workdir) == (8, 1.0) and not held.exists()


def test_a_checkpoint_that_vanishes_while_it_is_held_leaves_the_old_best(workdir, monkeypatch):
    assert keep(workdir, 4, 9.0)
    copytree = shutil.copytree

    def pruned(there, here, *rest, **more):
        copytree(there, here, *rest, **more)
        (pathlib.Path(here) / "data").unlink(missing_ok=True)

    monkeypatch.setattr(shutil, "copytree", pruned)
    with pytest.raises(ValueError, match="could not be held"):
        keep(workdir, 8, 1.0)
    watch.drop(workdir)
    assert kept(workdir) == (4, 9.0)
    assert sorted(path.name for path in (workdir / "best").iterdir()) == [
        "checkpoints",
        "config.json",
        "dataset.json",
        "row.json",
    ]


def test_each_checkpoint_is_handed_out_once_until_the_last(workdir, monkeypatch):
    said, c = [], config()
    last = 12  # 96 images in batches of 8
    (checkpoint.folder(workdir) / "10" / "state").mkdir(parents=True)  # being written: no manifest yet
    (checkpoint.folder(workdir) / "10" / "state" / "data").write_bytes(b"half")

    def pause(seconds):
        saved(workdir, last)
        checkpoint.write_manifest(checkpoint.folder(workdir) / "10")

    monkeypatch.setattr(watch.time, "sleep", pause)
    result = watch.new_steps(workdir, c, said.append)
    assert next(result) == 4
    (checkpoint.folder(workdir) / "8" / "state" / "data").write_bytes(b"flipped")
    assert list(result) == [10, 12] and said == ["checkpoint 8 is left out: state/data differs from its sha256"]


def test_a_row_with_the_same_origin_is_known_again(workdir):
    origin = {"num": 8, "step": 4, "options": {"eta": 0}, "prompts": ["a"]}
    lines = [{"step": 4, "loss": 1.0}, origin | {"fid": 2.0}, origin | {"num": 9, "fid": 3.0}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert watch.earlier(workdir, origin)["fid"] == 2.0
    assert watch.earlier(workdir, origin | {"num": 10}) is None


def test_which_way_a_figure_is_better():
    higher = {
        "accuracy",
        "psnr",
        "ssim",
        "recall_inception",
        "inception_score",
        "shapes_both",
        "clip_score",
        "precision_inception",
    }
    lower = {"fid", "fd_classifier", "kid", "lpips", "rfid", "bits", "cmmd", "copied"}
    figures = choices(METRICS, ["inception", "classifier", "clip"])
    assert {name for name in higher | lower if figures[name].higher} == higher
    assert set(METRICS) >= {"fid", "sfid", "bits", "neighbours"}
