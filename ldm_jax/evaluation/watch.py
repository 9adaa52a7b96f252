"""Follow a training run: what to evaluate next, and the best checkpoint so far, kept in another folder.

    DIR/best/checkpoints/STEP/    the best checkpoint, whole, with its manifest
    DIR/best/config.json, dataset.json    so that the folder is a run, which `ldm sample --workdir=DIR/best` draws from
    DIR/best/row.json             the row that made it the best
    DIR/best/held/                a run likewise, of the checkpoint that is being measured; gone when that is done

Nothing in DIR/checkpoints is written or removed here: training owns it, and may prune a step at any moment. Before a checkpoint is
measured it is held by hard links to its files, which take no space and which training cannot remove.
"""

import contextlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from ldm_jax.evaluation.metrics import Figure
from ldm_jax.runs import checkpoint
from ldm_jax.runs.log import read_metrics
from ldm_jax.training import build, open_stage
from ldm_jax.training.experiment import Experiment
from ldm_jax.weights import hub

SECONDS = 5.0


def whole(workdir: pathlib.Path) -> list[int]:
    """Steps whose save is complete (they have a manifest), oldest first."""
    root = checkpoint.folder(workdir)
    return sorted(step for step in checkpoint.steps(workdir) if (root / str(step) / checkpoint.MANIFEST).is_file())


def new_steps(workdir: pathlib.Path, config: Experiment, say: Callable[[str], None]) -> Iterator[int]:
    """Each checkpoint once, as they come, oldest first, up to the last of the run. A damaged one is left out; `say` gets a line."""
    handed_out: set[int] = set()
    last = config.steps
    while True:
        for step in whole(workdir):
            if step in handed_out:
                continue
            handed_out.add(step)
            if wrong := checkpoint.damage(checkpoint.folder(workdir) / str(step)):
                say(f"checkpoint {step} is left out: {wrong}")
            else:
                yield step
        if last in handed_out:
            return
        time.sleep(SECONDS)


def earlier(workdir: pathlib.Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The newest row of metrics.jsonl with this origin (evaluate.origin), or None: an evaluation that need not be repeated."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return next((row for row in reversed(rows) if _alike(row, origin)), None)


def _alike(row: dict[str, Any], origin: dict[str, Any]) -> bool:
    return all(key in row and row[key] == value for key, value in origin.items())


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def hold(workdir: pathlib.Path, config: Experiment, step: int) -> pathlib.Path:
    """DIR/best/held, a run with this one checkpoint, to be measured. `keep_if_best` keeps it, `drop` removes it.

    Its files are hard links, which take no space and stay when training prunes the checkpoint; copies where the file system has no
    links. Raises OSError or ValueError for a checkpoint that vanishes meanwhile.
    """
    held = workdir.absolute() / "best" / "held"
    shutil.rmtree(held, ignore_errors=True)  # left by a --watch that was killed
    copy = checkpoint.folder(held) / str(step)
    shutil.copytree(checkpoint.folder(workdir) / str(step), copy, copy_function=_link)
    if wrong := checkpoint.damage(copy):
        raise ValueError(f"checkpoint {step} could not be held in {held}: {wrong}")
    plain = json.loads((workdir / "config.json").read_text())
    if build.needs_stage(config):  # which may lie in DIR/first_stage, and not in DIR/best/first_stage
        place = config.first_stage.workdir
        if not place.startswith(hub.PREFIX):
            place = str(open_stage.place(config, workdir.absolute()))
        plain["first_stage"]["workdir"] = place
        if (workdir / "whitening.json").is_file():
            shutil.copy2(workdir / "whitening.json", held / "whitening.json")
    checkpoint.write_text(held / "config.json", json.dumps(plain, indent=1) + "\n")
    checkpoint.write_text(held / "dataset.json", (workdir / "dataset.json").read_text())
    return held


def drop(workdir: pathlib.Path) -> None:
    """Remove DIR/best/held, and DIR/best where there is nothing else."""
    best = workdir.absolute() / "best"
    shutil.rmtree(best / "held", ignore_errors=True)
    with contextlib.suppress(OSError):
        best.rmdir()


def keep_if_best(held: pathlib.Path, row: dict[str, Any], origin: dict[str, Any], figure: Figure) -> bool:
    """Whether the checkpoint in `held`, with its `row`, is better by `figure` than the one in DIR/best, which it then replaces.

    A row of another `origin` (apart from step and checkpoint) is not comparable: its checkpoint is replaced. There is always one
    whole checkpoint in DIR/best, since the old one is removed after the new one has its name. Raises ValueError for a figure that is
    not a number of the row.
    """
    value, best, step = row.get(figure.name), held.parent, row["step"]
    if not isinstance(value, int | float) or isinstance(value, bool):
        have = ", ".join(k for k, v in row.items() if isinstance(v, float))
        raise ValueError(f"--keep-best={figure.name} is no figure of this evaluation; there are {have}")
    if not math.isfinite(value):
        return False
    if (best / "row.json").is_file():
        kept = json.loads((best / "row.json").read_text())
        settings = {k: v for k, v in origin.items() if k not in ("step", "checkpoint")}
        sign = 1 if figure.higher else -1
        if figure.name in kept and _alike(kept, settings) and not sign * (value - kept[figure.name]) > 0:
            return False
    for name in ("config.json", "dataset.json"):
        os.replace(held / name, best / name)
    target = checkpoint.folder(best) / str(step)
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    (checkpoint.folder(held) / str(step)).rename(target)
    checkpoint.write_text(best / "row.json", json.dumps(row, indent=1) + "\n")
    for other in checkpoint.steps(best):
        if other != step:
            shutil.rmtree(checkpoint.folder(best) / str(other))
    return True
