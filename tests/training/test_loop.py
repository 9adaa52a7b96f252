"""The loop's promises to its user: what is refused, what is said, what is kept."""

import json

import absl.logging
import jax
import numpy as np
import pytest

from ldm_jax import runs
from ldm_jax.config import config_file
from ldm_jax.kernels import mesh
from ldm_jax.runs import checkpoint, lock, record
from ldm_jax.runs.log import read_metrics
from ldm_jax.training import experiment, loop
from tests import finished as store
from tests.training import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    result = store.finished(tiny.config(), workdir)
    return workdir, result


def test_a_run_leaves_what_is_promised(finished):
    workdir, result = finished
    assert result["finished"] and result["step"] == 12
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "images", "learning_rate", "grad_norm", "images_per_second", "data_wait"} <= rows[2].keys()
    assert "val_loss" in rows[-1] and "val_psnr" in rows[-1]
    assert list((workdir / "events").glob("events.out.tfevents.*"))
    assert (workdir / "pictures" / "data.png").exists()
    assert json.loads((workdir / "config.json").read_text())["train"]["images"] == 96


def test_restoring_warns_of_nothing(finished, caplog):
    workdir, _ = finished
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.WARNING)
    try:
        with caplog.at_level("WARNING"), caplog.at_level("WARNING", "absl"):
            for restore in (checkpoint.restore_params, checkpoint.restore_variables):
                restore(workdir, 12)
    finally:
        absl.logging.set_verbosity(verbosity)
    assert not caplog.records


def test_tensorboard_reads_the_events(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir, _ = finished
    events = EventAccumulator(str(workdir / "events")).Reload()
    losses = {row["step"]: row["loss"] for row in read_metrics(workdir / "metrics.jsonl")}
    read = {e.step: e.value for e in events.Scalars("loss")}
    assert read.keys() == losses.keys()
    np.testing.assert_allclose([read[s] for s in losses], list(losses.values()), rtol=1e-6)
    assert "reconstructions" in events.Tags()["images"]


def test_repeating_a_finished_run_does_nothing(finished, capsys):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert loop.train(tiny.config(), workdir)["finished"]
    assert "finished" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_config_in_the_same_folder_is_refused_with_the_difference(finished):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"train.batch_size: 8 there, 4 here"):
        loop.train(tiny.config(batch_size=4), workdir)
    assert (workdir / "config.json").read_text() == before
    # What changes no number may change.
    loop.train(tiny.config(log_every=8), workdir, quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    c = tiny.config()
    with c.unlocked():
        c.optimizer.update(learning_rate=1e30, clip_norm=0.0, name="sgd")
    with pytest.raises(loop.Stopped, match=r"steps? \d+.*(none was saved yet|last good checkpoint)"):
        loop.train(c, tmp_path, quiet=True)
    assert checkpoint.steps(tmp_path) == []


def test_rows_that_fill_up_do_not_count_in_validation():
    rows = np.float32([1, 2, 3, 4, 5, 6, 7, 100])
    batches = [{"x": rows[:4], "valid": np.ones(4, bool)}, {"x": rows[4:], "valid": np.arange(4) < 3}]
    values = loop.run_validation(
        lambda params, frozen, batch, key: {"val_loss": params * batch["x"]}, batches, 2.0, {}, mesh.make_mesh(), 0
    )
    assert values == {"val_loss": 2 * rows[:7].mean()}


def test_a_task_that_depends_on_another_network_does_not_go_on(tmp_path, monkeypatch):
    made = loop.build.task
    for images, sha256 in ((8, "a" * 64), (16, "a" * 64), (24, "b" * 64)):
        facts = {"perceptual.name": sha256}
        monkeypatch.setattr(loop.build, "task", lambda *args, facts=facts: made(*args)._replace(facts=facts))
        if sha256[0] == "a":
            assert loop.train(tiny.config(images=images), tmp_path, quiet=True)["finished"]
    with pytest.raises(
        ValueError, match=r"with another network in config\.task\.perceptual\.name \(aaaaaaaaaaaa, now bb"
    ):
        loop.train(tiny.config(images=24), tmp_path, quiet=True)


def test_a_folder_in_use_is_refused(tmp_path):
    with lock.only_one(tmp_path), pytest.raises(ValueError, match="in use"):
        loop.train(tiny.config(), tmp_path, quiet=True)


def test_a_full_disk_is_said_in_one_line_and_harms_nothing(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    store.finished(tiny.config(), tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(loop.Stopped, match=r"No space left.*newest checkpoint is still step 12"):
        loop.train(tiny.config(images=128), tmp_path, quiet=True)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) == 12


def test_starting_from_another_runs_parameters(finished, tmp_path):
    workdir, _ = finished
    c = tiny.config(images=8)
    with c.unlocked():
        c.init_from.workdir = str(workdir)
        c.optimizer.learning_rate = 0.0
    loop.train(c, tmp_path, quiet=True)
    given = checkpoint.restore_params(workdir, 12, "100")
    got = checkpoint.restore_params(tmp_path, 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, given, got))


def test_parameters_of_another_shape_are_refused(finished, tmp_path):
    workdir, _ = finished
    c = tiny.config()
    with c.unlocked():
        c.init_from.workdir = str(workdir)
        c.model.block_out_channels = (4, 8)
    with pytest.raises(ValueError, match="other parameters"):
        loop.train(c, tmp_path, quiet=True)
    assert not [*tmp_path.iterdir()], "seen before anything is written or trained"


def test_restoring_names_the_averages_and_steps_that_there_are(finished):
    workdir, _ = finished
    with pytest.raises(ValueError, match="no average '7'; it has 100, 1000"):
        checkpoint.restore_params(workdir, 12, "7")
    with pytest.raises(ValueError, match="no checkpoint of step 5; it has 8, 12"):
        checkpoint.pick(workdir, 5)
    with pytest.raises(FileNotFoundError, match="is not a run"):
        experiment.of_run(workdir / "nowhere")


def test_the_step_compiles_once(tmp_path):
    c = tiny.config(images=16, checkpoint_every=0)
    traced = []
    from ldm_jax.training.tasks.autoencoder import step

    original = step.psnr

    def counted(x, y):
        traced.append(1)
        return original(x, y)

    step.psnr = counted
    try:
        loop.train(c, tmp_path, quiet=True)
    finally:
        step.psnr = original
    assert 1 <= len(traced) <= 2, "the training step is traced once (the gradient twice over it at most)"


def test_a_config_that_was_refused_may_be_put_right(tmp_path):
    wrong = tiny.config(images=16).unlock()
    wrong.task.reconstruction = "l3"
    with pytest.raises(ValueError, match="l3"):
        loop.train(wrong.lock(), tmp_path, quiet=True)
    assert loop.train(tiny.config(images=16), tmp_path, quiet=True)["finished"]


def test_a_run_from_before_a_key_there_is_now_loads_and_goes_on(finished, tmp_path):
    """What base.py has gained since a run was started has its default there: it samples, and is no change of config."""
    old = json.loads((finished[0] / "config.json").read_text())
    keys = (("sampler", "threshold_options"), ("init_from", "file"), ("mesh", "min_size"), ("train", "keep_every"))
    for block, key in keys:
        del old[block][key]
    del old["first_stage"]
    old["task"]["name"] = "distill"
    (tmp_path / "config.json").write_text(json.dumps(old))
    config, base = runs.read(tmp_path).config, config_file.base()
    assert config.first_stage == base.first_stage
    assert all(config[block][key] == base[block][key] for block, key in keys)
    assert config.task.name == "tiny_autoencoder"
    old["task"]["name"] = "autoencoder"
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert not record.changes(tmp_path, tiny.config())
