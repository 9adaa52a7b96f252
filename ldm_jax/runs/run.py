"""A run of `ldm train` on disk, as one value.

    DIR/config.json         the config (record.py)
    DIR/dataset.json        classes, their names, prompts: what drawing needs of the data
    DIR/checkpoints/STEP/   the training state (checkpoint.py)
    DIR/metrics.jsonl       one JSON object a log line or evaluation (log.py)
    DIR/plugins.json        plug-ins, with a copy of each in DIR/plugins (plugin_record.py)

A run knows files alone. What its config means is the business of training/.
"""

import json
import math
import os
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ldm_jax import weights
from ldm_jax.config import config_file, config_keys
from ldm_jax.runs import checkpoint, plugin_record
from ldm_jax.weights import files

# Earlier names of tasks, which stand in the config.json of runs that were begun with them.
RENAMED_TASKS = {"distill": "tiny_autoencoder"}


class Run(NamedTuple):
    """A folder with a config.json. Steps are optimizer steps; an average is called by its half-life in images, None: raw parameters."""

    workdir: pathlib.Path
    config: ConfigDict

    @property
    def last_step(self) -> int:
        """The step at which the run is finished."""
        return steps(self.config.train.images, self.config.train.batch_size)

    @property
    def is_finished(self) -> bool:
        """Whether the run was trained to the end of its config."""
        return (checkpoint.newest(self.workdir) or 0) >= self.last_step

    @property
    def average(self) -> str | None:
        """The average that is used where none is named: the first. None for a run that keeps none."""
        half_lives = self.config.ema.half_lives
        return checkpoint.average(half_lives[0]) if half_lives else None

    @property
    def dataset(self) -> dict[str, Any]:
        """dataset.json: 'num_classes', 'class_names', 'prompts', 'skipped'."""
        return json.loads((self.workdir / "dataset.json").read_text())

    def is_of(self, task: str) -> bool:
        """Whether this is a run of the task of this name."""
        return self.config.task.name == task

    def expect(self, task: str) -> None:
        """Raise ValueError unless this is a run of the task of this name."""
        if not self.is_of(task):
            raise ValueError(f"{self.workdir} holds a run of the task {self.config.task.name!r}; expected {task!r}")

    def step(self, step: int | None = None) -> int:
        """`step`, if it is intact; None: the newest intact one. Raises FileNotFoundError or ValueError that lists the steps."""
        return checkpoint.pick(self.workdir, step)

    def named_average(self, name: str | None) -> str | None:
        """The average of a command line's --ema=NAME: None: the first one; 'none': the raw parameters, which is None."""
        return self.average if name is None else None if name == "none" else name

    def params(self, step: int, average: str | None) -> dict[str, Any]:
        """{network: parameters as numpy arrays} of a step. Raises ValueError for an average that is not kept."""
        return checkpoint.restore_params(self.workdir, step, average)

    def meta(self, step: int) -> dict[str, Any]:
        """What stands beside the state of a step: images, data position, precision, facts."""
        return checkpoint.restore_meta(self.workdir, step)

    def identity(self, step: int) -> str:
        """sha256 that names the content of a checkpoint."""
        return checkpoint.identity(self.workdir, step)


def steps(images: int, batch_size: int) -> int:
    """A duration in images as steps, rounded up; 0 stays 0."""
    return math.ceil(images / batch_size) if images > 0 else 0


def is_run(workdir: str | os.PathLike) -> bool:
    """Whether a folder holds a config.json that a training wrote."""
    path = pathlib.Path(workdir) / "config.json"
    return path.is_file() and "task" in files.read_json(path)


def read(workdir: str | os.PathLike) -> Run:
    """The run in a folder; its plug-ins are loaded. A key that came after the run was started has its default.

    Raises FileNotFoundError when the folder holds no config.json, ValueError for the config.json of a published network, and as
    plugin_record.load.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is not a run: it has no config.json (a run is made by `ldm train`)")
    config = files.read_json(path)
    if "task" not in config:
        name = weights.class_named(config)
        what = f"a published {name}" if name else "a config.json that no training wrote"
        raise ValueError(f"{workdir} holds {what}; expected a run of `ldm train`")
    task = config["task"]
    task["name"] = RENAMED_TASKS.get(task["name"], task["name"])
    config_keys.complete(config, config_file.base())
    plugin_record.load(workdir)
    return Run(workdir, ConfigDict(config).lock())
