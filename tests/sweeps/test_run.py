"""The runner, as processes that are really killed."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.sweeps.helpers import ROOT, executions, parent, pids, start, sweep, wait_for, write_study


def results(workdir) -> dict[str, dict]:
    """results.csv by the column `value` of each run."""
    with (workdir / "results.csv").open() as file:
        return {row["a.value"]: row for row in csv.DictReader(file)}


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_runs_once_and_writes_tables_and_plot(tmp_path):
    study = write_study(
        tmp_path / "study.py",
        "",
        runs="product(sweep('a.value', [3, 1, 2]), sweep('noise', [0, 1]))",
        columns="('score', 'rare')",
        plot="Plot('a.value', 'score', hue='noise')",
    )
    work, public = tmp_path / "work", tmp_path / "public"
    first = sweep(study, work, "--workers=2", f"--publish={public}")
    assert first.returncode == 0, first.stderr
    assert "6 of 6 done, 0 failed" in first.stdout
    assert len(executions(work)) == len(set(executions(work))) == 6
    text = (public / "results.md").read_text()
    assert "| value | noise | score | rare | status | minutes |" in text
    assert "The lowest score: 1 at value = 1, noise = 0." in text
    # `rare` stood in the first line of metrics.jsonl only; the JSON line survives an unfinished progress bar (noise).
    assert "| **1** | **0** | **1** | **7** | **done** | **0.0** |" in text
    assert "| 3 | 1 | 3 | 7 | done | 0.0 |" in text
    assert (public / "score_by_value.png").stat().st_size > 5_000
    again = sweep(study, work)
    assert again.returncode == 0
    assert len(executions(work)) == 6


def test_two_workers_work_at_the_same_time(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=k, steps=20, pause=0.05) for k in range(3)]")
    process = start(study, tmp_path / "work", "--workers=2")
    wait_for(lambda: len(executions(tmp_path / "work")) == 2)
    assert all(alive(pid) for pid in pids(tmp_path / "work"))
    assert len(executions(tmp_path / "work")) == 2
    assert process.wait(60) == 0
    assert len(executions(tmp_path / "work")) == 3


def test_kill_9_and_the_same_command_goes_on(tmp_path):
    study = write_study(
        tmp_path / "study.py", "", runs="[{'a.value': k, 'steps': 1 if k < 2 else 40, 'pause': 0.05} for k in range(4)]"
    )
    work = tmp_path / "work"
    process = start(study, work, "--workers=2")
    wait_for(lambda: len(list(work.glob("runs/*/metrics.jsonl"))) == 4)  # the last two have made a step
    running = pids(work)[2:]
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, running)))  # what it was running does not outlive it
    before = executions(work)
    finished = sweep(study, work, "--workers=2")
    assert finished.returncode == 0, finished.stderr
    assert "was killed; going on" in finished.stderr
    after = executions(work)[len(before) :]
    assert sorted(after) == sorted(before[2:])  # the two finished ones are not repeated, the other two are resumed
    table = results(work)
    assert [row["status"] for row in table.values()] == ["done"] * 4
    assert int(table["2"]["begun"]) > 0 and table["0"]["begun"] == "0"


def test_a_command_whose_worker_was_killed_too_is_ended_before_its_run_starts_again(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=1, steps=60, pause=0.05)]")
    work = tmp_path / "work"
    process = start(study, work)
    wait_for(lambda: len(executions(work)) == 1)
    orphan = pids(work)[0]
    worker = parent(orphan)
    process.kill()
    os.kill(worker, signal.SIGKILL)
    process.wait()
    assert alive(orphan)
    assert sweep(study, work).returncode == 0
    assert not alive(orphan)
    (folder,) = (work / "runs").iterdir()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))  # two at once would have written steps twice


def test_a_failing_run_is_recorded_and_the_others_go_on(tmp_path):
    study = write_study(
        tmp_path / "study.py", "", runs="[{'a.value': 1, 'fail': 3}, {'a.value': 2}, {'a.value': 3, 'kill': 1}]"
    )
    work = tmp_path / "work"
    first = sweep(study, work)
    assert first.returncode == 1
    assert "1 of 3 done, 2 failed" in first.stdout
    assert "command 1 of 1: exit code 3; RuntimeError: the loss is not finite" in first.stdout
    assert "killed by signal 9 (SIGKILL)" in first.stdout
    assert [row["status"] for row in results(work).values()] == ["failed", "done", "failed"]
    assert "- `value=1_fail=3_" in (work / "results.md").read_text()
    # Failed runs stay failed until asked for; then they alone are run.
    assert sweep(study, work).returncode == 1
    assert len(executions(work)) == 3
    assert sweep(study, work, "--retry-failed").returncode == 1
    assert len(executions(work)) == 5
    assert [row["status"] for row in results(work).values()] == ["failed", "done", "done"]


def test_a_program_that_is_missing_fails_its_run(tmp_path):
    study = write_study(tmp_path / "study.py", "def fake(o, f): return [['/no/such/program']]", runs="[dict(a=1)]")
    done = sweep(study, tmp_path / "work")
    assert done.returncode == 1
    assert "cannot start '/no/such/program'" in done.stdout


def test_a_study_may_grow_and_a_changed_command_is_run_again(tmp_path):
    path, work = tmp_path / "study.py", tmp_path / "work"
    two = "\ndef fake2(o, f): return [*fake(o, f), [*fake(o, f)[0], 'value=9']]"
    sweep(write_study(path, "", runs="sweep('a.value', [1, 2])"), work)
    sweep(write_study(path, "", runs="sweep('a.value', [1, 2, 3])"), work)
    assert len(executions(work)) == 3
    # A second command behind the first: same folders, but not the same result.
    changed = sweep(write_study(path, two, runs="sweep('a.value', [1, 2, 3])", commands="fake2"), work)
    assert changed.returncode == 0
    assert len(executions(work)) == 3 + 6
    assert {row["score"] for row in results(work).values()} == {"9.0"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_runs_and_says_how_to_go_on(tmp_path, number):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=k, steps=30, pause=0.05) for k in range(2)]")
    work = tmp_path / "work"
    public = tmp_path / "public"
    process = start(study, work, f"--publish={public}")
    wait_for(lambda: len(executions(work)) == 1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping 1 runs" in err and "the same command goes on from here" in out
    assert not alive(pids(work)[0])
    (folder,) = (work / "runs").iterdir()
    assert (folder / "status").read_text() == "stopped\n"
    assert "saved on SIGTERM" in (folder / "log.txt").read_text()  # it was asked, not shot
    assert not public.exists()  # half a table does not take the place of a whole one
    assert sweep(study, work, "--workers=2", f"--publish={public}").returncode == 0
    assert (public / "results.md").exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=1, steps=40, pause=0.05)]")
    other = write_study(tmp_path / "other.py", "", name="'other'", runs="[dict(value=1)]")
    work = tmp_path / "work"
    process = start(study, work)
    wait_for(lambda: executions(work))
    second = sweep(study, work)
    assert second.returncode == 2
    assert f"another sweep is at work in {work}: process {process.pid} on" in second.stderr
    assert process.wait(60) == 0
    foreign = sweep(other, work)
    assert foreign.returncode == 2 and "holds the study 'test', not 'other'" in foreign.stderr


def test_only_dry_run_and_the_flags_of_the_other_launcher(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="product(sweep('a.value', [1, 10]), sweep('noise', [0, 1]))")
    work = tmp_path / "work"
    listed = sweep(study, work, "--dry-run", "--only=value=1")
    assert "2 of 4 runs" in listed.stdout and "value=10" not in listed.stdout
    assert not work.exists()
    assert sweep(study, work, "--only=value=1", "--only=noise=0").returncode == 0
    assert len(executions(work)) == 1
    assert "4 runs: 1 done" in (work / "results.md").read_text()
    nothing = sweep(study, work, "--only=value=5")
    assert nothing.returncode == 2 and "--only value=5" in nothing.stderr
    mixed = sweep(study, work, "--gpus=1")
    assert mixed.returncode == 2 and "--launcher=slurm" in mixed.stderr


def test_devices_go_round_the_workers(tmp_path):
    body = "import sys\ndef fake(o, f): return [[sys.executable, '-c', PROGRAM]]\n"
    body += 'PROGRAM = \'import os, time; time.sleep(0.5); print(chr(123) + chr(34) + "score" + chr(34) + ":" + '
    body += 'os.environ["CUDA_VISIBLE_DEVICES"] + chr(125))\''
    study = write_study(tmp_path / "study.py", body, runs="sweep('a.value', [0, 1])")
    assert sweep(study, tmp_path / "work", "--workers=2", "--devices=4,6").returncode == 0
    assert {row["score"] for row in results(tmp_path / "work").values()} == {"4", "6"}


def test_from_the_console(tmp_path):
    """Through `python -m ldm_jax`, as users start it."""
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=1)]")
    line = [sys.executable, "-m", "ldm_jax", "sweep", str(study), f"--workdir={tmp_path / 'work'}"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run([*line[:4], str(tmp_path / "no.py"), line[-1]], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1 and "no.py" in wrong.stderr
