"""Whether a config can run. All that can be wrong is said before anything is written, read from a data set, trained or encoded.

Its keys, types and ranges (config_keys.py); what the keys say together; and the task itself, with every network of it and of its
first stage, built by jax.eval_shape, which knows shapes and computes nothing.
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import models
from ldm_jax.config import config_file, config_keys
from ldm_jax.data.preprocess import check_crop
from ldm_jax.diffusion.grids import GRIDS
from ldm_jax.kernels import mesh
from ldm_jax.runs import checkpoint, run
from ldm_jax.training import blocks, build, conditions, experiment, first_stage, init_from, open_stage, sampling
from ldm_jax.training.experiment import Experiment
from ldm_jax.training.first_stage import FirstStage
from ldm_jax.training.state import TrainState

CHOICES = {"precision": ("auto", "float32", "bfloat16"), "first_stage.whitening": ("auto", "measured")}
TABLE = 2**28  # numbers of a table of positions: above it is a slip of the keyboard


def check(config: ConfigDict, workdir: pathlib.Path | None = None) -> tuple[Experiment, TrainState]:
    """The experiment of a config, and the shapes of its training state. Raises ValueError, which names the key, if it cannot run.

    `workdir`: of the run, where its first stage may have been trained already. Reads configs, of other runs too, but no data and no
    parameters; takes a second or so, ten for the largest networks.
    """
    config_keys.check_names(config, config_file.base())
    config_keys.check_values(config, config_file.base())
    check_blocks(config)
    parsed = experiment.parse(config)
    check_together(parsed)
    state = shapes(parsed, stage_of(parsed, workdir))
    if workdir is None or not checkpoint.steps(workdir):  # a run that goes on has its own parameters
        with _blamed("config.init_from"):
            init_from.check(parsed, blocks.kind_of(parsed).network, state)
    return parsed, state


# --- each block by itself ------------------------------------------------------------------------------------------------


def check_blocks(config: ConfigDict) -> None:
    """Raise ValueError for a name that is in no table, and for options that the constructor of that name does not take."""
    for name, call in blocks.calls(config).items():
        if name != "task":
            _check_call(f"config.{name}", call, _without_name(config[name].to_dict()))
    for name, options in experiment.conditions_of(config.condition).items():
        conditions.maker(name)
        _check_call(f"config.condition.{name}", blocks.condition_call(name), options)
    _check_task(config)
    for key, choices in CHOICES.items():
        value = functools.reduce(lambda block, name: block[name], key.split("."), config)
        if value not in choices:
            raise ValueError(f"config.{key}={value!r}; expected one of {', '.join(choices)}")
    with _blamed("config.input.crop"):
        check_crop(config.input.crop)
    mesh.check_rules(config.mesh.rules)


def _check_call(block: str, call: blocks.Call, options: dict[str, Any], others: Iterable[str] = ()) -> None:
    config_keys.check_call(block, call.makers, options, call.excluded, others=others)


def _without_name(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "name"}


def _check_task(config: ConfigDict) -> None:
    """config.task, in which some keys are blocks of a function of their own."""
    kind, options = blocks.kind_of(config), _without_name(config.task.to_dict())
    nested = {key: options.pop(key) for key in kind.blocks if key in options}
    _check_call("config.task", blocks.calls(config)["task"], options, others=kind.blocks)
    for key, block in nested.items():
        if block is not None and not isinstance(block, Mapping):
            raise ValueError(f"config.task.{key}={config_keys.shown(block)}; expected a block, {{}} for none")
        if block:
            _check_call(f"config.task.{key}", blocks.Call(kind.blocks[key], ("context",)), dict(block))
            if overrides := dict(block).get("optimizer"):
                whole = config.optimizer.to_dict() | dict(overrides)
                name = f"task.{key}.optimizer"
                _check_call(f"config.{name}", blocks.optimizer_call(name, whole.pop("name")), whole)


# --- keys that hold together ---------------------------------------------------------------------------------------------


def check_together(experiment: Experiment) -> None:
    """Raise ValueError for blocks that contradict each other, and for files and runs that are not there."""
    train, start, kind = experiment.train, experiment.init_from, blocks.kind_of(experiment)
    if train.batch_size % train.accumulate:
        raise ValueError(
            f"config.train.batch_size={train.batch_size} must be a multiple of config.train.accumulate={train.accumulate}"
        )
    if experiment.steps >= 2**31:
        raise ValueError(
            f"config.train.images={train.images} are {experiment.steps} steps of {train.batch_size}; expected "
            "fewer than 2**31"
        )
    file = pathlib.Path(start.file)
    if start.file and (not file.is_file() or file.suffix != ".safetensors"):
        raise ValueError(f"config.init_from.file={file}; expected a .safetensors file that diffusers wrote")
    if start.workdir:
        if start.file:
            raise ValueError("config.init_from.workdir and config.init_from.file are both set; expected one of them")
        with _blamed(f"config.init_from.workdir={start.workdir}"):
            run.read(start.workdir)
    if kind.keeps_encoder(**experiment.task.options) and not (start.workdir or start.file):
        raise ValueError(
            "config.task.train='decoder' keeps an encoder that is there; expected config.init_from to name it"
        )
    name, has_stage = experiment.task.name, build.needs_stage(experiment)
    if kind.stage == "must" and not has_stage:
        raise ValueError(f"config.task.name={name!r} learns from a first stage; expected config.first_stage to name it")
    if preview := experiment.first_stage.preview:
        with _blamed(f"config.first_stage.preview={preview}"):
            open_stage.check_preview(pathlib.Path(preview))
        if not has_stage:
            raise ValueError(f"config.first_stage.preview={preview}, but this run diffuses in pixels")
    if kind.model is not None:
        check_sampler(experiment)
    if experiment.condition and not kind.conditioned:
        raise ValueError(f"config.condition is {experiment.condition}, but the task {name!r} takes no condition")


def check_sampler(experiment: Experiment) -> None:
    """Raise ValueError unless config.sampler can draw from config.process."""
    settings = experiment.sampler
    for key, call in blocks.sampler_calls(settings).items():
        _check_call(f"config.sampler.{key}", call, getattr(settings, key))
    with _blamed("config.sampler"):
        sampling.check(settings)
    with _blamed(f"config.sampler.grid={settings.grid!r}, steps={settings.steps}"):
        times = np.asarray(GRIDS[settings.grid](experiment.process, settings.steps, **settings.grid_options))
        if not np.isfinite(times).all():
            raise ValueError("gives times that are not finite")


# --- networks ------------------------------------------------------------------------------------------------------------


def stage_of(parsed: Experiment, workdir: pathlib.Path | None = None) -> FirstStage | None:
    """The first stage of an experiment, its parameters as shapes alone; None for one without. Raises ValueError as `check`."""
    if not build.needs_stage(parsed):
        return None
    block, side = parsed.first_stage, parsed.input.resolution
    with _blamed(f"config.first_stage.workdir={block.workdir}"):
        folder = open_stage.place(parsed, workdir or pathlib.Path())
    trained = workdir is not None and run.is_run(folder) and run.read(folder).is_finished
    if block.workdir or trained:
        where = f"config.first_stage.workdir={block.workdir or folder}"
        with _blamed(where):
            module, resolution = open_stage.network(folder, block.whitening == "measured")
            side = resolution or side
            params = models.shapes(module, (side, side, 3))["params"]
    else:
        where = f"config.first_stage.config={block.config}"
        with _blamed(where):
            config = config_file.load(block.config)
            if config.task.name != open_stage.TASK:
                raise ValueError(f"has the task {config.task.name!r}; expected {open_stage.TASK!r}")
            of_stage, state = check(config)
            params, module, side = state.params["autoencoder"], of_stage.network, of_stage.input.resolution
    with _blamed(where):
        shape = first_stage.latent_shape(module, (side, side, 3))
        z = jax.ShapeDtypeStruct((1, *shape), np.float32)
        jax.eval_shape(lambda params, z: module.apply({"params": params}, z, method="decode"), params, z)
    if parsed.data.name != "latents" and side != parsed.input.resolution:
        with _blamed(f"config.input.resolution={parsed.input.resolution} with {where}"):
            latent = first_stage.latent_shape(module, build.space_of(parsed).shape)
            if latent != shape:
                raise ValueError(f"gives latents of shape {latent}; those of its own resolution, {side}, have {shape}")
    return FirstStage(module, params, np.zeros(shape[-1]), np.ones(shape[-1]), shape)


def shapes(parsed: Experiment, stage: FirstStage | None) -> TrainState:
    """The training state of an experiment, as shapes: every network has then been built once. Raises ValueError naming the block."""
    kind = blocks.kind_of(parsed)
    # How many classes the network was made for: the data is not asked.
    classes = kind.classes(parsed.network, "label" in parsed.condition) if kind.classes else 0
    _check_positions(parsed, stage.shape if stage else build.space_of(parsed).shape)
    with _blamed(_summary(parsed)):
        task = build.task(parsed, build.context(parsed, stage, classes))
        return jax.eval_shape(lambda: task.init(jax.random.key(0)))


def _check_positions(parsed: Experiment, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a patch_size that makes more positions than any memory holds."""
    module = parsed.network
    if not hasattr(module, "patch_size"):
        return
    tokens = (shape[0] // module.patch_size) * (shape[1] // module.patch_size)
    if tokens * module.hidden_size > TABLE:
        raise ValueError(
            f"config.model: patch_size={module.patch_size} makes {tokens} patches of {shape[0]} x {shape[1]}, of "
            f"hidden_size={module.hidden_size}; expected a product of at most {TABLE}"
        )


def _summary(parsed: Experiment) -> str:
    """The options of the network, for an error that does not name it."""
    options = ", ".join(f"{key}={config_keys.shown(value)}" for key, value in parsed.model.options.items())
    return f"config.task ({parsed.task.name}) with config.model ({parsed.model.name}: {options})"


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Whatever fails within is one line that begins with what is to blame, unless it names a key of the config itself."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["fails"]
        if (
            isinstance(error, ValueError)
            and lines[0].startswith(("config.", "config "))
            and not what.startswith("config.first")
        ):
            raise
        kind = "" if isinstance(error, ValueError | FileNotFoundError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{lines[0]}") from error
