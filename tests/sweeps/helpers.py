"""Studies of tests/sweeps/fake.py, and `ldm sweep` as a process."""

import pathlib
import subprocess
import sys
import time

FAKE = str(pathlib.Path(__file__).with_name("fake.py"))
# Without `ldm_jax.cli.main`, which imports jax: these tests start many sweeps.
PROGRAM = """
import argparse, sys
from ldm_jax.cli import sweep
parser = argparse.ArgumentParser()
sweep.add_arguments(parser)
try:
    sys.exit(sweep.run(parser.parse_args(), []))
except (ValueError, FileNotFoundError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def fake(overrides: dict, folder: pathlib.Path) -> list[list[str]]:
    """The command of a run: fake.py with the overrides (their dotted prefix dropped)."""
    return [[sys.executable, FAKE, str(folder), *(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in overrides.items())]]


def write_study(path: pathlib.Path, body: str, **fields: str) -> pathlib.Path:
    """A study file with get_study() -> Study(name='test', commands=fake, **fields), each field as source text."""
    arguments = {"name": "'test'", "commands": "fake", "objective": "'score'", **fields}
    call = ", ".join(f"{key}={value}" for key, value in arguments.items())
    path.write_text(
        "from ldm_jax.sweeps import *\n"
        "from ldm_jax.sweeps import Study\n"
        "from tests.sweeps.helpers import fake\n"
        f"{body}\n"
        f"def get_study():\n    return Study({call})\n"
    )
    return path


def command(study: pathlib.Path, workdir: pathlib.Path, *flags: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(study), f"--workdir={workdir}", *flags]


def sweep(study: pathlib.Path, workdir: pathlib.Path, *flags: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """`ldm sweep` to its end."""
    return subprocess.run(command(study, workdir, *flags), capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def start(study: pathlib.Path, workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    """`ldm sweep` as a process to be killed."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command(study, workdir, *flags), stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def executions(workdir: pathlib.Path) -> list[str]:
    """The run ids in the order in which their commands were started."""
    log = workdir / "executions.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def pids(workdir: pathlib.Path) -> list[int]:
    return [int(line.split()[1]) for line in (workdir / "executions.log").read_text().splitlines()]


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[1])


def wait_for(condition, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the awaited state did not come"
        time.sleep(0.02)


ROOT = pathlib.Path(__file__).parents[2]
