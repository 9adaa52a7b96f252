"""From an experiment to what the loop needs: its task and its batches."""

import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.data import tokenize
from ldm_jax.sampling.model import Space
from ldm_jax.training import (
    blocks,
    conditions,
    encode,
    frozen_networks,
    open_stage,
    optimizer,
    spaces,
    streams,
)
from ldm_jax.training.experiment import Experiment
from ldm_jax.training.first_stage import FirstStage
from ldm_jax.training.task import Context, Task


class Data(NamedTuple):
    """The batches of an experiment: train_batches(position), endless, from that batch number on; tune_batches(), one pass."""

    train_batches: Callable[[int], Any]
    tune_batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    picture_batch: dict[str, jax.Array]
    picture_captions: list[str] | None


def needs_stage(experiment: Experiment) -> bool:
    """Whether the run works in the latents of an autoencoder, or learns from one."""
    return blocks.kind_of(experiment).stage != "no" and open_stage.is_named(experiment)


def context(
    experiment: Experiment,
    stage: FirstStage | None,
    num_classes: int,
    *,
    preview: FirstStage | None = None,
    load: Callable[[str], tuple[Any, Any]] | None = None,
) -> Context:
    """What the task of an experiment is built from. Computes nothing; the first stage's parameters may be shapes alone."""
    batch_size, total = experiment.train.batch_size, experiment.train.images

    def make(start_images: int = 0, **overrides: Any):
        hyper = experiment.optimizer | overrides
        try:
            return optimizer.make_optimizer(**hyper, batch_size=batch_size, total_images=total - start_images)
        except TypeError as error:
            raise ValueError(f"config.optimizer: {error}") from error

    result = Context(
        network=experiment.network,
        process=experiment.process,
        tokenizer=experiment.tokenizer,
        text=experiment.text,
        num_classes=num_classes,
        settings=experiment.sampler,
        stage=stage,
        preview=preview,
        space=space_of(experiment),
        batch_size=batch_size,
        accumulate=experiment.train.accumulate,
        optimizer=lambda **options: make(**options)[0],
        schedule=make()[1],
        averages=experiment.averages,
        load=load,
    )
    conditioning = conditions.make(result, experiment.condition)
    cached = stage is not None and (experiment.first_stage.cache or experiment.data.name == "latents")
    if cached and "image" in conditioning.needs:
        what = "config.data holds latents" if experiment.data.name == "latents" else "config.first_stage.cache is True"
        raise ValueError(
            f"{what}, but config.condition.{conditioning.rows[0]} is read from images; expected False, and images"
        )
    return result._replace(conditioning=conditioning)


def space_of(experiment: Experiment) -> Space:
    """The space of an experiment's data: config.input."""
    block = experiment.input
    return spaces.of_data(block.entry, block.shape or (block.resolution, block.resolution, 3))


def full_context(experiment: Experiment, stage: FirstStage | None, train: Any) -> Context:
    """The context of a run that is about to train: with the frozen networks that its task and its pictures need."""
    preview = experiment.first_stage.preview
    preview = open_stage.load_preview(pathlib.Path(preview), stage) if preview else None
    return context(experiment, stage, train.num_classes, preview=preview, load=frozen_networks.load)


def task(experiment: Experiment, task_context: Context) -> Task:
    """The task of an experiment. Raises ValueError, which names the key, for what does not fit."""
    try:
        return blocks.kind_of(experiment).make(task_context, **experiment.task.options)
    except TypeError as error:
        raise ValueError(f"config.task ({experiment.task.name}): {error}") from error


def sources(experiment: Experiment) -> tuple[Any, Any]:
    """The images of 'train' and of 'tune'. Raises ValueError as `check_sources`."""
    train, tune = streams.source(experiment, "train"), streams.source(experiment, "tune")
    check_sources(experiment, train, tune)
    return train, tune


def check_sources(experiment: Experiment, train: Any, tune: Any) -> None:
    """Raise ValueError where the images are not what the config asks for: classes, captions, mirroring. Decodes none."""
    kind, name = blocks.kind_of(experiment), experiment.data.name
    for images in (train, tune):
        if getattr(images, "is_latent", False) and not kind.latents:
            raise ValueError(f"config.data holds latents; the task {experiment.task.name} trains on images")
    for words in ("text", "published_text"):
        if words in experiment.condition and not train.has_text:
            raise ValueError(f"config.condition.{words} is set, but the data source {name!r} has no captions")
    if "label" in experiment.condition and not train.num_classes:
        raise ValueError(f"config.condition.label is set, but the data source {name!r} has no labels")
    if kind.check_classes:
        kind.check_classes(experiment.network, "label" in experiment.condition, train.num_classes)
    if experiment.input.flip and not getattr(train, "may_flip", True):
        raise ValueError(
            f"config.input.flip is set, but the captions of the data source {name!r} would not fit mirrored images"
        )


def data(
    experiment: Experiment,
    stage: FirstStage | None,
    workdir: pathlib.Path,
    device_mesh: Mesh,
    train: Any,
    tune: Any,
    say: Callable[[str], None],
    needs: Collection[str] = (),
) -> Data:
    """The batches of an experiment; `needs`: entries of them that its conditions read.

    For a run in latents the images are encoded first, once for all runs with this first stage.
    """
    for images in (train, tune):
        if getattr(images, "is_latent", False):
            encode.check(images, stage)
    if experiment.tokenizer is not None:
        captions = streams.some_captions(train)
        for line in tokenize.lost(experiment.tokenizer, captions, "captions of training", seconds=1):
            say(f"warning: {line}")
    pictures = streams.for_pictures(experiment, tune, device_mesh, "image" in needs)
    if stage is not None and blocks.kind_of(experiment).latents and experiment.input.entry == "image":
        home = open_stage.home_of_latents(experiment, stage, workdir)
        train, tune = encode.encoded(experiment, stage, home, workdir, train, tune, say)

    def tuning() -> Iterator[dict[str, np.ndarray]]:
        size = streams.rows(device_mesh, min(experiment.train.batch_size, 128))
        return streams.one_pass(experiment, tune, size, limit=experiment.train.validate_images)

    return Data(streams.training(experiment, train), tuning, *pictures)
