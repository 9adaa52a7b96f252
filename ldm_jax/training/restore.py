"""A trained run as a model to draw from, with its parameters."""

import os
import pathlib
from typing import Any, NamedTuple

from ldm_jax import runs, startup
from ldm_jax.training import blocks, build, conditioning, facts, frozen_networks, open_stage, published, sampling
from ldm_jax.training.experiment import Experiment, parse
from ldm_jax.training.first_stage import FirstStage, whitened
from ldm_jax.training.tasks import TASKS


class Restored(NamedTuple):
    """A trained run that draws. `params` and `frozen` are host arrays; `sha256` names the checkpoint; `dataset` is dataset.json."""

    experiment: Experiment
    model: sampling.Model
    params: dict[str, Any]
    frozen: dict[str, Any]
    step: int
    sha256: str
    dataset: dict[str, Any]


def restore(
    workdir: str | os.PathLike, step: int | None = None, average: str | None = None, first_stage: str = ""
) -> Restored:
    """The model of a run at a step (None: the newest), with an average's parameters ('none': the raw ones; None: the first average).

    `first_stage`: an autoencoder to decode with, a run or a published one, in the place of the config's: one of the same latents.
    Raises ValueError for a run that draws nothing, FileNotFoundError for a first stage that is not where the config says.
    """
    startup.start()
    run = runs.read(pathlib.Path(workdir).absolute())
    experiment = parse(run.config)
    kind = blocks.kind_of(experiment)
    if kind.model is None:
        draws = ", ".join(repr(name) for name, other in TASKS.items() if other.model is not None)
        raise ValueError(f"{run.workdir} holds a run of the task {experiment.task.name!r}; only {draws} draws images")
    step = run.step(step)
    params = run.params(step, run.named_average(average))
    stage, meta = None, run.meta(step)
    stated = facts.of_meta(meta)
    if build.needs_stage(experiment):
        stage = _stage(experiment, run.workdir, first_stage)
        if first_stage and facts.MEAN in stated:
            # The whitening that the run was trained with, whatever images the other autoencoder was measured on.
            stage = whitened(stage, stated[facts.MEAN], stated[facts.STD])
        current = open_stage.facts_of(stage)
        facts.check(run.workdir, stated, {k: v for k, v in current.items() if not (first_stage and k == facts.DECODER)})
    elif first_stage:
        raise ValueError(f"{run.workdir} is a run in pixels, which has no first stage; met {first_stage}")
    context = build.context(experiment, stage, run.dataset["num_classes"], load=frozen_networks.load)
    facts.check(run.workdir, stated, facts.of_task(conditioning.facts(context.conditioning)))
    model = kind.model(context, **experiment.task.options)
    return Restored(experiment, model, params, sampling.frozen(model), step, run.identity(step), run.dataset)


def _stage(experiment: Experiment, workdir: pathlib.Path, first_stage: str) -> FirstStage:
    try:
        path = published.place(first_stage) if first_stage else open_stage.place(experiment, workdir)
    except FileNotFoundError as error:
        hint = "" if first_stage else "; --first-stage=PLACE names where it lies now"
        raise FileNotFoundError(f"{error}{hint}") from None
    return open_stage.load(path, experiment=experiment, workdir=workdir)
