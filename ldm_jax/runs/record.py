"""DIR/config.json: the config that a run was started with, and whether a config goes on with that run.

A run goes on only with the config that it was started with. Two kinds of keys may change. HARMLESS keys change no number of the
result. A larger train.images makes a run longer, finished or not: it then ends in the bits of a run that had this length from the
start. That is possible only where no learning rate depends on the length, so the schedules 'cosine' and 'linear' are refused.
"""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.runs import checkpoint, run

# Keys that change what is written or how fast, but not one number of the result: they may differ when a run goes on.
HARMLESS = (
    "mesh",
    "train.log_every",
    "train.keep",
    "train.keep_every",
    "train.checkpoint_every",
    "train.validate_every",
    "train.pictures_every",
    "input.num_threads",
    "input.prefetch",
    "sampler",
    "first_stage.workdir",  # where it lies; the facts of a checkpoint say what it is
    "first_stage.latents",
    "first_stage.preview",
)


# Learning-rate schedules that depend on the length of the run (training/optimizer.py).
BY_LENGTH = ("cosine", "linear")
LENGTH = "train.images"


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def changes(workdir: pathlib.Path, config: ConfigDict) -> list[str]:
    """What differs between DIR/config.json and this config, a line each, but for HARMLESS keys."""
    # Read as a run: a key that came since the run was started has its default.
    old, now = _flat(as_json(run.read(workdir).config)), _flat(as_json(config))
    missing = object()
    return [
        f"  {key}: {old.get(key, 'not there')!r} there, {now.get(key, 'not there')!r} here"
        for key in sorted(old | now)
        if old.get(key, missing) != now.get(key, missing)
        and not any(key == h or key.startswith(h + ".") for h in HARMLESS)
    ]


def write_or_compare(config: ConfigDict, workdir: pathlib.Path, main: bool) -> None:
    """Write DIR/config.json, or compare this config with the one there. Raises ValueError with the difference.

    A run without a checkpoint has nothing to lose: a config that was refused may be put right. main: whether this process writes.
    """
    path = workdir / "config.json"
    if path.exists() and checkpoint.steps(workdir):
        lines = changes(workdir, config)
        if lines and all(line.startswith(f"  {LENGTH}:") for line in lines):
            _check_longer(run.read(workdir).config.train.images, config, workdir)
        elif lines:
            raise ValueError(
                f"{workdir} was started with another config; take another --workdir (and --config.init_from.workdir to "
                "start from its parameters), or undo:\n" + "\n".join(lines)
            )
        if not lines:
            return
    if main:
        checkpoint.write_text(path, json.dumps(as_json(config), indent=1) + "\n")


def _check_longer(images: int, config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raise ValueError unless a run of `images` images can be made as long as this config says."""
    longer = config.train.images
    if longer < images:
        raise ValueError(
            f"{workdir} was started with config.{LENGTH}={images}; expected at least as many, met {longer}"
        )
    schedules = {key: value for key, value in _flat(as_json(config)).items() if key.endswith("optimizer.schedule")}
    for key, schedule in schedules.items():
        if schedule in BY_LENGTH:
            raise ValueError(
                f"{workdir} cannot be made longer: config.{key}={schedule!r} depends on the length of a run, which was "
                f"config.{LENGTH}={images}; start another run from its parameters with --config.init_from.workdir={workdir}"
            )


def keep_place(first_stage: str, workdir: pathlib.Path) -> None:
    """Write the place of the first stage into DIR/config.json, for a run that goes on after its first stage has moved."""
    path = workdir / "config.json"
    written = json.loads(path.read_text())
    if written.get("first_stage", {}).get("workdir") != first_stage:
        written["first_stage"]["workdir"] = first_stage
        checkpoint.write_text(path, json.dumps(written, indent=1) + "\n")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out
