"""A run that is killed and started again ends in the same bits as the run never interrupted."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ldm_jax.runs import checkpoint
from ldm_jax.runs.log import read_metrics
from ldm_jax.training.loop import train
from tests.finished import finished
from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[2]


def start(workdir, images):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.run_tiny", str(workdir), str(images)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stored(workdir, step):
    """Every array of a checkpoint, by path."""
    import orbax.checkpoint as ocp

    path = checkpoint.folder(workdir) / str(step) / "state"
    handler = ocp.PyTreeCheckpointer()
    # As numpy, whatever devices and processes wrote it.
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).item_metadata.tree)
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name], equal_nan=True), name


def wait_for(condition, process, seconds=240):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_with_sigkill_and_started_again_is_bit_for_bit_the_uninterrupted_run(tmp_path):
    images = 240
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny.config(images=images), whole, quiet=True)
    for steps in (4, 12):
        process = start(broken, images)
        wait_for(lambda steps=steps: max(checkpoint.steps(broken), default=0) >= steps, process)
        process.kill()
        process.wait()
    assert max(checkpoint.steps(broken)) < 30
    last = start(broken, images)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    assert_same_bits(stored(whole, 30), stored(broken, 30))

    rows = [row for row in read_metrics(broken / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    losses = {row["step"]: row["loss"] for row in read_metrics(whole / "metrics.jsonl")}
    assert {row["step"]: row["loss"] for row in rows} == losses


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_0_and_the_rest_is_the_same(tmp_path):
    images = 4000
    process = start(tmp_path / "run", images)
    wait_for(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "run the same command again" in output
    step = checkpoint.newest(tmp_path / "run")
    assert 0 < step < 500
    # The same steps without a stop.
    train(tiny.config(images=8 * step), tmp_path / "straight", quiet=True)
    ours, theirs = stored(tmp_path / "run", step), stored(tmp_path / "straight", step)
    assert_same_bits(ours, theirs)


def test_stopping_halfway_and_resuming_in_process_gives_the_same_bits(tmp_path, monkeypatch):
    finished(tiny.config(), tmp_path / "whole")

    class Killed(BaseException):
        pass

    from ldm_jax.training import loop

    real = loop.checkpoint.Writer.save

    def save_then_die(self, state, meta):
        real(self, state, meta)
        if int(state.step) == 8:
            raise Killed

    monkeypatch.setattr(loop.checkpoint.Writer, "save", save_then_die)
    with pytest.raises(Killed):
        train(tiny.config(), tmp_path / "broken", quiet=True)
    monkeypatch.undo()
    train(tiny.config(), tmp_path / "broken", quiet=True)
    assert_same_bits(stored(tmp_path / "whole", 12), stored(tmp_path / "broken", 12))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys):
    finished(tiny.config(), tmp_path)
    assert checkpoint.steps(tmp_path) == [12, 8]
    expected = stored(tmp_path, 12)
    file = max(
        (p for p in (checkpoint.folder(tmp_path) / "12").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    result = train(tiny.config(), tmp_path, quiet=True)
    said = capsys.readouterr().out
    assert "12 is damaged" in said and "differs from its sha256" in said
    assert result["finished"] and checkpoint.newest(tmp_path) == 12
    assert_same_bits(expected, stored(tmp_path, 12))


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    finished(tiny.config(), tmp_path)
    os.remove(checkpoint.folder(tmp_path) / "12" / checkpoint.MANIFEST)
    warned = []
    assert checkpoint.newest(tmp_path, warn=warned.append) == 8
    assert "interrupted" in warned[0]


def test_old_steps_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    config = tiny.config()
    with config.unlocked():
        config.train.keep = 1
    real = checkpoint.write_manifest

    class Killed(BaseException):
        pass

    def die(path):
        if path.name == "12":
            raise Killed
        real(path)

    monkeypatch.setattr(checkpoint, "write_manifest", die)
    with pytest.raises(Killed):
        train(config, tmp_path, quiet=True)
    assert checkpoint.newest(tmp_path, warn=lambda text: None) == 8
    monkeypatch.undo()
    assert train(config, tmp_path, quiet=True)["finished"]
    assert checkpoint.steps(tmp_path) == [12]


def test_a_run_whose_every_checkpoint_is_damaged_is_not_begun_anew(tmp_path):
    finished(tiny.config(), tmp_path)
    for step in (8, 12):
        (checkpoint.folder(tmp_path) / str(step) / "meta" / "metadata").write_text("{}")
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"every checkpoint \(12, 8\) is damaged"):
        train(tiny.config(), tmp_path, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_sigterm_before_the_first_step_leaves_with_a_message(tmp_path, monkeypatch, capsys):
    from ldm_jax.training import loop

    real = loop.build.data

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop.build, "data", interrupted)
    assert train(tiny.config(), tmp_path, quiet=True) == {"step": 0, "finished": False}
    assert "run the same command again" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(tiny.config(), tmp_path, quiet=True)["finished"]


def test_metrics_past_the_checkpoint_are_rewound(tmp_path):
    finished(tiny.config(), tmp_path)
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as f:
        f.write(json.dumps({"step": 14, "loss": 1.0}) + "\n" + '{"step": 15, "lo')
    from ldm_jax.runs.log import rewind

    rewind(path, 12)
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 6, 8, 10, 12]
