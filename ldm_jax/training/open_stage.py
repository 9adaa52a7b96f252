"""Opening the first stage of an experiment: where its autoencoder is, its network, its parameters and its whitening.

Four kinds of places hold one (docs/first_stages.md): a run of `ldm train`, DIR/first_stage that this run trains itself, what
`ldm convert --to=orbax` wrote, and a published autoencoder (published.py).
"""

import pathlib
from typing import Any

import numpy as np

from ldm_jax import runs, startup
from ldm_jax.runs import checkpoint
from ldm_jax.training import facts, first_stage, published, streams, whitening
from ldm_jax.training.experiment import Experiment, parse
from ldm_jax.training.first_stage import FirstStage
from ldm_jax.weights import hub

# The task whose runs are first stages, and the task that trains a small autoencoder for previews.
TASK, TINY = "autoencoder", "tiny_autoencoder"


def is_named(experiment: Experiment) -> bool:
    """Whether config.first_stage names an autoencoder."""
    return bool(experiment.first_stage.config or experiment.first_stage.workdir)


def place(experiment: Experiment, workdir: pathlib.Path) -> pathlib.Path:
    """Where the autoencoder is: the run or the published one that the config names; or DIR/first_stage, which is trained there.

    Raises FileNotFoundError for a path that is not there, ValueError for a name of the hub that cannot be fetched.
    """
    named = experiment.first_stage.workdir
    return published.place(named) if named else workdir / "first_stage"


def trained(workdir: pathlib.Path, task: str, step: int | None = None) -> tuple[Experiment, dict[str, Any], int]:
    """A run's experiment, {network: parameters} of its first average (the raw ones where it keeps none) and step (None: the newest).

    Raises ValueError for a run of another task and for a step that it does not have, FileNotFoundError where there is no checkpoint.
    """
    startup.start()
    run = runs.read(workdir)
    run.expect(task)
    step = run.step(step)
    return parse(run.config), run.params(step, run.average), step


def network(path: pathlib.Path, measured: bool = False) -> tuple[Any, int | None]:
    """(the linen module of the autoencoder at `path`, its resolution or None for a published one); its weights are not read.

    `measured` as in published.find. Raises ValueError or FileNotFoundError, one line, for a path without an autoencoder, for a network
    of another kind, and for an option or a class that is not supported.
    """
    if published.is_published(path):
        return published.find(path, measured).module, None
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} holds neither a run of `ldm train` nor an autoencoder: no config.json, no model_index.json"
        )
    run = runs.read(path)
    run.expect(TASK)
    experiment = parse(run.config)
    return experiment.network, experiment.input.resolution


def _images(experiment: Experiment) -> tuple[int, int, int]:
    return experiment.input.resolution, experiment.input.resolution, 3


def load(
    path: pathlib.Path,
    step: int | None = None,
    experiment: Experiment | None = None,
    workdir: pathlib.Path | None = None,
) -> FirstStage:
    """The autoencoder at `path`. Of a finished run: its first average, with the whitening of its latents, which is measured once and
    kept beside it. Of a published one: its own constants. Its sha256 names the latents: a decoder that was tuned alone has that of
    the autoencoder that it began with.

    `experiment`: the one that works in these latents; a published autoencoder has no resolution without it. `workdir`: the folder of
    that run, where measured statistics of a published autoencoder are kept.
    """
    if published.is_published(path):
        if experiment is None:
            raise ValueError(f"{path} holds a published autoencoder; expected a run of `ldm train`")
        measured = experiment.first_stage.whitening == "measured"
        stage = published.load(published.find(path, measured), experiment.input.resolution)
        if not measured or workdir is None:
            return stage
        images = streams.source(experiment, "train")
        if getattr(images, "is_latent", False):
            return first_stage.whitened(stage, images.mean, images.std)
        return _whitened(workdir, stage, experiment)
    of_stage, params, step = trained(path, TASK, step)
    shape = first_stage.latent_shape(of_stage.network, _images(of_stage))
    stage = FirstStage(of_stage.network, params["autoencoder"], None, None, shape, name_of_latents(path, step))
    return _whitened(path, stage, of_stage)


def _whitened(folder: pathlib.Path, stage: FirstStage, experiment: Experiment) -> FirstStage:
    """The stage with the statistics in `folder`; where they are missing they are measured over the training images."""
    mean, std = whitening.load_or_measure(
        folder / "whitening.json",
        stage,
        lambda: streams.one_pass(experiment, streams.source(experiment, "train"), batch_size=64, limit=4096),
    )
    return first_stage.whitened(stage, mean, std)


def check_finished(path: pathlib.Path) -> None:
    """Raise ValueError or FileNotFoundError unless `path` holds a published autoencoder or a finished run of one."""
    if published.is_published(path):
        published.find(path, measured=True)
        return
    run = runs.read(path)
    run.expect(TASK)
    if not run.is_finished:
        raise ValueError(f"{path} holds no finished first stage")


def check_preview(path: pathlib.Path) -> None:
    """Raise ValueError unless `path` holds a run of the task tiny_autoencoder."""
    runs.read(path).expect(TINY)


def load_tiny(workdir: pathlib.Path, step: int | None = None) -> FirstStage:
    """The network of a run of the task tiny_autoencoder as a first stage, whose latents are whitened already."""
    experiment, params, _ = trained(workdir, TINY, step)
    shape = first_stage.latent_shape(experiment.network, _images(experiment))
    channels = shape[-1]
    return FirstStage(experiment.network, params["autoencoder"], np.zeros(channels), np.ones(channels), shape)


def load_any(workdir: pathlib.Path, step: int | None = None) -> FirstStage:
    """The autoencoder of a run of either task that trains one."""
    return (load_tiny if runs.read(workdir).is_of(TINY) else load)(workdir, step)


def load_preview(workdir: pathlib.Path, stage: FirstStage) -> FirstStage:
    """`load_tiny` for pictures in the latents of `stage`. Raises ValueError for a run that learned from another first stage."""
    run = runs.read(workdir)
    tiny = load_tiny(workdir)
    facts.check(workdir, facts.of_meta(run.meta(run.step())), facts_of(stage))
    return tiny


def facts_of(stage: FirstStage | None) -> facts.Facts:
    """What a run in the latents of a first stage depends on: see facts.py."""
    if stage is None:
        return {}
    return {
        facts.FIRST_STAGE: stage.sha256,
        facts.DECODER: stage.decoder,
        facts.MEAN: np.asarray(stage.mean, float).tolist(),
        facts.STD: np.asarray(stage.std, float).tolist(),
    }


def name_of_latents(workdir: pathlib.Path, step: int) -> str:
    """The sha256 of an autoencoder's checkpoint, or of the one whose encoder it has kept."""
    try:
        kept = checkpoint.restore_meta(workdir, step).get("latents_of")
    except FileNotFoundError:  # what `ldm convert --to=orbax` wrote: parameters alone
        kept = None
    return kept or checkpoint.identity(workdir, step)


def home_of_latents(experiment: Experiment, stage: FirstStage, workdir: pathlib.Path) -> pathlib.Path:
    """The folder of this stage's latent caches: its own, so that runs share them; this run's where it has none."""
    if stage.published is None:
        return place(experiment, workdir)
    home = stage.published.path
    return home if home.is_dir() and not experiment.first_stage.workdir.startswith(hub.PREFIX) else workdir
