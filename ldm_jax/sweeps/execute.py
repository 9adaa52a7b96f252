"""Execute one run from its folder: `python -m ldm_jax.sweeps.execute DIR/runs/ID`, on this machine or inside a Slurm job.

It runs the commands of run.json one after the other, keeps what they print in log.txt, and writes result.json and a status at the end.
It ends with the sweep that started it: otherwise a killed sweep would leave trainings behind, and the next sweep would start them a
second time. A command that outlived its worker is ended before the run starts anew.
"""

import argparse
import contextlib
import fcntl
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ldm_jax.sweeps import records

GRACE = 30.0  # seconds between SIGTERM and SIGKILL: time to save a checkpoint; Slurm's KillWait is as long by default


class Stopped(Exception):
    """The run received SIGTERM, or the sweep that started it has ended."""


def execute(folder: str | pathlib.Path, parent: int = 0) -> str:
    """Run the commands of run.json; the result is the status at the end: 'done', 'failed' or 'stopped'.

    SIGTERM stops the command (SIGTERM, and SIGKILL after GRACE seconds); so does the end of the process `parent`.
    Raises ValueError where the run is under way on another machine.
    """
    folder = pathlib.Path(folder).resolve()
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))

    def check() -> None:
        if received or (parent and os.getppid() != parent):
            raise Stopped

    began = time.monotonic()
    try:
        with locked(folder) as lock:
            if records.word(folder) == "done":  # another worker did it while this one waited in a queue
                return "done"
            records.write(folder / "status", "running\n")
            fingerprint = records.read(folder / "run.json")["fingerprint"]
            try:
                metrics = _commands(folder, lock, check)
            except Stopped:
                records.write(folder / "status", "stopped\n")
                return "stopped"
            except Failed as failure:
                state = "failed"
                outcome = {"error": str(failure), "killed": failure.killed, "tail": records.tail(folder / "log.txt")}
            else:
                state, outcome = "done", {"metrics": metrics}
            if records.read(folder / "run.json")["fingerprint"] != fingerprint:
                return "stopped"  # the sweep of these commands has ended, and the next one has other commands
            records.settle(folder, state, seconds=round(time.monotonic() - began, 2), **outcome)
            return state
    finally:
        signal.signal(signal.SIGTERM, previous)


class Failed(Exception):
    """A command ended with an error, which the message names. `killed`: by a signal, so that a retry may succeed."""

    def __init__(self, message: str, killed: bool = False):
        super().__init__(message)
        self.killed = killed


def _commands(folder: pathlib.Path, lock: Any, check: Any) -> dict[str, Any]:
    commands = records.read(folder / "run.json")["commands"]
    printed: dict[str, Any] = {}
    for number, argv in enumerate(commands, 1):
        check()
        code = _command(folder, argv, lock, check, printed)
        if code:
            cause = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            raise Failed(f"command {number} of {len(commands)}: {cause}", killed=code < 0)
    return {**records.last_values(folder / "metrics.jsonl"), **printed}


def _command(folder: pathlib.Path, argv: list[str], lock: Any, check: Any, printed: dict[str, Any]) -> int:
    with (folder / "log.txt").open("ab", buffering=0) as log:
        log.write(f"\n$ {' '.join(argv)}    # {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        try:
            # A new session: Ctrl-C in the terminal reaches the sweep alone, and the whole group of processes can be ended.
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                pass_fds=[lock.fileno()],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            raise Failed(f"cannot start {argv[0]!r}: {error.strerror}") from None
        _name_holder(lock, process.pid)

        # stdout is apart from stderr: a progress bar has no line end, and the JSON would stand in the same line.
        def copy() -> None:
            last = None
            for line in process.stdout:
                log.write(line)
                last = records.parse(line.decode(errors="replace")) or last
            printed.update(last or {})

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                check()
                time.sleep(0.05)
        finally:
            _end_group(process)
            reader.join(timeout=5)  # before the log is closed: what the command printed after SIGTERM belongs there
        check()  # a command that ended because this run is stopped has not failed
    return process.returncode


def _end_group(process: subprocess.Popen) -> None:
    """Send SIGTERM, wait while it saves, send SIGKILL; also to what a finished command left running (data workers)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def locked(folder: pathlib.Path, signals: Sequence[int] = (signal.SIGTERM, signal.SIGKILL)) -> Iterator[Any]:
    """Hold the lock of the run, which its command inherits: the kernel frees it when the last of these processes has ended.

    If the lock is held, a command has outlived its worker: it is ended by `signals`, GRACE seconds apart.
    """
    with (folder / "lock").open("a+") as lock:
        if not _try_lock(lock):
            lock.seek(0)
            host, _, group = lock.read().partition(" ")
            if host != socket.gethostname() or not group.strip().isdigit():
                raise ValueError(
                    f"run {folder.name} is under way on {host or 'another machine'} (its file lock is held)"
                )
            for number in signals:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(group), number)
                deadline = time.monotonic() + GRACE
                while not (free := _try_lock(lock)) and time.monotonic() < deadline:
                    time.sleep(0.05)
                if free:
                    break
            else:
                raise ValueError(f"run {folder.name}: process group {group} holds its lock and does not end")
        _name_holder(lock, os.getpid())
        yield lock


def _try_lock(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name_holder(lock: Any, group: int) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(f"{socket.gethostname()} {group}")
    lock.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs one run of a sweep from its folder.")
    parser.add_argument("folder", help="DIR/runs/ID, with run.json in it")
    parser.add_argument("--parent", type=int, default=0, help="stop when this process has ended")
    args = parser.parse_args()
    try:
        return 0 if execute(args.folder, args.parent) == "done" else 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
