"""Run a study to its end: give runs to the launcher, watch and count them, and write tables and plots.

It can be killed at any moment and started again. The folder of a run says whether it is finished, together with its overrides and
commands, so that a finished run is never repeated and a changed one is never taken for finished.
"""

import contextlib
import fcntl
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from ldm_jax.sweeps import records, results
from ldm_jax.sweeps.launchers import Job, Launcher
from ldm_jax.sweeps.queue import Queue, list_queue, matches
from ldm_jax.sweeps.search import search_queue
from ldm_jax.sweeps.study import Run, Study, check_trainings, make_runs


def run_study(
    study: Study,
    workdir: pathlib.Path,
    launcher: Launcher,
    *,
    only: Sequence[str] = (),
    retry_failed: bool = False,
    publish: pathlib.Path | None = None,
) -> int:
    """Run what is not finished of `study` in `workdir`: 0 when all is done, 1 when a run failed, 130 after Ctrl-C.

    only: terms as in `queue.matches`. publish: a folder that gets a copy of the tables and plots at the end.
    Raises ValueError when another sweep is at work in `workdir`, when it holds another study, when `only` fits no run.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with alone(workdir, study.name), _terminated_like_interrupted():
        if study.search is not None:
            if only:
                raise ValueError("--only picks runs of a list; a search chooses its own")
            queue = search_queue(study, workdir, launcher.workers, retry_failed)
            table: list[Run] | None = None
        else:
            table = make_runs(study, workdir)
            chosen = [run for run in table if matches(run, only)]
            if not chosen:
                raise ValueError(f"no run of {study.name} fits --only {' '.join(only)}; --dry-run lists them")
            for run in chosen:
                if records.status(run) not in records.ENDED:
                    check_trainings(run)
            queue = list_queue(chosen, retry_failed)

        def write() -> None:
            results.write_tables(study, table or queue.runs(), workdir)

        interrupted = False
        try:
            work(queue, launcher, study.name, write)
        except KeyboardInterrupt:
            interrupted = True
        # An incomplete table must not replace a complete one that was published before.
        paths = results.write(study, table or queue.runs(), workdir, None if interrupted else publish)
        return _report(queue, paths, interrupted, workdir)


def work(queue: Queue, launcher: Launcher, name: str, write: Any) -> None:
    """Start runs, watch them, collect those that ended. If this ends early for any reason, the runs under way are stopped first."""
    active: dict[str, tuple[Run, Job]] = {}
    states = [records.status(run) for run in queue.runs()]
    failed = states.count("failed")
    over = sum(state in records.ENDED for state in states)
    with tqdm(total=queue.total, initial=over, desc=name, unit="run", dynamic_ncols=True) as bar:
        shown = [("", 0), 0.0]

        def show(text: str) -> None:
            # A terminal shows the time; a log file gets a line when something changed.
            now = text, bar.n
            if now != shown[0] or (sys.stderr.isatty() and time.monotonic() - shown[1] > 1):
                shown[:] = now, time.monotonic()
                bar.set_postfix_str(text)

        try:
            while True:
                runs = queue.take(launcher.capacity - len(active))
                if runs:
                    for run, job in zip(runs, launcher.submit(runs)):
                        active[run.id] = run, job
                if not active:
                    return
                show(f"{len(active)} under way, {failed} failed")
                for run, job in list(active.values()):
                    queue.watch(run, job)
                    if not job.poll():
                        continue
                    del active[run.id]
                    queue.ended(run, _outcome(run, job))
                    state = records.status(run)
                    if state == "failed":
                        failed += 1
                        bar.write(f"{run.id} failed: {_why(run)}", file=sys.stderr)
                    bar.n = sum(records.status(run) in records.ENDED for run in queue.runs())
                    write()
                time.sleep(launcher.pause)
        except BaseException:
            # Also after an error in this code: however the sweep ends, no run goes on without it.
            _stop(active, launcher, bar)
            raise


def _outcome(run: Run, job: Job) -> str:
    state = records.status(run)
    if state in ("running", "waiting"):
        state = "failed"
        tail = records.tail(run.folder / "log.txt")
        records.settle(run.folder, state, error=job.reason(), killed=True, tail=tail)
    return state


def _stop(active: dict[str, tuple[Run, Job]], launcher: Launcher, bar: tqdm) -> None:
    if active:
        bar.write(f"stopping {len(active)} runs, which save first (Ctrl-C again kills them)", file=sys.stderr)
    waiting = list(active.values())
    for _, job in waiting:
        job.stop()
    while waiting:
        try:
            waiting = [(run, job) for run, job in waiting if not job.poll()]
            time.sleep(min(launcher.pause, 0.2))
        except KeyboardInterrupt:
            for _, job in waiting:
                job.stop()


def _why(run: Run) -> str:
    result = records.result(run)
    return "; ".join([result.get("error", "?"), *result.get("tail", [])[-1:]])


def _report(queue: Queue, paths: Sequence[pathlib.Path], interrupted: bool, workdir: pathlib.Path) -> int:
    states = {run.id: records.status(run) for run in queue.runs()}
    failed = [run for run in queue.runs() if states[run.id] == "failed"]
    done, pruned = (list(states.values()).count(word) for word in ("done", "pruned"))
    print(f"{done} of {queue.total} done" + (f", {pruned} pruned" if pruned else "") + f", {len(failed)} failed")
    for run in failed:
        print(f"  failed: {run.id}: {_why(run)}\n          {run.folder / 'log.txt'}")
    for path in paths:
        print(f"  wrote {path}")
    stopped = [] if interrupted else [run for run in queue.runs() if states[run.id] == "stopped"]
    for run in stopped:
        print(f"  stopped from outside: {run.id}; the same command goes on with it")
    if interrupted:
        print("stopped; the same command goes on from here")
        return 130
    if failed:
        print("the same command with --retry-failed runs them again")
    return 0 if done + pruned == len(states) else 1


@contextlib.contextmanager
def alone(workdir: pathlib.Path, name: str) -> Iterator[None]:
    """Hold the lock of `workdir` for a sweep of the study `name`. The kernel frees the lock of a sweep that was killed.

    Raises ValueError when another sweep is at work there or when the folder belongs to another study.
    """
    with (workdir / "lock").open("a+") as lock:
        lock.seek(0)
        holder = lock.read().strip()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another sweep is at work in {workdir}: {holder}") from None
        there = records.read(workdir / "study.json").get("name", name)
        if there != name:
            raise ValueError(f"{workdir} holds the study {there!r}, not {name!r}: take another --workdir")
        records.write(workdir / "study.json", {"name": name})
        if holder:
            print(f"the last sweep here ({holder}) was killed; going on from what it finished", file=sys.stderr)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
