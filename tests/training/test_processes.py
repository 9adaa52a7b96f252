"""Training and evaluation over two real processes: the numbers of one, and a checkpoint that moves between the two."""

import json
import shutil

import numpy as np
import pytest

from ldm_jax.evaluation import statistics
from ldm_jax.runs import checkpoint
from ldm_jax.runs.log import read_metrics
from ldm_jax.training.loop import train
from tests.finished import finished
from tests.processes import run_two
from tests.training import evaluated, tiny
from tests.training.test_resume import stored

RUN = "tests.training.run_process"


def forget(workdir, step):
    """What a run killed right after `step` leaves behind."""
    for later in checkpoint.steps(workdir):
        if later > step:
            shutil.rmtree(checkpoint.folder(workdir) / str(later))


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(np.float64(a[name]), np.float64(b[name]), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_each_goes_on_from_the_other(tmp_path):
    one, two, moved, back = (tmp_path / name for name in ("one", "two", "moved", "back"))
    finished(tiny.config(), one)
    shutil.copytree(one, back)
    forget(back, 8)
    # Damaged, so that both processes must agree to pass over it and to write it anew.
    meta = checkpoint.folder(one) / "12" / "meta" / "metadata"
    shutil.copytree(checkpoint.folder(one) / "12", checkpoint.folder(back) / "12")
    (checkpoint.folder(back) / "12" / "meta" / "metadata").write_text(json.dumps({"images": 0}) + meta.read_text())
    run_two("-m", RUN, str(two), str(back))
    assert_close(stored(one, 12), stored(two, 12))
    assert checkpoint.damage(checkpoint.folder(two) / "12") is None
    rows = [row for row in read_metrics(two / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]  # one process writes, and each line once

    expected = evaluated.figures(two, tmp_path / "evaluated", "one")
    for rank in range(2):
        found = json.loads((two / f"{rank}.json").read_text())
        assert found["machine"].endswith("x2") and found.keys() == expected.keys()
        assert expected["images of a device"] == [64, 5] and found["images of a device"] == [32, 3]
        # The batches are 64, 64 and 5 rows for one process; for two the last one is filled up to 6.
        assert (expected["decoded"], found["decoded"]) == (133, 67), "each process decodes its own rows alone"
        for key in expected.keys() - {"machine", "images of a device", "decoded"}:
            if not isinstance(expected[key], str):
                np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-6, err_msg=key)
    (one_file,), (two_file,) = ([*folder.glob("*.npz")] for folder in (tmp_path / "evaluated", two / "evaluated"))
    assert one_file.name == two_file.name
    for a, b in zip(statistics.read(one_file), statistics.read(two_file)):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)

    shutil.copytree(two, moved)
    forget(moved, 8)
    assert train(tiny.config(), moved, quiet=True)["finished"]  # written by two, read by one
    assert_close(stored(one, 12), stored(moved, 12))

    assert_close(stored(one, 12), stored(back, 12))  # written by one, read by two
    assert checkpoint.damage(checkpoint.folder(back) / "12") is None
