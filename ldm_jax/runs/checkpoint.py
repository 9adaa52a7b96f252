"""Checkpoints: orbax trees with a sha256 manifest, so that a damaged one is found, named and passed over.

    DIR/checkpoints/STEP/state/...      the training state (orbax item `state`)
    DIR/checkpoints/STEP/meta/...       JSON: images seen, data position, the run's config
    DIR/checkpoints/STEP/manifest.json  sha256 of every file above, written last

orbax restores a flipped bit as a wrong number without a word; the manifest is what sees it. A step without a manifest
was interrupted while it was written, and counts as damaged; so does one in which a file has no line, or a line no file.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ldm_jax.kernels import processes

MANIFEST = "manifest.json"


def folder(workdir: str | os.PathLike) -> pathlib.Path:
    """Where the checkpoints of a run lie, one folder a step."""
    return pathlib.Path(workdir).absolute() / "checkpoints"


def steps(workdir: str | os.PathLike) -> list[int]:
    """Steps that have a folder, newest first, intact or not."""
    root = folder(workdir)
    if not root.is_dir():
        return []
    return sorted((int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)


def sha256(path: pathlib.Path) -> str:
    """sha256 of a file's content, as hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# What file managers and network drives leave in any folder, and what a manifest is called while it is written.
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", f"{MANIFEST}.partial")


def _files(step_dir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        p
        for p in step_dir.rglob("*")
        if p.is_file() and p != step_dir / MANIFEST and p.name not in LITTER and not p.name.startswith(("._", ".nfs"))
    )


def write_manifest(step_dir: pathlib.Path) -> None:
    """The sha256 of each file of a checkpoint, beside them."""
    sums = {str(p.relative_to(step_dir)): sha256(p) for p in _files(step_dir)}
    write_text(step_dir / MANIFEST, json.dumps(sums, indent=0, sort_keys=True))


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace a file as a whole: a crash or a full disk leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def damage(step_dir: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, as one phrase; None when every file is as it was written."""
    try:
        sums = json.loads((step_dir / MANIFEST).read_text())
    except FileNotFoundError:
        return f"no {MANIFEST}: the save was interrupted" if step_dir.is_dir() else "it is gone"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is not readable"
    if not isinstance(sums, dict) or not sums:
        return f"{MANIFEST} lists no file"
    present = {str(p.relative_to(step_dir)) for p in _files(step_dir)}
    for name in sorted(present - set(sums)):
        return f"{name} has no line in {MANIFEST}"
    for name, expected in sums.items():
        if name not in present:
            return f"{name} is missing"
        try:
            if sha256(step_dir / name) != expected:
                return f"{name} differs from its sha256"
        except FileNotFoundError:  # training prunes what another process looks at
            return f"{name} has vanished"
    return None


def identity(workdir: str | os.PathLike, step: int) -> str:
    """sha256 of the manifest: names the content of a checkpoint in a report."""
    return sha256(folder(workdir) / str(step) / MANIFEST)


def intact(workdir: str | os.PathLike) -> Iterator[tuple[int, str | None]]:
    """(step, what is wrong or None), newest first."""
    for step in steps(workdir):
        yield step, damage(folder(workdir) / str(step))


def newest(workdir: str | os.PathLike, warn=print) -> int | None:
    """The newest intact step; each damaged one on the way is named. None when there is none."""
    for step, wrong in intact(workdir):
        if wrong is None:
            return step
        warn(f"checkpoint {folder(workdir) / str(step)} is damaged ({wrong}); looking for an older one")
    return None


def pick(workdir: pathlib.Path, step: int | None) -> int:
    """`step` if it is there and intact; None: the newest intact one. Raises FileNotFoundError or ValueError that lists the steps."""
    if step is None:
        step = newest(workdir)
        if step is None:
            raise FileNotFoundError(f"{workdir} has no intact checkpoint")
        return step
    if step not in steps(workdir):
        have = ", ".join(map(str, sorted(steps(workdir)))) or "none"
        raise ValueError(f"{workdir} has no checkpoint of step {step}; it has {have}")
    wrong = damage(folder(workdir) / str(step))
    if wrong:
        raise ValueError(f"checkpoint {folder(workdir) / str(step)} is damaged: {wrong}")
    return step


def to_go_on_from(workdir: str | os.PathLike) -> int:
    """The step that a training starts from: the newest intact one, or 0 where none was ever finished.

    Raises ValueError where steps were finished and every one of them is damaged: to begin anew would overwrite them.
    """
    step = newest(workdir, warn=lambda text: print(text, flush=True))
    finished = [s for s in steps(workdir) if (folder(workdir) / str(s) / MANIFEST).exists()]
    if step is None and finished:
        raise ValueError(
            f"{folder(workdir)}: every checkpoint ({', '.join(map(str, finished))}) is damaged; restore one from a copy, or "
            "remove the folder to begin anew"
        )
    return step or 0


class Writer:
    """Saves steps, keeps the newest `keep` and every multiple of `keep_every` steps (0: none)."""

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int = 0):
        self.root, self.keep, self.keep_every = folder(workdir), keep, keep_every
        # orbax keeps all: it would delete old steps before this one has its manifest, and a kill between the two would
        # leave no intact step at all.
        self.manager = ocp.CheckpointManager(
            self.root,
            options=ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=False, create=True),
        )

    def save(self, state: Any, meta: dict[str, Any]) -> int:
        """Write a state (a NamedTuple with `step`) and its manifest. Raises OSError, with the path, where it cannot be written."""
        step = int(state.step)
        path = self.root / str(step)
        if path.is_dir():
            # Saving is collective, so no process may leave it alone.
            if processes.from_first(processes.is_first() and damage(path) is None):
                return step
            self.manager.delete(step)
        try:
            written = self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), meta=ocp.args.JsonSave(meta)),
                force=True,
            )
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise OSError(f"checkpoint {path} could not be written: {error}") from error
        if not written:
            raise OSError(f"checkpoint {path} was not written: orbax refused the step")
        if processes.is_first():
            write_manifest(path)
        for old in sorted(self.manager.all_steps())[: -self.keep]:
            if not self.keep_every or old % self.keep_every:
                self.manager.delete(old)
        return step

    def close(self) -> None:
        self.manager.close()


def _restore(path: pathlib.Path, item: str, args: Any) -> Any:
    handler = ocp.Checkpointer(
        ocp.StandardCheckpointHandler() if isinstance(args, ocp.args.StandardRestore) else ocp.PyTreeCheckpointHandler()
    )
    return handler.restore(path / item, args=args)


def restore_meta(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """What was written beside the state: images seen, data position, precision, first stage, config."""
    return json.loads((folder(workdir) / str(step) / "meta" / "metadata").read_text())


def restore_state(workdir: str | os.PathLike, step: int, like: Any, shardings: Any) -> Any:
    """The whole state, on the mesh of `shardings`, whatever mesh wrote it. `like`: the state, a NamedTuple, of
    ShapeDtypeStructs.

    Raises ValueError when the stored tree is not that of `like`.
    """
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
    path = folder(workdir) / str(step)
    try:
        tree = _restore(path, "state", ocp.args.StandardRestore(target._asdict()))
    except (ValueError, KeyError) as error:
        why = differ(_tree(path)["params"], like.params) or str(error).splitlines()[0]
        raise ValueError(f"checkpoint {path} does not fit this model: {why}") from error
    return type(like)(**tree)


def restore_params(workdir: str | os.PathLike, step: int, ema: str | None = None) -> dict[str, Any]:
    """{network: parameters} as numpy: the average called `ema`, or with None the raw parameters.

    Raises ValueError naming the averages that there are when `ema` is not among them.
    """
    path, part = folder(workdir) / str(step), stored_params(workdir, step, ema)
    if ema is None:
        return _restore_part(path, {"params": part})["params"]
    return _restore_part(path, {"ema": {ema: part}})["ema"][ema]


def stored_params(workdir: str | os.PathLike, step: int, ema: str | None = None) -> dict[str, Any]:
    """{network: what is known of its parameters, such as `shape`} as `restore_params`, none of them read."""
    path = folder(workdir) / str(step)
    tree = _tree(path)
    if ema is None:
        return tree["params"]
    if ema not in (tree.get("ema") or {}):
        have = ", ".join(tree.get("ema") or {}) or "none"
        raise ValueError(f"checkpoint {path} has no average {ema!r}; it has {have} (and 'none', the raw parameters)")
    return tree["ema"][ema]


def restore_variables(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """TrainState.variables as numpy, each NamedTuple as a dict; empty for parameters alone (`ldm convert --to=orbax`)."""
    path = folder(workdir) / str(step)
    return _restore_part(path, {"variables": _tree(path).get("variables") or {}})["variables"]


def _tree(path: pathlib.Path) -> dict[str, Any]:
    # By the handler: a Checkpointer warns that `state` holds no metadata of its own, which the step above it has.
    return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


def _restore_part(path: pathlib.Path, part: dict[str, Any]) -> dict[str, Any]:
    """A part of a `_tree` as numpy."""
    item = jax.tree.map(lambda m: np.zeros(0, m.dtype), part)
    args = jax.tree.map(lambda m: ocp.RestoreArgs(restore_type=np.ndarray), part)
    return ocp.PyTreeCheckpointer().restore(
        path / "state", args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
    )


def differ(there: Any, here: Any) -> str:
    """The first parameter, by name, in which two trees differ, with both shapes, and how many more there are; '' for none."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}

    there, here = shapes(there), shapes(here)
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if not names:
        return ""
    one, other = (side.get(names[0], "missing") for side in (there, here))
    return f"{names[0]} is {one} there, {other} here" + (f", and {len(names) - 1} more differ" if names[1:] else "")


def average(half_life: float) -> str:
    """The name of an average in the state and on the command line: its half-life in images."""
    return str(int(half_life))
