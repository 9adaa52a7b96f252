"""The two names of the package, `ldm_jax.load` and `ldm_jax.train`.

Here is recognised what lies at a place. What it can do is loaded.Loaded.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import pipelines, runs, startup, weights
from ldm_jax import plugins as plugin_files
from ldm_jax.config import config_file
from ldm_jax.data import archive
from ldm_jax.evaluation import subject
from ldm_jax.kernels import heap
from ldm_jax.loaded import Coder, Loaded
from ldm_jax.pipelines import Pipeline
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.drawable import Frame
from ldm_jax.runs import plugin_record
from ldm_jax.runs.run import is_run
from ldm_jax.runs.stopped import Stopped
from ldm_jax.training import blocks, classifier_guidance, drawable, loop, open_stage, published, restore
from ldm_jax.weights import autoencoders, files, hub, single_file


def load(
    place: str | os.PathLike,
    *,
    step: int | None = None,
    ema: str | int | None = None,
    first_stage: str | os.PathLike = "",
    classifier: str | os.PathLike | None = None,
    classifier_scale: float | None = None,
    plugins: Sequence[str | os.PathLike] = (),
    offload: bool = False,
    tile: int | None = None,
    dtype: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction: str | None = None,
    kind: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Loaded:
    """A run of `ldm train`, a published pipeline or autoencoder: a folder, a single file, or hub:OWNER/NAME, as one object.

    step         of a run: which checkpoint (None: the newest)
    ema          of a diffusion run: an average by its half-life in images, 'none' for the raw parameters (None: the first average)
    first_stage  of a diffusion run: another autoencoder of the same latents
    classifier   of a diffusion run: the run of a classifier of noisy data that guides it, by classifier_scale (1)
    plugins      files that add to the tables (docs/plugins.md); those that a run was trained with are loaded by themselves
    offload      keep the parameters in the host's memory, and on the device while they are used
    tile         encode and decode in tiles of so many pixels
    dtype, tokenizer, prediction, kind, options    of a published pipeline: as in pipelines.load

    A path is looked for from the current folder, then below $LDM_DATA. Raises FileNotFoundError, and ValueError for what is damaged,
    unknown or of another kind, and for an option that does not go with it.
    """
    startup.start()
    plugin_files.load_installed()
    plugin_files.load(plugins)
    path, where = _path(place), os.fspath(place)
    of_run = {"step": step, "ema": ema, "first_stage": os.fspath(first_stage) or None}
    of_run |= {"classifier": classifier, "classifier_scale": classifier_scale}
    of_pipeline = {"dtype": dtype, "tokenizer": tokenizer, "prediction": prediction, "kind": kind, "options": options}
    of_run, of_pipeline = ({k: v for k, v in each.items() if v is not None} for each in (of_run, of_pipeline))
    if path.is_dir() and is_run(path) and not published.is_start(path):
        _refuse(where, "a run of `ldm train`", of_pipeline)
        return _run(path, where, of_run, offload, tile)
    if _is_pipeline(path, kind):
        _refuse(where, "a published pipeline", of_run)
        pipeline = pipelines.load(path, offload=offload, tile=tile, **of_pipeline)
        return Loaded(where, f"a published {pipeline.name}{_size(pipeline)}", pipeline)
    _refuse(where, "a published autoencoder", of_run | of_pipeline)
    return _autoencoder(path, where, offload, tile)


def _path(place: str | os.PathLike) -> pathlib.Path:
    if not os.fspath(place):
        raise ValueError("the place is empty; expected a run, a published model, or hub:OWNER/NAME")
    path = hub.resolve(place)
    if path.exists():
        return path
    try:
        return archive.resolve(place)
    except FileNotFoundError as error:
        looked = str(error).partition(": ")[2]
        raise FileNotFoundError(f"{place}: no such run, and no published model: {looked}") from None


def _refuse(where: str, what: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        raise ValueError(f"{name}={value!r} does not go with {where}, which is {what}")


def _is_pipeline(path: pathlib.Path, kind: str | None) -> bool:
    """Whether the published model at `path` is more than an autoencoder. ValueError where there is none."""
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return True
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{path} holds no run of `ldm train` and no published model: it has no config.json and no model_index.json"
            )
        return False
    beside = path.parent / "config.json"
    if beside.is_file() and weights.class_named(files.read_json(beside)):
        return False
    shapes = {name: tensor.shape for name, tensor in files.open_tensors(path).items()}
    try:
        kind = kind or single_file.identify(shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return kind not in single_file.KINDS or "unet" in single_file.parts(kind)


def _size(pipeline: Pipeline) -> str:
    """The size of its pictures, in words."""
    if pipeline.frame.latent is None:
        return ""
    shape, size = pipeline.frame.shape(None)
    x = "" if pipeline.space.bounded else f", latents {_by(shape)}"
    of = ["text"] * pipeline.takes.prompts + [f"{pipeline.takes.classes} classes"] * bool(pipeline.takes.classes)
    return f" of {' and '.join(of) or 'pictures alone'}: {_by(size)} pixels{x}"


def _by(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))


def _run(path: pathlib.Path, where: str, options: dict[str, Any], offload: bool, tile: int | None) -> Loaded:
    measured, run = subject.of_run(path), runs.read(path)
    config, step = measured.config, options.get("step")
    task = blocks.kind_of(config)
    if task.model is not None:
        return _diffusion_run(where, measured, options, offload, tile)
    name = f"a run of the task {config.task.name!r}"
    step, network = run.step(step), type(config.network).__name__
    if task.network != "autoencoder":
        _refuse(where, f"{name}, of which the newest checkpoint is measured", options)
        return Loaded(where, f"{name} ({network}) at step {step}", measured=measured, step=step)
    _refuse(where, name, {key: value for key, value in options.items() if key != "step"})
    _check_tile(tile, config.network)

    @functools.cache
    def coder() -> Coder:
        stage = open_stage.load_any(path, step)
        shift, factor = stage.mean, config.input.resolution // stage.shape[0]
        return _coder(stage.network, stage.params, 1 / stage.std, shift, stage.shape, factor, offload, tile)

    return Loaded(where, f"{name} ({network}) at step {step}", None, None, coder, measured, step)


def _diffusion_run(
    where: str, measured: subject.Subject, options: dict[str, Any], offload: bool, tile: int | None
) -> Loaded:
    ema, first_stage = options.get("ema"), options.get("first_stage", "")
    ema = None if ema is None else str(ema)
    restored = restore.restore(measured.home, options.get("step"), ema, first_stage)
    measured, run, by = measured._replace(run=restored, ema=ema, first_stage=first_stage), restored, ""
    if "classifier" in options:
        classifier, scale = os.fspath(options["classifier"]), float(options.get("classifier_scale", 1))
        if not 0 <= scale <= 1000:
            raise ValueError(f"classifier_scale={scale:g}; expected a number from 0 to 1000")
        run = classifier_guidance.guided(run, classifier_guidance.read(classifier, run), scale)
        measured, by = measured._replace(classifier=(classifier, scale)), f", guided by {classifier}"
    elif "classifier_scale" in options:
        raise ValueError(f"classifier_scale={options['classifier_scale']} goes with classifier=DIR")
    pipeline = drawable.pipeline(run, where, offload=offload, tile=tile)
    average = ema or measured.config.average or "none"
    holds = f"a diffusion run at step {run.step}, average {average}{by},{_size(pipeline)}"
    return Loaded(where, holds, pipeline, run, None, measured, run.step, {})


def _autoencoder(path: pathlib.Path, where: str, offload: bool, tile: int | None) -> Loaded:
    part = published.find(path)
    network, factor, side = part.module, L.factor(part.module), part.config.get("sample_size") or 0
    side = (side if isinstance(side, int) else side[0]) // factor
    shape = (side, side, autoencoders.channels(network))
    _check_tile(tile, network)
    coder = _coder(network, part.read(), part.scale, part.shift, shape, factor, offload, tile)

    def measured(data: str, out: str) -> subject.Subject:
        if not data or not out:
            raise ValueError(
                f"{where} is a published autoencoder: expected data='CONFIG.py', whose reporting images it is shown, and out='DIR'"
            )
        return subject.of_published(path, data, pathlib.Path(out))

    holds = f"a published {type(network).__name__} of {shape[-1]} channels, scaled by {published.constants(part)}"
    return Loaded(where, holds, None, None, lambda: coder, measured)


def _check_tile(tile: int | None, network: Any) -> None:
    if tile is not None:
        L.check_tile(tile, network, f"an autoencoder of the class {type(network).__name__}")


def _coder(
    network: Any,
    params: Any,
    scale: Any,
    shift: Any,
    shape: Sequence[int],
    factor: int,
    offload: bool,
    tile: int | None,
) -> Coder:
    """z = (z_raw - shift) scale of an autoencoder, for pictures of any size that it halves."""
    params = {"autoencoder": params, "scale": np.asarray(scale, np.float32), "shift": np.asarray(shift, np.float32)}
    params = params if offload else jax.device_put(params)
    space = L.space(drawable.hashable(network), tuple(shape), tile)
    return Coder(space, params, Frame(factor, factor, None, shape[-1]), offload)


def train(
    config: ConfigDict | str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[str | os.PathLike] = (),
    quiet: bool = False,
) -> Loaded:
    """Train what a config describes in `workdir`, or go on with it, and return what `load(workdir)` gives.

    config     'configs/NAME.py:ARG', or a ConfigDict that begins with configs.base.get_config()
    overrides  {'train.images': 10_000, 'model.dropout': 0.1}: keys as in --config.KEY=VALUE of `ldm train`
    plugins    files that add to the tables; the run remembers them

    A missing first stage is trained on the way. Raises ValueError for a config that cannot run, or is not the one that `workdir` was
    started with; Stopped where training ends early.
    """
    heap.keep()
    startup.start()
    plugin_files.load_installed()
    in_use = plugin_files.load(plugins)
    if os.fspath(workdir):
        in_use += plugin_record.load(pathlib.Path(workdir))
    words = [f"--config.{key}={value}" for key, value in (overrides or {}).items()]
    if isinstance(config, ConfigDict):
        config = config_file.complete(ConfigDict(config.to_dict()), "of a ConfigDict", words, blocks.arguments)
    else:
        config = config_file.load(os.fspath(config), words, blocks.arguments)
    outcome = loop.train(config, workdir, quiet=quiet, in_use=list(dict.fromkeys(in_use)))
    if not outcome["finished"]:
        raise Stopped(f"{workdir}: stopped at step {outcome['step']}; the same call goes on")
    return load(workdir)
