"""Whether a config can run, found out before anything is written, read from a data set, trained or encoded.

Its keys, types and ranges (config_keys.py); what the keys say together; and the task itself, with every network of it and of its
first stage, built by jax.eval_shape, which knows shapes and computes nothing.
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import models
from ldm_jax.config import config_file, config_keys, construct
from ldm_jax.data import SOURCES, TOKENIZERS
from ldm_jax.data.preprocess import check_crop
from ldm_jax.diffusion.grids import GRIDS
from ldm_jax.diffusion.prediction import PREDICTIONS
from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.kernels import mesh
from ldm_jax.models import MODELS
from ldm_jax.runs import checkpoint
from ldm_jax.training import experiment, published, sampling
from ldm_jax.training import first_stage as stages
from ldm_jax.training import optimizer as optimizers
from ldm_jax.training import state as states
from ldm_jax.training.terms import TERMS

CHOICES = {"precision": ("auto", "float32", "bfloat16"), "first_stage.whitening": ("auto", "measured")}
TABLE = 2**28  # numbers of a table of positions: above it is a slip of the keyboard


def check(config: ConfigDict, workdir: pathlib.Path | None = None) -> states.TrainState:
    """Raise ValueError, one line that names the key, for a config that cannot run; else the shapes of its training state.

    `workdir`: of the run, where its first stage may have been trained already. Reads configs, of other runs too, but no data and no
    parameters; takes a second or so, ten for the largest networks.
    """
    config_keys.check_names(config, config_file.base())
    config_keys.check_values(config, config_file.base())
    check_blocks(config)
    check_together(config)
    found = shapes(config, first_stage(config, workdir))
    if workdir is None or not checkpoint.steps(workdir):  # a run that goes on has its own parameters
        with _blamed("config.init_from"):
            experiment.check_init_from(config, found)
    return found


# --- each block by itself ------------------------------------------------------------------------------------------------


def check_blocks(config: ConfigDict) -> None:
    """Raise ValueError for a name that is in no table, and for options that the constructor of that name does not take."""
    for kind, table, given in (
        ("model", MODELS, ("dtype",)),
        ("data", SOURCES, ("split",)),
        ("process", PROCESSES, ()),
        ("tokenizer", TOKENIZERS, ()),
    ):
        make = construct.named(kind, table, config[kind])
        config_keys.check_call(f"config.{kind}", make, construct.options_of(config[kind]), given)
    config_keys.check_call(
        "config.text", MODELS["text"], config.text.to_dict(), ("vocab_size", "length", "pad_id", "dtype")
    )
    _check_optimizer("config.optimizer", config.optimizer.to_dict())
    _check_task(config)
    for key, choices in CHOICES.items():
        value = functools.reduce(lambda block, name: block[name], key.split("."), config)
        if value not in choices:
            raise ValueError(f"config.{key}={value!r}; expected one of {', '.join(choices)}")
    with _blamed("config.input.crop"):
        check_crop(config.input.crop)
    mesh.check_rules(config.mesh.rules)


def _check_optimizer(block: str, options: dict[str, Any]) -> None:
    table = optimizers.OPTIMIZERS
    if options["name"] not in table:
        raise ValueError(f"{block}.name={options['name']!r} is unknown; there are {', '.join(table)}")
    makers = (optimizers.make_optimizer, table[options["name"]])
    options = {key: value for key, value in options.items() if key != "name"}
    config_keys.check_call(block, makers, options, ("name", "rate", "batch_size", "total_images"))


def _check_task(config: ConfigDict) -> None:
    make, own = construct.named("task", experiment.TASKS, config.task), construct.options_of(config.task)
    blocks = TERMS if config.task.name == "autoencoder" else {}
    terms = {key: own.pop(key) for key in blocks if key in own}
    config_keys.check_call("config.task", make, own, ("context",), others=blocks)
    for key, options in terms.items():
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"config.task.{key}={config_keys.shown(options)}; expected a block, {{}} for none")
        if options:
            config_keys.check_call(f"config.task.{key}", TERMS[key], options, ("context",))
    overrides = (terms.get("adversarial") or {}).get("optimizer") or {}
    if overrides:
        _check_optimizer("config.task.adversarial.optimizer", config.optimizer.to_dict() | dict(overrides))


# --- keys that hold together ---------------------------------------------------------------------------------------------


def check_together(config: ConfigDict) -> None:
    """Raise ValueError for blocks that contradict each other, and for files and runs that are not there."""
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    if batch_size % accumulate:
        raise ValueError(
            f"config.train.batch_size={batch_size} must be a multiple of config.train.accumulate={accumulate}"
        )
    if experiment.steps_of(config) >= 2**31:
        raise ValueError(
            f"config.train.images={config.train.images} are {experiment.steps_of(config)} steps of {batch_size}; expected "
            "fewer than 2**31"
        )
    file = pathlib.Path(config.init_from.file)
    if config.init_from.file and (not file.is_file() or file.suffix != ".safetensors"):
        raise ValueError(f"config.init_from.file={file}; expected a .safetensors file that diffusers wrote")
    if config.init_from.workdir:
        if config.init_from.file:
            raise ValueError("config.init_from.workdir and config.init_from.file are both set; expected one of them")
        with _blamed(f"config.init_from.workdir={config.init_from.workdir}"):
            experiment.read_config(pathlib.Path(config.init_from.workdir))
    own = construct.options_of(config.task)
    if "train" in own and own["train"] == "decoder" and not (config.init_from.workdir or config.init_from.file):
        raise ValueError(
            "config.task.train='decoder' keeps an encoder that is there; expected config.init_from to name it"
        )
    if config.task.name == "tiny_autoencoder" and not experiment.needs_first_stage(config):
        raise ValueError(
            "config.task.name='tiny_autoencoder' learns from a first stage; expected config.first_stage to name it"
        )
    preview = config.first_stage.preview
    with _blamed(f"config.first_stage.preview={preview}"):
        if preview and experiment.read_config(pathlib.Path(preview)).task.name != "tiny_autoencoder":
            raise ValueError("holds no run of the task tiny_autoencoder")
    if preview and not experiment.needs_first_stage(config):
        raise ValueError(f"config.first_stage.preview={preview}, but this run diffuses in pixels")
    if config.task.name == "diffusion":
        check_sampler(config)
    elif config.condition.label or config.condition.text:
        raise ValueError(
            f"config.condition is {config.condition.to_dict()}, but the task {config.task.name!r} takes no condition"
        )


def check_sampler(config: ConfigDict) -> None:
    """Raise ValueError unless config.sampler can draw from config.process."""
    if config.task.prediction not in PREDICTIONS:
        raise ValueError(f"config.task.prediction={config.task.prediction!r}; there are {', '.join(PREDICTIONS)}")
    settings = experiment.sampling_settings(config)
    for key, name, table, given in (
        ("options", settings.name, SAMPLERS, ()),
        ("grid_options", settings.grid, GRIDS, ("process", "n")),
        (
            "guidance_options",
            settings.guidance_method,
            sampling.METHODS,
            ("pair", "scale", "process", *sampling.SHARED),
        ),
        ("schedule_options", settings.guidance_schedule, sampling.SCHEDULES, ("scale", "neutral", "shape")),
        ("threshold_options", settings.threshold, sampling.THRESHOLDS, ("denoise", "process")),
    ):
        if name in table:  # sampling.check says what there is
            config_keys.check_call(f"config.sampler.{key}", table[name], getattr(settings, key), given)
    with _blamed("config.sampler"):
        sampling.check(settings)
    process = experiment.process(config)
    with _blamed(f"config.sampler.grid={settings.grid!r}, steps={settings.steps}"):
        times = np.asarray(GRIDS[settings.grid](process, settings.steps, **settings.grid_options))
        if not np.isfinite(times).all():
            raise ValueError("gives times that are not finite")


# --- networks ------------------------------------------------------------------------------------------------------------


def first_stage(config: ConfigDict, workdir: pathlib.Path | None = None) -> stages.FirstStage | None:
    """The first stage of a config, its parameters as shapes alone; None for a run that needs none. Raises ValueError as `check`."""
    if not experiment.needs_first_stage(config):
        return None
    named, side = config.first_stage.workdir, config.input.resolution
    with _blamed(f"config.first_stage.workdir={named}"):
        folder = experiment.first_stage_workdir(config, workdir or pathlib.Path())
    if named or (workdir is not None and experiment.is_finished(folder)):
        where = f"config.first_stage.workdir={named or folder}"
        with _blamed(where):
            module = experiment.first_stage_network(folder, config.first_stage.whitening == "measured")
            if not published.is_published(folder):  # a published one has no resolution of its own
                side = experiment.read_config(folder).input.resolution
            params = models.shapes(module, (side, side, 3))["params"]
    else:
        where = f"config.first_stage.config={config.first_stage.config}"
        with _blamed(where):
            own = config_file.load(config.first_stage.config)
            if own.task.name != "autoencoder":
                raise ValueError(f"has the task {own.task.name!r}; expected 'autoencoder'")
            params = check(own).params["autoencoder"]
            module, side = experiment.network(own), own.input.resolution
    with _blamed(where):
        shape = stages.latent_shape(module, side)
        z = jax.ShapeDtypeStruct((1, *shape), np.float32)
        jax.eval_shape(lambda params, z: module.apply({"params": params}, z, method="decode"), params, z)
    if config.data.name != "latents" and side != config.input.resolution:
        with _blamed(f"config.input.resolution={config.input.resolution} with {where}"):
            latent = stages.latent_shape(module, config.input.resolution)
            if latent != shape:
                raise ValueError(f"gives latents of shape {latent}; those of its own resolution, {side}, have {shape}")
    return stages.FirstStage(module, params, np.zeros(shape[-1]), np.ones(shape[-1]), shape)


def shapes(config: ConfigDict, stage: stages.FirstStage | None) -> states.TrainState:
    """The training state of a config, as shapes: every network has then been built once. Raises ValueError naming the block."""
    module = experiment.network(config)
    classes = 0
    if config.task.name == "diffusion":
        classes = _classes(config, module)
        _check_positions(config, module, stage.shape if stage else (config.input.resolution,) * 2)
    with _blamed(_summary(config)):
        task = experiment.make_task(config, stage, classes)
        return jax.eval_shape(lambda: task.init(jax.random.key(0)))


def _classes(config: ConfigDict, module: Any) -> int:
    """How many classes a denoiser was made for; the data is not asked."""
    table = module.num_classes if hasattr(module, "num_classes") else (module.num_class_embeds or 1) - 1
    key = "num_classes" if hasattr(module, "num_classes") else "num_class_embeds"
    if bool(table) != config.condition.label:
        raise ValueError(
            f"config.model.{key}={getattr(module, key)}, but config.condition.label is {config.condition.label}; expected "
            + ("the number of classes" if config.condition.label else "none")
        )
    return table


def _check_positions(config: ConfigDict, module: Any, shape: tuple[int, ...]) -> None:
    if config.model.name != "dit":
        return
    tokens = (shape[0] // module.patch_size) * (shape[1] // module.patch_size)
    if tokens * module.hidden_size > TABLE:
        raise ValueError(
            f"config.model: patch_size={module.patch_size} makes {tokens} patches of {shape[0]} x {shape[1]}, of "
            f"hidden_size={module.hidden_size}; expected a product of at most {TABLE}"
        )


def _summary(config: ConfigDict) -> str:
    """What was set of the network, for an error that does not say."""
    options = ", ".join(
        f"{key}={config_keys.shown(value)}" for key, value in construct.options_of(config.model).items()
    )
    return f"config.task ({config.task.name}) with config.model ({config.model.name}: {options})"


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
