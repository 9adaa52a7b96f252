"""The Slurm launcher on a real slurmctld: `bash tests/sweeps/slurm_setup.sh` (as root) installs and starts one."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.sweeps.helpers import ROOT, executions, parent, pids, start, sweep, wait_for, write_study

SLURM = ("--launcher=slurm", "--cpus=1", "--time=5")


def reachable() -> bool:
    if shutil.which("scontrol") is None or shutil.which("sbatch") is None:
        return False
    answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30)
    return "is UP" in answer.stdout


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not reachable(), reason="no slurmctld answers: bash tests/sweeps/slurm_setup.sh starts one"),
]


def queue() -> set[str]:
    answer = subprocess.run(["squeue", "--noheader", "--format=%i %t"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in answer.stdout.splitlines() if line.split()[1] != "CG"}


def test_an_array_of_jobs_with_one_that_fails(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[{'a.value': 1}, {'a.value': 2, 'fail': 4}, {'a.value': 3}]")
    work = tmp_path / "work"
    done = sweep(study, work, *SLURM, "--workers=2", "--slurm=comment=sweep")
    assert done.returncode == 1, done.stderr
    assert "2 of 3 done, 1 failed" in done.stdout and "exit code 4" in done.stdout
    assert len(executions(work)) == 3
    text = "".join(path.read_text() for path in (work / "slurm").glob("*_submission.sh"))
    assert "#SBATCH --array=0-2%2" in text
    assert "#SBATCH --comment=sweep" in text
    again = sweep(study, work, *SLURM)
    assert again.returncode == 1 and len(executions(work)) == 3


def test_jobs_in_the_queue_outlive_the_sweep_and_are_taken_up(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=k, steps=60, pause=0.05) for k in range(3)]")
    work = tmp_path / "work"
    process = start(study, work, *SLURM)
    wait_for(lambda: len(executions(work)) == 2)  # the node has few CPUs: the others wait
    process.kill()
    process.wait()
    done = sweep(study, work, *SLURM)
    assert done.returncode == 0, done.stderr
    assert len(executions(work)) == len(set(executions(work))) == 3
    assert len(list((work / "slurm").glob("*_submitted.pkl"))) == 3  # nothing was queued twice


def test_ctrl_c_takes_the_jobs_out_of_the_queue(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=k, steps=400, pause=0.05) for k in range(4)]")
    work = tmp_path / "work"
    process = start(study, work, *SLURM)
    wait_for(lambda: executions(work))
    before = queue()
    assert before
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "the same command goes on" in out
    wait_for(lambda: not before & queue())


def test_a_job_that_is_cancelled_by_others_is_not_finished(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=1, steps=400, pause=0.05)]")
    work = tmp_path / "work"
    process = start(study, work, *SLURM)
    wait_for(lambda: executions(work))
    (job,) = re.findall(r'"job_id": "(\d+)"', next((work / "runs").glob("*/job.json")).read_text())
    subprocess.run(["scancel", job], check=True)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 1, err
    assert "0 of 1 done" in out and "stopped from outside: value=1" in out


def test_a_job_that_dies_without_a_word_is_a_failed_run(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=1, steps=400, pause=0.05)]")
    work = tmp_path / "work"
    process = start(study, work, *SLURM)
    wait_for(lambda: executions(work))
    os.kill(parent(pids(work)[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 1, err
    assert "ended without a result" in out
    assert "failed" in (work / "results.md").read_text()


def test_a_wrong_partition_is_one_line(tmp_path):
    study = write_study(tmp_path / "study.py", "", runs="[dict(value=1)]")
    done = sweep(study, tmp_path / "work", *SLURM, "--partition=nowhere")
    assert done.returncode == 2
    assert "sbatch refused" in done.stderr.splitlines()[-1] and "partition" in done.stderr.splitlines()[-1]


def test_jax_distributed_finds_the_other_task():
    """What `ldm train --distributed` rests on: no address, no count, no rank is given."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_FLAGS", "SLURM_"))}
    line = ["srun", "--ntasks=2", "--immediate=60", sys.executable, str(ROOT / "tests" / "sweeps" / "distributed.py")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert said == [f"process {k} of 2: psum 11.0" for k in (0, 1)]
