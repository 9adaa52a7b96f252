import pathlib
import sys

import pytest

from ldm_jax.sweeps import Plot, Range, Search, Study, evaluate_only, train_and_evaluate
from ldm_jax.sweeps.study import check, check_trainings, load_study, make_run, make_runs
from tests.sweeps.helpers import ROOT, fake

HERE = pathlib.Path("/somewhere")


def test_the_commands_are_those_of_the_console():
    commands = train_and_evaluate(
        "configs/x.py:smoke", evaluate=[{"metrics": "fid,accuracy", "num": 50}], fixed={"train.images": 10}
    )
    train, evaluate = commands({"optimizer.learning_rate": 1e-4, "model.name": "dit", "model.widths": [1, 2]}, HERE)
    assert train == [
        *[sys.executable, "-m", "ldm_jax", "train", "--config=configs/x.py:smoke", "--workdir=/somewhere"],
        *[
            "--config.train.images=10",
            "--config.optimizer.learning_rate=0.0001",
            "--config.model.name=dit",
            "--config.model.widths=[1, 2]",
        ],
    ]
    assert commands({"train.images": 5}, HERE)[0][-1] == "--config.train.images=5", "a run's own value counts"
    assert evaluate[3:] == ["evaluate", "--workdir=/somewhere", "--metrics=fid,accuracy", "--num=50"]
    (line,) = evaluate_only("runs/a", num=500)({"sampler": "heun", "guidance": 1.5}, HERE)
    assert line[3:] == ["evaluate", "--workdir=runs/a", "--num=500", "--sampler=heun", "--guidance=1.5"]


def test_ids_are_readable_stable_and_bound_to_what_is_run(tmp_path):
    study = Study("s", fake)
    run = make_run(study, {"optimizer.lr": 1e-3, "model.name": "a/b c"}, tmp_path)
    assert run.id.startswith("lr=0.001_name=a-b-c_")
    assert run.folder == tmp_path / "runs" / run.id
    assert make_run(study, {"optimizer.lr": 1e-3, "model.name": "a/b c"}, tmp_path / "moved").id == run.id
    assert make_run(study, {"other.lr": 1e-3, "model.name": "a/b c"}, tmp_path).id != run.id
    # Another evaluation keeps the trained folder but is not finished; another training gets another folder.
    one = make_run(Study("s", train_and_evaluate("c.py", [{"num": 1}])), {"lr": 1}, tmp_path)
    two = make_run(Study("s", train_and_evaluate("c.py", [{"num": 2}])), {"lr": 1}, tmp_path)
    three = make_run(Study("s", train_and_evaluate("d.py", [{"num": 1}])), {"lr": 1}, tmp_path)
    assert (one.id == two.id, one.fingerprint == two.fingerprint) == (True, False)
    assert one.id != three.id


def test_a_run_listed_twice_is_one_run(tmp_path):
    assert len(make_runs(Study("s", fake, [{"value": 1}, {"value": 2}, {"value": 1}]), tmp_path)) == 2


@pytest.mark.parametrize(
    "study, message",
    [
        (Study("a b", fake, [{}]), "name 'a b'"),
        (Study("s", fake), "neither"),
        (Study("s", fake, [{}], Search({"a": [1]}), objective="x"), "not both"),
        (Study("s", fake, [{}], direction="min"), "'min'"),
        (Study("s", fake, [{1: 2}]), "dotted keys"),
        (Study("s", fake, [{"a": object()}]), "values are"),
        (Study("s", fake, search=Search({"a": Range(0, 1)})), "objective"),
        (Study("s", fake, search=Search({}), objective="x"), "space"),
        (Study("s", fake, [{}], plot=Plot("a", "b", kind="pie")), "'pie'"),
        (Study("s", fake, [{}], plot=Plot("a", "b", kind="heat")), "two override keys"),
        (Study("s", fake, [{"m.a": 1}], plot=Plot("a", "b", where={"c": 1})), "where names c, .*; there are a, m.a"),
    ],
)
def test_contradictions_are_named(study, message):
    with pytest.raises(ValueError, match=message):
        check(study)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "no get_study"),
        ("def get_study():\n    return 3", "returned int"),
        ("def get_study():\n    return undefined", r"line 2: NameError.*undefined"),
        ("def get_study(:\n", r"line 1: SyntaxError"),
        ("raise SystemExit(0)\n", r"line 1: SystemExit"),
        ("import not_a_module_at_all", "line 1: ModuleNotFoundError"),
    ],
)
def test_a_bad_study_file_is_one_line(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_study(tmp_path / "bad.py")
    assert "\n" not in str(error.value)
    assert "bad.py" in str(error.value)


def test_a_missing_study_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        load_study(tmp_path / "nothing.py")


STUDIES = [path for path in sorted((ROOT / "experiments").glob("*.py")) if "def get_study" in path.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies_load(path, tmp_path):
    study = load_study(path)
    runs = make_runs(study, tmp_path)
    assert study.name == path.stem
    assert len(runs) == len(study.runs) == len({run.id for run in runs}) >= 9
    for run in runs:
        check_trainings(run)


def test_a_wrong_override_is_named_before_any_run_is_started(tmp_path):
    commands = train_and_evaluate("configs/quickstart_vae.py:smoke")
    study = Study("s", commands, runs=[{"model.latent_channels": 4}, {"train.batch_sise": 8}, {"train.batch_size": 0}])
    right, unknown, wrong = make_runs(study, tmp_path)
    check_trainings(right)
    with pytest.raises(ValueError, match=rf"run {unknown.id}: .* did you mean train\.batch_size\?"):
        check_trainings(unknown)
    with pytest.raises(ValueError, match=rf"run {wrong.id}: config\.train\.batch_size=0; expected at least 1"):
        check_trainings(wrong)
