"""Where runs are executed: worker processes on this machine, or jobs of a Slurm cluster through submitit.

A launcher takes runs (`submit`) and returns a job for each. The outcome of a run lies in its folder; a job only says whether it is
over, can be stopped, and says why it ended when the run left no status.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ldm_jax.sweeps import records
from ldm_jax.sweeps.execute import execute, locked
from ldm_jax.sweeps.study import Run


class Job(NamedTuple):
    """poll() -> whether it is over; stop() asks it to end, and a second call kills it; reason() -> why it left no status."""

    poll: Callable[[], bool]
    stop: Callable[[], None]
    reason: Callable[[], str]


class Launcher(NamedTuple):
    """submit(runs) -> a job for each, at most `capacity` at a time; they are polled every `pause` seconds.

    `workers` runs should be under way at a time (0: no limit); a queue may hold more than that.
    """

    submit: Callable[[Sequence[Run]], list[Job]]
    workers: int
    capacity: int
    pause: float


def local(workdir: pathlib.Path, workers: int = 1, devices: Sequence[str] = ()) -> Launcher:
    """`workers` processes on this machine. With `devices`, worker k sees accelerator `devices[k % len(devices)]` alone.

    Several JAX processes on one GPU each reserve three quarters of its memory: set XLA_PYTHON_CLIENT_MEM_FRACTION.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    busy: dict[int, subprocess.Popen] = {}

    def start(run: Run) -> Job:
        records.prepare(run)
        slot = next(slot for slot in range(workers) if slot not in busy or busy[slot].poll() is not None)
        seen = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
        with (run.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ldm_jax.sweeps.execute", str(run.folder), f"--parent={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **seen},
            )
        busy[slot] = process
        asked: list[bool] = []

        def stop() -> None:
            # The worker passes SIGTERM on, and kills its command after GRACE; if it were killed at once, its command would go on.
            process.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
            if asked:
                process.wait()
                _end_holder(run.folder, [signal.SIGKILL])
            asked.append(True)

        def reason() -> str:
            code = process.poll()
            _end_holder(run.folder)
            return f"the worker was killed by signal {-code}" if code and code < 0 else f"the worker ended with {code}"

        return Job(lambda: process.poll() is not None, stop, reason)

    return Launcher(lambda runs: [start(run) for run in runs], workers, workers, 0.1)


def _end_holder(folder: pathlib.Path, signals: Sequence[int] = (signal.SIGTERM, signal.SIGKILL)) -> None:
    """End a command whose worker was killed."""
    with contextlib.suppress(ValueError), locked(folder, signals):
        pass


class Execute(NamedTuple):
    """What a Slurm job calls. Near the time limit or a preemption submitit queues `checkpoint()`, and the run resumes."""

    folder: str

    def __call__(self) -> str:
        return execute(self.folder)

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def slurm(
    workdir: pathlib.Path,
    workers: int = 0,
    partition: str = "",
    account: str = "",
    cpus: int = 0,
    gpus: int = 0,
    mem: float = 0.0,
    minutes: int = 60,
    options: dict[str, str] | None = None,
    pause: float = 2.0,
) -> Launcher:
    """One Slurm job a run, submitted as an array of which `workers` run at a time (0: as many as the cluster gives).

    cpus and gpus a run, mem in GB, the time limit in minutes; `options` are further sbatch options by name. `workdir`
    must be on a disk that the nodes share. Jobs that a killed sweep left in the queue are used, not repeated.
    """
    import submitit

    folder = workdir / "slurm"
    try:
        executor = submitit.SlurmExecutor(folder)
    except RuntimeError:
        raise ValueError("launcher slurm: no srun on this machine (log in to the cluster's head node)") from None
    executor.update_parameters(
        job_name=f"ldm-{workdir.name}",
        time=minutes,
        **({"partition": partition} if partition else {}),
        **({"account": account} if account else {}),
        **({"cpus_per_task": cpus} if cpus else {}),
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"mem": f"{mem:g}GB"} if mem else {}),
        **({"array_parallelism": workers} if workers else {}),
        additional_parameters=options or {},
    )

    def submit(runs: Sequence[Run]) -> list[Job]:
        queued = _queue()
        jobs: dict[str, Any] = {}
        for run in runs:
            old = records.read(run.folder / "job.json").get("job_id")
            if old not in queued:
                continue
            if records.read(run.folder / "run.json").get("fingerprint") == run.fingerprint:
                jobs[run.id] = submitit.SlurmJob(folder, old)
            else:
                subprocess.run(["scancel", old], check=False)
        new = [run for run in runs if run.id not in jobs]
        for run in new:
            records.prepare(run)
        if new:
            try:
                with executor.batch():
                    submitted = [executor.submit(Execute(str(run.folder))) for run in new]
            except submitit.core.utils.FailedJobError as error:
                raise ValueError(f"sbatch refused the jobs: {' '.join(str(error).split())[-300:]}") from error
            for run, job in zip(new, submitted):
                records.write(run.folder / "job.json", {"job_id": job.job_id})
                jobs[run.id] = job
        return [_slurm_job(jobs[run.id], run.folder) for run in runs]

    return Launcher(submit, workers, 1000, pause)  # the largest array that Slurm takes by default


def _slurm_job(job: Any, folder: pathlib.Path) -> Job:
    gone: list[float] = []
    asked: list[bool] = []

    def poll() -> bool:
        state = _queue().get(job.job_id)
        over = records.word(folder) in (*records.ENDED, "stopped")
        if state is not None and not (state == "CG" and over):
            gone.clear()
            return False
        gone.append(time.monotonic())
        # The queue drops a job before a network disk shows what the job wrote, and lists a new job a moment late.
        return bool(asked) or over or time.monotonic() - gone[0] > 10

    def stop() -> None:
        subprocess.run(["scancel", job.job_id], check=False)
        _seen["time"] = float("-inf")
        asked.append(True)

    def reason() -> str:
        # The state of submitit is FINISHED for a job that failed: only its exception says so.
        if not job.paths.result_pickle.exists():
            return f"Slurm job {job.job_id} ended without a result (see {job.paths.stderr})"
        error = job.exception()
        return f"Slurm job {job.job_id}: {str(error).strip().splitlines()[-1] if error else 'ended early'}"

    return Job(poll, stop, reason)


_seen: dict[str, Any] = {"time": float("-inf"), "jobs": {}}


def _queue(age: float = 1.0) -> dict[str, str]:
    """Job id -> state of the user's jobs in the queue, each element of an array by itself; queried once in `age` seconds at most."""
    if time.monotonic() - _seen["time"] > age:
        command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %t"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:
            _seen["jobs"] = dict(line.split() for line in answer.stdout.splitlines())
        elif not _seen["jobs"]:
            raise ValueError(f"launcher slurm: squeue failed: {answer.stderr.strip()}")
        # else: the controller does not answer for a moment; the jobs are not lost
        _seen["time"] = time.monotonic()
    return _seen["jobs"]


LAUNCHERS: dict[str, Callable[..., Launcher]] = {"local": local, "slurm": slurm}
