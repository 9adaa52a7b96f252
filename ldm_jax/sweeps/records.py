"""The files in the folder of a run. Every file is replaced as a whole, so that nobody reads half of one.

run.json      id, overrides, commands, fingerprint: written when the run is handed to a worker
status        one word: waiting, running, done, failed, stopped or pruned
result.json   {'metrics': {...}, 'seconds': S} and for a failed run 'error' and the 'tail' of its log
log.txt       all that its commands printed, attempt after attempt
lock          held (flock) by the worker and the command it runs; names the command's process group
metrics.jsonl written by `ldm train` and `ldm evaluate`, one JSON object a line
"""

import json
import os
import pathlib
from typing import Any

from ldm_jax.sweeps.study import Run

ENDED = ("done", "failed", "pruned")


def write(path: pathlib.Path, content: str | dict[str, Any]) -> None:
    """Replace `path` in one step."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    os.replace(part, path)


def read(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def prepare(run: Run) -> None:
    """Write run.json for a new attempt; an older result is removed first, so that it is never taken for the new one."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write(run.folder / "status", "waiting\n")
    (run.folder / "result.json").unlink(missing_ok=True)
    about = {"id": run.id, "overrides": run.overrides, "commands": run.commands, "fingerprint": run.fingerprint}
    write(run.folder / "run.json", about)


def status(run: Run) -> str:
    """The status of this run: 'waiting' when the folder holds nothing, or the outcome of other commands."""
    if read(run.folder / "run.json").get("fingerprint") != run.fingerprint:
        return "waiting"
    return word(run.folder)


def word(folder: pathlib.Path) -> str:
    """The word in the file `status`."""
    try:
        return (folder / "status").read_text().strip() or "waiting"
    except FileNotFoundError:
        return "waiting"


def result(run: Run) -> dict[str, Any]:
    """result.json of this run, {} before there is one."""
    return read(run.folder / "result.json") if status(run) != "waiting" else {}


def settle(folder: pathlib.Path, state: str, **outcome: Any) -> None:
    """Write the outcome, then the status: where the status is 'done', the result is complete."""
    write(folder / "result.json", {"metrics": {}, **outcome})
    write(folder / "status", state + "\n")


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; incomplete lines are left out."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [row for row in map(parse, lines) if row is not None]


def last_values(path: pathlib.Path) -> dict[str, Any]:
    """The last value of every key in a JSONL file: a validation loss is logged more rarely than a training loss."""
    return {key: value for row in rows(path) for key, value in row.items() if value is not None}


def parse(line: str) -> dict[str, Any] | None:
    """The JSON object that a line consists of, or None."""
    line = line.strip()
    if not (line.startswith("{") and line.endswith("}")):
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def tail(path: pathlib.Path, lines: int = 20) -> list[str]:
    """The last lines of a log, each progress bar reduced to its last state."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 100_000))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    kept = (line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n"))
    return [line for line in kept if line][-lines:]
