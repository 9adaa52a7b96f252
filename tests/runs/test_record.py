"""A run goes on with the config it was started with, or with a longer one."""

import json

import pytest

from ldm_jax.runs import checkpoint, record
from ldm_jax.training.loop import train
from tests.finished import finished
from tests.training import tiny
from tests.training.test_resume import assert_same_bits, stored


def test_a_finished_run_that_is_made_longer_ends_in_the_bits_of_one_that_was_as_long_from_the_start(tmp_path):
    finished(tiny.config(), tmp_path / "whole")
    short = train(tiny.config(images=40), tmp_path / "longer", quiet=True)
    assert short == {**short, "step": 5, "finished": True}
    longer = train(tiny.config(), tmp_path / "longer", quiet=True)
    assert longer["step"] == 12 and longer["finished"]
    assert_same_bits(stored(tmp_path / "whole", 12), stored(tmp_path / "longer", 12))
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["train"]["images"] == 96


def with_checkpoint(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(record.as_json(config)))
    checkpoint.folder(tmp_path).joinpath("5").mkdir(parents=True)


@pytest.mark.parametrize(
    "images, schedule, said",
    [
        (40, "constant", r"was started with config\.train\.images=96; expected at least as many, met 40"),
        (200, "cosine", r"cannot be made longer: config\.optimizer\.schedule='cosine' depends on the length"),
        (200, "linear", r"cannot be made longer: config\.optimizer\.schedule='linear' depends on the length"),
    ],
)
def test_a_run_that_cannot_be_as_long_is_refused(tmp_path, images, schedule, said):
    before, after = tiny.config().unlock(), tiny.config(images=images).unlock()
    before.optimizer.schedule = after.optimizer.schedule = schedule
    with_checkpoint(tmp_path, before)
    with pytest.raises(ValueError, match=said):
        record.write_or_compare(after, tmp_path, main=True)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["images"] == 96


def test_another_key_beside_the_length_is_refused(tmp_path):
    with_checkpoint(tmp_path, tiny.config())
    with pytest.raises(ValueError, match="was started with another config"):
        record.write_or_compare(tiny.config(images=200, batch_size=4), tmp_path, main=True)
