"""An experiment: a config as typed values, parsed once.

`parse` is the only place below cli/ that reads a ConfigDict. Everything else of training/ and evaluation/ takes an Experiment, whose
blocks have the names that they have in configs/base.py, or plain arguments.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax import runs
from ldm_jax.config import config_keys
from ldm_jax.config.construct import Block, block_of, construct
from ldm_jax.data import TOKENIZERS, Tokenizer
from ldm_jax.diffusion.process import PROCESSES, Process
from ldm_jax.kernels.precision import best_dtype
from ldm_jax.models import MODELS
from ldm_jax.runs import checkpoint, record, run
from ldm_jax.training import published_text, sampling, time_input
from ldm_jax.training.state import Averages


class Split(NamedTuple):
    """Names of the data's splits by what they are for."""

    train: str
    tune: str
    report: str


class Input(NamedTuple):
    """How images are prepared, and by how many threads. `resolution`: pixels a side; `entry`, `shape`: of data that is no image."""

    resolution: int
    entry: str
    shape: tuple[int, ...]
    crop: str
    flip: bool
    cache: bool
    num_threads: int
    prefetch: int


class FirstStage(NamedTuple):
    """Where the autoencoder of a latent model is: config.first_stage."""

    config: str
    workdir: str
    whitening: str
    cache: bool
    latents: str
    preview: str


class InitFrom(NamedTuple):
    """Where the first parameters come from: a run and its average, or a file; all empty: fresh ones."""

    workdir: str
    ema: str
    file: str


class Train(NamedTuple):
    """Durations in images; 0 for an interval: at the end only."""

    images: int
    batch_size: int
    accumulate: int
    log_every: int
    validate_every: int
    validate_images: int
    pictures_every: int
    pictures: int
    checkpoint_every: int
    keep: int
    keep_every: int


class Mesh(NamedTuple):
    """Devices by axis, and the rules by which parameters are sharded (kernels/mesh.py)."""

    data: int
    fsdp: int
    tensor: int
    min_size: int
    rules: tuple


class Experiment(NamedTuple):
    """Everything that a config says.

    network     the linen module of config.model, which computes in `dtype`
    process     the diffusion process of config.process, which feeds the number that this network takes
    condition   {name: options} of what a denoiser is conditioned on (training/conditions)
    tokenizer   of captions, and `text`, the encoder that is trained on them; None for a run that takes none
    sampler     how pictures are drawn, `sample_batch_size` at a time
    record      the config as JSON, as DIR/config.json keeps it
    """

    seed: int
    dtype: str
    task: Block
    model: Block
    network: nn.Module
    process: Process
    data: Block
    split: Split
    input: Input
    first_stage: FirstStage
    condition: dict[str, dict[str, Any]]
    tokenizer: Tokenizer | None
    text: nn.Module | None
    sampler: sampling.Settings
    sample_batch_size: int
    optimizer: dict[str, Any]
    averages: Averages
    init_from: InitFrom
    train: Train
    mesh: Mesh
    record: dict[str, Any]

    @property
    def average(self) -> str | None:
        """The average that is used where none is named: the first. None for a run that keeps none."""
        return checkpoint.average(self.averages.half_lives[0]) if self.averages.half_lives else None

    @property
    def steps(self) -> int:
        """Length of the run in steps: train.images, rounded up to whole batches."""
        return run.steps(self.train.images, self.train.batch_size)


def parse(config: ConfigDict) -> Experiment:
    """The experiment of a config that has every key of configs/base.py. Raises ValueError, which names the key that does not fit."""
    dtype = best_dtype() if config.precision == "auto" else config.precision
    network = construct("model", MODELS, block_of(config.model), dtype=dtype)
    tokenizer = text = None
    condition = conditions_of(config.condition)
    if {"text", "published_text"} <= condition.keys():
        raise ValueError(
            "config.condition.text and config.condition.published_text read captions by different tokenizers; expected one"
        )
    if "text" in condition:
        tokenizer = construct("tokenizer", TOKENIZERS, block_of(config.tokenizer))
        sizes = {"vocab_size": tokenizer.vocab_size, "length": tokenizer.length, "pad_id": tokenizer.pad_id}
        text = MODELS["text"](**sizes, dtype=dtype, **config.text.to_dict())
        width = config.model.to_dict().get("text_dim", 0)
        if config.model.name == "dit" and width != config.text.width:
            raise ValueError(f"config.model.text_dim={width} must equal config.text.width={config.text.width}")
    elif "path" in (published := condition.get("published_text", {})):
        try:
            tokenizer = published_text.tokenizer(published["path"])
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"config.condition.published_text.path={published['path']!r}: {error}") from error
    rules = tuple((pattern, tuple(axes)) for pattern, axes in config.mesh.rules)
    return Experiment(
        seed=config.seed,
        dtype=dtype,
        task=block_of(config.task),
        model=block_of(config.model),
        network=network,
        process=_process(config, network),
        data=block_of(config.data),
        split=_typed(Split, config.split),
        input=_typed(Input, config.input),
        first_stage=_typed(FirstStage, config.first_stage),
        condition=condition,
        tokenizer=tokenizer,
        text=text,
        sampler=settings_of(config.sampler),
        sample_batch_size=config.sampler.batch_size,
        optimizer=config.optimizer.to_dict(),
        averages=Averages(tuple(config.ema.half_lives), config.ema.ramp),
        init_from=_typed(InitFrom, config.init_from),
        train=_typed(Train, config.train),
        mesh=_typed(Mesh, config.mesh)._replace(rules=rules),
        record=record.as_json(config),
    )


def of_run(workdir: str | os.PathLike) -> Experiment:
    """The experiment of a run on disk. Raises as runs.read and `parse`."""
    return parse(runs.read(workdir).config)


def settings_of(block: ConfigDict) -> sampling.Settings:
    """The sampling settings of config.sampler."""
    values = {key: value for key, value in block.to_dict().items() if key != "batch_size"}
    return sampling.Settings(**values)


def conditions_of(block: ConfigDict) -> dict[str, dict[str, Any]]:
    """{name: options} of the conditions that config.condition names: True is {}, False is none. ValueError for any other value."""
    chosen = {}
    for name, value in block.items():
        if isinstance(value, bool):
            value = {} if value else None
        elif isinstance(value, ConfigDict | Mapping):
            value = value.to_dict() if isinstance(value, ConfigDict) else dict(value)
        else:
            raise ValueError(
                f"config.condition.{name}={config_keys.shown(value)}; expected True, False or a block of options"
            )
        if value is not None:
            chosen[name] = value
    return chosen


def _typed(cls: type, block: ConfigDict) -> Any:
    return cls(**{name: block[name] for name in cls._fields})


def _process(config: ConfigDict, network: nn.Module) -> Process:
    try:
        process = construct("process", PROCESSES, block_of(config.process))
    except ValueError as error:
        if str(error).startswith("config."):
            raise
        raise ValueError(f"config.process ({config.process.name}): {error}") from error
    return time_input.suited(process, network)
