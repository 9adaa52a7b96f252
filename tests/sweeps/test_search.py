"""The search, with optuna's own database read back."""

import collections

import optuna
import pytest

from ldm_jax.sweeps import Range, Search, Study
from ldm_jax.sweeps.search import search_queue
from tests.sweeps.helpers import executions, fake, pids, start, sweep, wait_for, write_study

pytestmark = pytest.mark.slow


def trials(work) -> list:
    storage = f"sqlite:///{work / 'search.db'}"
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage).get_trials()


def states(work) -> dict[str, int]:
    return dict(collections.Counter(trial.state.name for trial in trials(work)))


def test_bad_trials_are_pruned_while_they_run(tmp_path):
    study = write_study(
        tmp_path / "study.py",
        "",
        search="""Search(space={'a.value': Range(0.1, 10, log=True)}, trials=6, sampler={'name': 'random'},
            pruner={'name': 'median', 'n_startup_trials': 1}, report='loss', fixed={'steps': 30, 'pause': 0.05})""",
    )
    work = tmp_path / "work"
    done = sweep(study, work)
    assert done.returncode == 0, done.stderr
    count = states(work)
    assert count["PRUNED"] >= 1 and sum(count.values()) == 6
    assert f"{count['COMPLETE']} of 6 done, {count['PRUNED']} pruned, 0 failed" in done.stdout
    seen = {trial.state.name: trial for trial in trials(work)}
    assert seen["COMPLETE"].intermediate_values.keys() >= {1, 10}
    assert seen["PRUNED"].params["a.value"] > min(trial.params["a.value"] for trial in trials(work))
    lengths = {}
    for folder in (work / "runs").iterdir():
        status = (folder / "status").read_text().strip()
        lengths.setdefault(status, []).append(len((folder / "metrics.jsonl").read_text().splitlines()))
        assert ("saved on SIGTERM" in (folder / "log.txt").read_text()) == (status == "pruned")
    assert set(lengths["done"]) == {30} and max(lengths["pruned"]) < 30
    assert (work / "search.png").exists() and "| pruned |" in (work / "results.md").read_text()
    assert sweep(study, work).returncode == 0
    assert len(executions(work)) == 6


def test_a_killed_search_goes_on_with_the_values_it_was_trying(tmp_path):
    study = write_study(
        tmp_path / "study.py",
        "",
        search="""Search(space={'a.value': Range(0, 10)}, trials=4, sampler={'name': 'random'},
            pruner={'name': 'none'}, fixed={'steps': 20, 'pause': 0.05})""",
    )
    work = tmp_path / "work"
    process = start(study, work)
    wait_for(lambda: len(executions(work)) == 2)
    process.kill()
    process.wait()
    assert states(work) == {"COMPLETE": 1, "RUNNING": 1}
    done = sweep(study, work, "--workers=2")
    assert done.returncode == 0, done.stderr
    assert states(work) == {"COMPLETE": 4, "FAIL": 1}
    first, second, *_ = executions(work)
    assert executions(work).count(first) == 1 and executions(work).count(second) == 2
    # A sampler that began again with the same seed would have proposed the first value twice.
    assert len(set(executions(work))) == 4


def test_a_trial_whose_command_was_killed_is_tried_once_more(tmp_path):
    space = "Search({'a.value': Range(1, 9, integer=True)}, trials=3, sampler={'name': 'random'}, fixed={'kill': 1})"
    work = tmp_path / "work"
    assert sweep(write_study(tmp_path / "study.py", "", search=space), work).returncode == 0
    assert states(work) == {"COMPLETE": 3, "FAIL": 3}
    assert len(pids(work)) == 6


@pytest.mark.parametrize("fixed, why", [({"fail": 3}, "exit code 3"), ({"steps": 1}, "no finite 'other'")])
def test_trials_that_fail_end_the_search_all_the_same(tmp_path, fixed, why):
    study = write_study(
        tmp_path / "study.py",
        "",
        search=f"Search({{'a.value': Range(0, 1)}}, trials=2, fixed={fixed})",
        objective="'other'",
    )
    done = sweep(study, tmp_path / "work")
    assert done.returncode == 1 and why in done.stdout
    assert states(tmp_path / "work") == {"FAIL": 2}


def test_the_same_choice_is_not_run_twice(tmp_path):
    study = write_study(
        tmp_path / "study.py", "", search="Search({'a.value': [1, 2]}, trials=7)", direction="'maximize'"
    )
    work = tmp_path / "work"
    assert sweep(study, work, "--workers=3").returncode == 0
    assert states(work) == {"COMPLETE": 7}
    assert len(executions(work)) == len(set(executions(work))) == 2
    assert "The highest score: 2" in (work / "results.md").read_text()


@pytest.mark.parametrize(
    "search, message",
    [
        (Search({"a": [1]}, pruner={"name": "best"}), "pruner 'best'"),
        (Search({"a": [1]}, pruner={"name": "successive_halving"}), "min_resource"),
        (Search({"a": [1]}, sampler={"name": "grid"}), "sampler 'grid'"),
        (Search({"a": Range(2, 1)}), "space 'a'"),
        (Search({"a": [1]}, seed=2**64), "search seed=18446744073709551616; expected"),
        (Search({"a": [1]}, seed=-1), "search seed=-1; expected"),
    ],
)
def test_a_bad_search_is_named(tmp_path, search, message):
    with pytest.raises(ValueError, match=message):
        search_queue(Study("s", fake, search=search, objective="score"), tmp_path)
