"""Which constructor each block of a config goes to, and which arguments it takes.

A block of the config is spelt out in its file as far as the file wants it; the constructor's defaults stand for the rest. Command
lines may set these too: arguments(config)["model.dropout"] says that config.model takes a `dropout`, of which type and range. The
blocks of options in config.sampler are read in the same way: arguments(config)["sampler.options.snr"].
"""

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from ldm_jax.config import config_keys
from ldm_jax.config.config_keys import Argument
from ldm_jax.config.construct import named
from ldm_jax.data import SOURCES, TOKENIZERS
from ldm_jax.diffusion.grids import GRIDS
from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.models import MODELS
from ldm_jax.sampling.settings import METHODS, SCHEDULES, SHARED, THRESHOLDS, Settings
from ldm_jax.training import conditions, optimizer
from ldm_jax.training.experiment import Experiment
from ldm_jax.training.task import Kind
from ldm_jax.training.tasks import TASKS


class Call(NamedTuple):
    """The constructor of a block, or several that share it, and those of its arguments that do not come from the block."""

    makers: Callable | tuple[Callable, ...]
    excluded: tuple[str, ...] = ()


def optimizer_call(block: str, name: str) -> Call:
    """The arguments of the schedule and of the optimizer, which share one block. Raises ValueError for an unknown name."""
    makers = (optimizer.make_optimizer, named(block, optimizer.OPTIMIZERS, name))
    return Call(makers, ("name", "rate", "batch_size", "total_images"))


def condition_call(name: str) -> Call:
    """The arguments of a block of config.condition: those of its `make`, and `drop`."""
    return Call((conditions.maker(name), conditions.with_drop), ("context", "condition"))


def calls(config: ConfigDict) -> dict[str, Call]:
    """Block, by its dotted key -> its Call. Raises ValueError for a name that is in no table."""
    return {
        "model": Call(named("model", MODELS, config.model.name), ("dtype",)),
        "data": Call(named("data", SOURCES, config.data.name), ("split",)),
        "process": Call(named("process", PROCESSES, config.process.name)),
        "tokenizer": Call(named("tokenizer", TOKENIZERS, config.tokenizer.name)),
        "text": Call(MODELS["text"], ("vocab_size", "length", "pad_id", "dtype")),
        "optimizer": optimizer_call("optimizer", config.optimizer.name),
        "task": Call(kind_of(config).make, ("context",)),
    }


def sampler_calls(sampler: ConfigDict | Settings) -> dict[str, Call]:
    """Block of options in config.sampler, such as 'grid_options' -> the Call of the name beside it. ValueError for an unknown name."""
    rows = {
        "options": ("sampler", SAMPLERS, sampler.name, ()),
        "grid_options": ("grid", GRIDS, sampler.grid, ("process", "n")),
        "guidance_options": (
            "guidance method",
            METHODS,
            sampler.guidance_method,
            ("pair", "scale", "process", *SHARED),
        ),
        "schedule_options": (
            "guidance schedule",
            SCHEDULES,
            sampler.guidance_schedule,
            ("scale", "neutral", "shape"),
        ),
        "threshold_options": ("threshold", THRESHOLDS, sampler.threshold, ("denoise", "process")),
    }
    for what, table, name, _ in rows.values():
        if name not in table:
            raise ValueError(f"config.sampler: {what} {name!r} is unknown; there are {', '.join(sorted(table))}")
    return {key: Call(table[name], excluded) for key, (_, table, name, excluded) in rows.items()}


def kind_of(config: ConfigDict | Experiment) -> Kind:
    """The line of TASKS that config.task names: the one place where a task is looked up by its name."""
    return named("task", TASKS, config.task.name)


def arguments(config: ConfigDict) -> dict[str, Argument]:
    """Dotted key, such as 'model.dropout' -> that argument of the block's constructor, whether the config spells it out or not."""
    takes, table = {}, calls(config)
    for key, make in kind_of(config).blocks.items():
        takes[f"task.{key}"] = Argument(Mapping)
        table[f"task.{key}"] = Call(make, ("context",))
        if "optimizer" in inspect.signature(make).parameters:
            table[f"task.{key}.optimizer"] = optimizer_call("optimizer", config.optimizer.name)
    for key, call in sampler_calls(config.sampler).items():
        takes[f"sampler.{key}"] = Argument(Mapping)
        table[f"sampler.{key}"] = call
    for name in conditions.CONDITIONS:
        takes[f"condition.{name}"] = Argument(bool | Mapping)
        table[f"condition.{name}"] = condition_call(name)
    for block, call in table.items():
        for key, argument in config_keys.arguments(call.makers, call.excluded).items():
            takes[f"{block}.{key}"] = argument
    return takes
