"""WAYS: how `ldm evaluate` gets the images that it measures, and which flags each way reads.

The task of a run says which way is its own (training.task.Figures). Nothing in evaluation asks which task a run has.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from ldm_jax.evaluation import drawn, images, reconstructions
from ldm_jax.runs import checkpoint
from ldm_jax.training import classifier_guidance, first_stage, restore, sampling, task
from ldm_jax.training.experiment import Experiment


class Request(NamedTuple):
    """Which images are asked for: those of a checkpoint of the run in `workdir`, or of `samples` (an npz or split:NAME).

    `step` None is the newest checkpoint; `ema` None is the run's first average, 'none' the raw parameters. `published` is an
    autoencoder that is measured in place of a run; `run` is this run at this step, where it is restored already. `classifier` is the
    folder and the scale of a classifier that guides. The rest is for images that are drawn: drawn.of_run.
    """

    workdir: pathlib.Path
    config: Experiment
    num: int | None
    step: int | None = None
    ema: str | None = None
    samples: str = ""
    published: first_stage.FirstStage | None = None
    settings: sampling.Settings | None = None
    seed: int = 0
    prompts: str = ""
    labels: str = ""
    first_stage: str = ""
    classifier: tuple[str, float] | None = None
    run: restore.Restored | None = None

    @property
    def average(self) -> str | None:
        """The average whose parameters are measured, by name; None for the raw ones."""
        if self.ema is None:
            return self.config.average
        return None if self.ema == "none" else self.ema


Answer = tuple[images.Images, restore.Restored | None]


def _drawn(request: Request) -> Answer:
    run, guide = request.run or restore.restore(request.workdir, request.step, request.ema, request.first_stage), {}
    if request.classifier is not None:
        where, scale = request.classifier
        classifier = classifier_guidance.read(where, run)
        run = classifier_guidance.guided(run, classifier, scale)
        guide = {"classifier": classifier.sha256, "classifier_scale": scale}
    result = drawn.of_run(
        run,
        request.settings,
        num=request.num,
        seed=request.seed,
        ema=request.average or "none",
        prompts=request.prompts,
        labels=request.labels,
    )
    result.made_by.update(guide)
    if where := request.first_stage:
        result.made_by["first_stage"] = run.model.stage.decoder or checkpoint.identity(where, checkpoint.newest(where))
    return result, run


def _reconstructed(request: Request) -> Answer:
    if request.published is not None:
        return reconstructions.of_published(request.published, request.config, request.num), None
    step = checkpoint.pick(request.workdir, request.step)
    return reconstructions.of_run(request.workdir, request.config, step, request.average, request.num), None


def _real(request: Request) -> Answer:
    split = request.samples.removeprefix("split:") if request.samples else request.config.split.report
    return images.real(request.config, split, request.num), None


def _file(request: Request) -> Answer:
    return images.from_file(pathlib.Path(request.samples)), None


class Way(NamedTuple):
    """A way to get images. `make`(request) gives the images, none of them made yet, and the diffusion model that will draw them.

    It reads the flags `reads`, and `draws` where a metric looks at the images that it draws. `several`: the images of two checkpoints
    differ, so that --step and --watch mean something.
    """

    make: Callable[[Request], Answer]
    reads: tuple[str, ...] = ()
    draws: tuple[str, ...] = ()
    several: bool = False


WAYS: dict[str, Way] = {
    "drawn": Way(
        _drawn,
        reads=("num", "ema"),
        draws=(
            "sampler",
            "grid",
            "guidance",
            "guidance_method",
            "guidance_schedule",
            "guidance_interval",
            "threshold",
            "first_stage",
            "classifier",
            "classifier_scale",
            "prompts",
            "labels",
            "steps",
            "seed",
        ),
        several=True,
    ),
    "reconstructed": Way(_reconstructed, reads=("num", "ema", "out"), several=True),
    "real": Way(_real, reads=("num",)),
    "file": Way(_file),
}


def way_of(samples: str, figures: task.Figures) -> Way:
    """The way to get the images of --samples, or those that the run's task offers."""
    if not samples:
        return WAYS[figures.way]
    return WAYS["real" if samples.startswith("split:") else "file"]
