"""From a config to the things it names: data, networks, task. With the loop, the only place below cli/ that reads a config."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict

from ldm_jax import runs, startup, weights
from ldm_jax.config.construct import construct, named, options_of
from ldm_jax.data import SOURCES, TOKENIZERS, Tokenizer, eval_batches, tokenize, train_batches
from ldm_jax.data.subset import spread
from ldm_jax.diffusion.prediction import PREDICTIONS
from ldm_jax.diffusion.process import PROCESSES, Process
from ldm_jax.kernels import mesh
from ldm_jax.kernels.precision import best_dtype
from ldm_jax.models import MODELS, vq
from ldm_jax.runs import checkpoint
from ldm_jax.runs.run import steps
from ldm_jax.training import conditioning as conditions
from ldm_jax.training import dataset, latents, published, sampling, time_input, whitening
from ldm_jax.training import first_stage as stages
from ldm_jax.training import optimizer as optimizers
from ldm_jax.training import state as states
from ldm_jax.training.task import Context, Task
from ldm_jax.training.tasks import TASKS
from ldm_jax.weights import files, hub, lpips


class Built(NamedTuple):
    """What the loop needs of a config."""

    task: Task
    train_batches: Callable[[int], Any]
    tune_batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    picture_batch: dict[str, jax.Array]
    picture_captions: list[str] | None


def steps_of(config: ConfigDict) -> int:
    """Length of a run in steps: config.train.images, rounded up to whole batches."""
    return steps(config.train.images, config.train.batch_size)


# --- data ----------------------------------------------------------------------------------------------------------------


def source(config: ConfigDict, role: str) -> Any:
    """The images that `role` ('train', 'tune' or 'report') reads; its split is named in config.split."""
    return construct("data", SOURCES, config.data, split=config.split[role])


def sources(config: ConfigDict) -> tuple[Any, Any]:
    """The images of 'train' and of 'tune'. Raises ValueError as `check_sources`."""
    train, tune = source(config, "train"), source(config, "tune")
    check_sources(config, train, tune)
    return train, tune


def check_sources(config: ConfigDict, train: Any, tune: Any) -> None:
    """Raise ValueError where the images are not what the config asks for: classes, captions, mirroring. Decodes none."""
    name, task, classes = config.data.name, config.task.name, train.num_classes
    for images in (train, tune):
        if getattr(images, "is_latent", False) and task != "diffusion":
            raise ValueError(f"config.data holds latents; the task {task} trains on images")
    if task == "diffusion" and config.condition.text and not train.has_text:
        raise ValueError(f"config.condition.text is set, but the data source {name!r} has no captions")
    if task == "diffusion" and config.condition.label and not classes:
        raise ValueError(f"config.condition.label is set, but the data source {name!r} has no labels")
    module = network(config)
    if task == "classifier" and module.num_classes != classes:
        raise ValueError(f"config.model.num_classes={module.num_classes}, but the data has {classes} classes")
    if task == "diffusion":
        check_classes(config, module, classes)
    if config.input.flip and not getattr(train, "may_flip", True):
        raise ValueError(
            f"config.input.flip is set, but the captions of the data source {name!r} would not fit mirrored images"
        )


def tokenizer(config: ConfigDict) -> Tokenizer | None:
    """The tokenizer of a run that takes captions, or None."""
    if not config.condition.text:
        return None
    return construct("tokenizer", TOKENIZERS, config.tokenizer)


def one_pass(
    config: ConfigDict,
    images: Any,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Each image once, in order, prepared as in training but never flipped; 'valid' is False in the rows that fill up.

    With a `limit`, that many at even distances. Of several processes each gets its part of the rows of each batch.
    """
    return eval_batches(
        spread(images, limit or len(images)),
        batch_size=batch_size,
        resolution=config.input.resolution,
        crop=config.input.crop,
        tokenizer=tokenizer(config),
        process_index=process_index,
        process_count=process_count,
        num_threads=config.input.num_threads,
        prefetch=config.input.prefetch,
    )


# --- networks ------------------------------------------------------------------------------------------------------------


def dtype(config: ConfigDict) -> str:
    """What networks compute in; 'auto' is settled by this machine's hardware."""
    return best_dtype() if config.precision == "auto" else config.precision


def network(config: ConfigDict) -> Any:
    """The linen module of config.model. ValueError for an unknown name or key."""
    return construct("model", MODELS, config.model, dtype=dtype(config))


def process(config: ConfigDict) -> Process:
    """The diffusion process of config.process, which feeds what config.model takes. ValueError for an unknown name or key."""
    try:
        path = construct("process", PROCESSES, config.process)
    except ValueError as error:
        if str(error).startswith("config."):
            raise
        raise ValueError(f"config.process ({config.process.name}): {error}") from error
    return time_input.suited(path, network(config))


def conditioning(config: ConfigDict, num_classes: int) -> conditions.Conditioning:
    """What a diffusion run is conditioned on: classes, captions, both or nothing. ValueError if widths do not fit."""
    tokens = tokenizer(config)
    text = None
    if tokens is not None:
        takes = config.model.to_dict().get("text_dim", 0)
        if config.model.name == "dit" and takes != config.text.width:
            raise ValueError(f"config.model.text_dim={takes} must equal config.text.width={config.text.width}")
        text = MODELS["text"](
            vocab_size=tokens.vocab_size,
            length=tokens.length,
            pad_id=tokens.pad_id,
            dtype=dtype(config),
            **config.text.to_dict(),
        )
    return conditions.Conditioning(
        num_classes if config.condition.label else 0, text, None if tokens is None else tokens.encode("")
    )


def sampling_settings(config: ConfigDict) -> sampling.Settings:
    """The run's own sampling settings, `config.sampler`."""
    s = config.sampler
    return sampling.Settings(
        name=s.name,
        steps=s.steps,
        grid=s.grid,
        guidance=s.guidance,
        t_lo=s.t_lo,
        t_hi=s.t_hi,
        rescale=s.rescale,
        options=s.options.to_dict(),
        grid_options=s.grid_options.to_dict(),
        guidance_method=s.guidance_method,
        guidance_options=s.guidance_options.to_dict(),
        guidance_schedule=s.guidance_schedule,
        schedule_options=s.schedule_options.to_dict(),
        threshold=s.threshold,
        threshold_options=s.threshold_options.to_dict(),
    )


def check_classes(config: ConfigDict, module: Any, num_classes: int) -> None:
    """Raise ValueError unless a denoiser has the table of classes that config.condition.label and the data ask for."""
    count = num_classes if config.condition.label else 0
    # A table with a row for the null class: `num_classes` of DiT counts without it, `num_class_embeds` of the U-Net with it.
    for key, expected in (("num_classes", count), ("num_class_embeds", count + 1 if count else None)):
        if hasattr(module, key) and getattr(module, key) != expected:
            raise ValueError(
                f"config.model.{key}={getattr(module, key)}; the data has {num_classes} classes and config.condition.label is "
                f"{config.condition.label}, so expected {expected}"
            )


def diffusion_model(config: ConfigDict, stage: stages.FirstStage | None, num_classes: int) -> sampling.Model:
    """The model of a diffusion config. Raises ValueError when network, data and first stage do not fit together."""
    side = config.input.resolution
    shape = stage.shape if stage else (side, side, 3)
    module = network(config)
    check_classes(config, module, num_classes)
    if module.in_channels != shape[-1]:
        raise ValueError(f"config.model.in_channels={module.in_channels}, but what is modelled has shape {shape}")
    if config.task.prediction not in PREDICTIONS:
        raise ValueError(f"config.task.prediction={config.task.prediction!r}; there are {', '.join(PREDICTIONS)}")
    learned, path = "learned_variance" in config.task and config.task.learned_variance, process(config)
    channels = shape[-1] * (2 if learned else 1)
    if (module.out_channels or module.in_channels) != channels:
        raise ValueError(
            f"config.model.out_channels={module.out_channels}, but {shape[-1]} channels are modelled and "
            f"config.task.learned_variance is {learned}, so expected {channels}"
        )
    if learned and path.levels is None:
        raise ValueError(f"config.task.learned_variance needs a table, but config.process.name={config.process.name!r}")
    return sampling.Model(
        module, conditioning(config, num_classes), stage, path, config.task.prediction, shape, learned
    )


# --- the first stage -----------------------------------------------------------------------------------------------------


def needs_first_stage(config: ConfigDict) -> bool:
    """Whether a run diffuses in the latents of an autoencoder, or learns from one."""
    named = bool(config.first_stage.config or config.first_stage.workdir)
    return config.task.name in ("diffusion", "tiny_autoencoder") and named


def first_stage_workdir(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Where the autoencoder lies: the run, or the published one, that the config names; or DIR/first_stage, trained there.

    Raises FileNotFoundError for a path that is not there, ValueError for a name of the hub that cannot be fetched.
    """
    named = config.first_stage.workdir
    return published.place(named) if named else workdir / "first_stage"


def first_stage_network(path: pathlib.Path, measured: bool = False) -> Any:
    """The linen module of the autoencoder at `path`, a run's or a published one, without its weights being read.

    `measured` as in published.find. stages.latent_shape tells the shape of its latents. Raises ValueError or FileNotFoundError, one
    line, for a path without an autoencoder, for a network of another kind, and for an option or a class that is not supported.
    """
    if published.is_published(path):
        return published.find(path, measured).module
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} holds neither a run of `ldm train` nor an autoencoder: no config.json, no model_index.json"
        )
    config = read_config(path)
    if config.task.name != "autoencoder":
        raise ValueError(f"{path} holds a run of the task {config.task.name!r}; expected 'autoencoder'")
    return network(config)


def trained(workdir: pathlib.Path, task: str, step: int | None = None) -> tuple[ConfigDict, dict[str, Any], int]:
    """A run's config, {network: parameters} of its first average (the plain ones where it keeps none) and step (default: the newest).

    Raises ValueError for a run of another task and for a step that it has not, FileNotFoundError where there is no checkpoint.
    """
    startup.start()
    config = read_config(workdir)
    if config.task.name != task:
        raise ValueError(f"{workdir} holds a run of the task {config.task.name!r}; expected {task!r}")
    step = checkpoint.pick(workdir, step)
    return config, checkpoint.restore_params(workdir, step, default_average(config)), step


def load_first_stage(
    path: pathlib.Path,
    step: int | None = None,
    config: ConfigDict | None = None,
    workdir: pathlib.Path | None = None,
) -> stages.FirstStage:
    """The autoencoder at `path`: of a finished run, its first average, with the whitening of its latents (measured once, kept beside
    it); or a published one, with its own constants. Its sha256 names the latents: a decoder that was tuned alone has that of the
    autoencoder that it began with.

    `config` is that of the run that works in these latents: a published autoencoder has no resolution of its own. `workdir`: that
    run's folder, where statistics are kept if it asks for measured ones.
    """
    if published.is_published(path):
        if config is None:
            raise ValueError(f"{path} holds a published autoencoder; expected a run of `ldm train`")
        measured = config.first_stage.whitening == "measured"
        stage = published.load(published.find(path, measured), config.input.resolution)
        if not measured or workdir is None:
            return stage
        images = source(config, "train")
        if getattr(images, "is_latent", False):
            return stage._replace(mean=np.float32(images.mean), std=np.float32(images.std))
        return _whitened(workdir, stage, config)
    own, params, step = trained(path, "autoencoder", step)
    module = network(own)
    shape = stages.latent_shape(module, own.input.resolution)
    stage = stages.FirstStage(module, params["autoencoder"], None, None, shape, name_of_latents(path, step))
    return _whitened(path, stage, own)


def _whitened(folder: pathlib.Path, stage: stages.FirstStage, config: ConfigDict) -> stages.FirstStage:
    """The stage with the statistics in `folder`, measured now over the config's training images where they are missing."""
    mean, std = whitening.load_or_measure(
        folder / "whitening.json",
        stage,
        lambda: one_pass(config, source(config, "train"), batch_size=64, limit=4096),
    )
    return stage._replace(mean=mean, std=std)


def load_student(workdir: pathlib.Path, step: int | None = None) -> tuple[Any, Any]:
    """(module, parameters) of a run of the task tiny_autoencoder, its first average. Raises ValueError for another task's run."""
    config, params, _ = trained(workdir, "tiny_autoencoder", step)
    return network(config), params["autoencoder"]


def load_preview(workdir: pathlib.Path, stage: stages.FirstStage) -> stages.FirstStage:
    """The network of a run of the task tiny_autoencoder as a first stage, whose latents are whitened already.

    Raises ValueError for another task's run, and for one that learned from another first stage than `stage`.
    """
    config, params, step = trained(workdir, "tiny_autoencoder")
    same_first_stage(workdir, checkpoint.restore_meta(workdir, step), stage)
    channels = stage.shape[-1]
    return stages.FirstStage(network(config), params["autoencoder"], np.zeros(channels), np.ones(channels), stage.shape)


def load_classifier(workdir: pathlib.Path) -> tuple[Any, Any]:
    """(module, parameters) of a run of the task classifier, its first average. Raises ValueError for another task's run."""
    config, params, _ = trained(workdir, "classifier")
    if not is_finished(workdir):
        raise ValueError(f"{workdir} is not finished; expected a classifier that no longer changes")
    return network(config), params["classifier"]


# --- everything for training ---------------------------------------------------------------------------------------------


def load_frozen(name: str) -> tuple[Any, Any]:
    """(module, parameters) of a frozen network: see `load` of task.Context. Raises ValueError for a kind that there is not."""
    kind, _, where = name.partition(":")
    loaders = {
        "classifier": lambda: load_classifier(pathlib.Path(where)),
        "dinov2": lambda: weights.load(where),
        "lpips": lambda: lpips.load(*where.split(",")),
    }
    if kind not in loaders:
        raise ValueError(f"{name!r} names no frozen network; expected {', '.join(f'{kind}:...' for kind in loaders)}")
    return loaders[kind]()


def make_task(
    config: ConfigDict,
    stage: stages.FirstStage | None,
    num_classes: int,
    *,
    preview: stages.FirstStage | None = None,
    load: Callable[[str], tuple[Any, Any]] | None = None,
) -> Task:
    """The task of a config, with the networks that were loaded for it, and what loads others: see task.Context.

    Computes nothing, and takes a first stage whose parameters are shapes alone.
    """
    batch_size, total = config.train.batch_size, config.train.images

    def optimizer(start_images=0, **overrides):
        hyper = config.optimizer.to_dict() | overrides
        return optimizers.make_optimizer(**hyper, batch_size=batch_size, total_images=total - start_images)

    try:
        schedule = optimizer()[1]
    except TypeError as error:
        raise ValueError(f"config.optimizer: {error}") from error
    make, diffuses = named("task", TASKS, config.task), config.task.name == "diffusion"
    context = Context(
        network=network(config),
        batch_size=batch_size,
        accumulate=config.train.accumulate,
        resolution=config.input.resolution,
        optimizer=lambda *args, **overrides: optimizer(*args, **overrides)[0],
        schedule=schedule,
        averages=states.Averages(tuple(config.ema.half_lives), config.ema.ramp),
        model=diffusion_model(config, stage, num_classes) if diffuses else None,
        settings=sampling_settings(config) if diffuses else None,
        stage=stage,
        preview=preview,
        load=load,
    )
    try:
        return make(context, **options_of(config.task))
    except TypeError as error:
        raise ValueError(f"config.task ({config.task.name}): {error}") from error


def build(
    config: ConfigDict,
    workdir: pathlib.Path,
    stage: stages.FirstStage | None,
    device_mesh: Mesh,
    say: Callable[[str], None],
) -> Built:
    """Data and task of a config; with a first stage and its cache, the data set is encoded on the way."""
    train, tune = sources(config)
    for images in (train, tune):
        if getattr(images, "is_latent", False):
            latents.check(images, stage)
    preview = config.first_stage.preview
    preview = load_preview(pathlib.Path(preview), stage) if preview else None
    task = make_task(config, stage, train.num_classes, preview=preview, load=load_frozen)
    batch_size = config.train.batch_size

    for line in dataset.lines(config, train, tune):
        say(line)
    if jax.process_index() == 0:
        write_dataset(workdir, train, tune)
    if config.task.name == "diffusion" and config.condition.text:
        for line in tokenize.lost(tokenizer(config), some_captions(train), "captions of training", seconds=1):
            say(f"warning: {line}")
    pictures, captions = picture_batch(config, tune, device_mesh)
    latent = config.task.name == "diffusion" and stage is not None
    if latent and config.first_stage.cache and not getattr(train, "is_latent", False):
        stage_dir = latents_home(config, stage, workdir)
        root = pathlib.Path(config.first_stage.latents or latents.folder(config, stage, stage_dir, workdir, train))
        limit = config.train.validate_images
        train = latents.cached(config, root, "train", stage, train, flip=config.input.flip, say=say)
        tune = latents.cached(
            config, root, "tune", stage, tune, flip=False, source_split=config.split.tune, limit=limit, say=say
        )

    def training(position: int):
        return train_batches(
            train,
            batch_size=batch_size,
            seed=config.seed,
            resolution=config.input.resolution,
            crop=config.input.crop,
            flip=config.input.flip,
            tokenizer=tokenizer(config),
            start_batch=position,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.input.num_threads,
            prefetch=config.input.prefetch,
            cache=config.input.cache and not getattr(train, "is_latent", False),
        )

    def tuning():
        return one_pass(
            config, tune, batch_size=rows(device_mesh, min(batch_size, 128)), limit=config.train.validate_images
        )

    return Built(task, training, tuning, pictures, captions)


def latents_home(config: ConfigDict, stage: stages.FirstStage, workdir: pathlib.Path) -> pathlib.Path:
    """The folder that caches of this stage's latents go to: its own, so that runs share them; this run's where it has none."""
    if stage.published is None:
        return first_stage_workdir(config, workdir)
    home = stage.published.path
    return home if home.is_dir() and not config.first_stage.workdir.startswith(hub.PREFIX) else workdir


def some_captions(images: Any, most: int = 10_000) -> Iterator[str]:
    """Captions of `most` images at random, always the same ones: folders are ordered by class."""
    held = getattr(images, "captions", None)  # of all images at once, where no image has to be decoded for it
    for i in np.random.default_rng(0).permutation(len(images))[:most]:
        yield from held[i] if held is not None else [images[int(i)]["text"]]


def rows(device_mesh: Mesh, wanted: int) -> int:
    """`wanted`, rounded up to whole shards of the batch."""
    shards = device_mesh.shape["data"] * device_mesh.shape["fsdp"]
    return -(-wanted // shards) * shards


def picture_batch(config: ConfigDict, tune: Any, device_mesh: Mesh) -> tuple[dict[str, jax.Array], list[str] | None]:
    """Images of the tuning split, for grids; labels go through the classes in order."""
    count = rows(device_mesh, min(config.train.pictures, len(tune)))
    tune = spread(tune, count)
    batch = next(one_pass(config, tune, batch_size=count))
    batch.pop("valid")
    captions = [tune[i % len(tune)]["text"] for i in range(count)] if tune.has_text else None
    if config.condition.label:
        batch["label"] = (np.arange(count) % tune.num_classes).astype(np.int32)
        captions = [tune.class_names[i] for i in batch["label"]]
        batch.pop("image", None)
    return mesh.shard_global(batch, device_mesh), captions


# The names in TrainState.variables of what a network carries besides its parameters.
CARRIED = {"autoencoder": ("codebook",), "discriminator": ("discriminator", "anchors")}


def _given(config: ConfigDict) -> tuple[dict[str, Any], dict[str, Any], str]:
    """({network: parameters}, variables as plain dicts, where they are from) of config.init_from."""
    if config.init_from.workdir:
        workdir = pathlib.Path(config.init_from.workdir)
        step = checkpoint.pick(workdir, None)
        params = checkpoint.restore_params(workdir, step, _given_average(config))
        return params, checkpoint.restore_variables(workdir, step), f"{workdir}, step {step}"
    path, module = pathlib.Path(config.init_from.file), network(config)
    try:
        # On the host: a device may have room for its part of the network alone.
        params = weights.from_tensors(module, files.open_file(path), place=lambda path, value: value)
    except ValueError as error:
        raise ValueError(f"config.init_from.file={path} does not hold this network: {error}") from error
    return {"denoiser" if config.task.name == "diffusion" else "autoencoder": params}, {}, str(path)


def _given_average(config: ConfigDict) -> str | None:
    """The average that config.init_from takes of config.init_from.workdir; None for the raw parameters."""
    name = config.init_from.ema
    return {"": default_average(read_config(pathlib.Path(config.init_from.workdir))), "none": None}.get(name, name)


def check_init_from(config: ConfigDict, shapes: states.TrainState) -> None:
    """Raise ValueError where `init_from` would, by what the checkpoint says of its parameters, none of them read."""
    if config.init_from.workdir:
        workdir = pathlib.Path(config.init_from.workdir)
        step = checkpoint.pick(workdir, None)
        _shared(
            checkpoint.stored_params(workdir, step, _given_average(config)), shapes.params, f"{workdir}, step {step}"
        )
    elif config.init_from.file:
        given, _, where = _given(config)
        _shared(given, shapes.params, where)


def _shared(given: dict[str, Any], params: dict[str, Any], where: str) -> list[str]:
    """The networks that both have. Raises ValueError where there is none, or one has other parameters."""
    shared = sorted(given.keys() & params.keys())
    if not shared:
        raise ValueError(f"config.init_from: {where} holds {sorted(given)}; this run trains {sorted(params)}")
    for name in shared:
        if differ := checkpoint.differ(given[name], params[name]):
            raise ValueError(
                f"config.init_from: the network {name!r} of {where} has other parameters than this config's: {differ}"
            )
    return shared


def init_from(config: ConfigDict, state: states.TrainState, shardings: states.TrainState, say) -> states.TrainState:
    """The state with the networks that config.init_from names in place of fresh ones (those that both have).

    What they carry in `variables` comes with them where it has the shapes of this config's: a codebook's averages, the statistics
    or vectors of the discriminator's norms. Raises ValueError where none fits, or one has other parameters than this config's.
    """
    if not config.init_from.workdir and not config.init_from.file:
        return state
    given, carried, where = _given(config)
    shared = _shared(given, state.params, where)
    params = dict(state.params)

    @functools.cache
    def copy_to(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda x: x.copy(), out_shardings=sharding)

    def put(value: Any, like: jax.Array, sharding: Sharding) -> jax.Array:
        # mesh.copied for one leaf, so that a device holds no second copy of the others; one program a shape, not one a call.
        return copy_to(sharding)(jax.device_put(np.asarray(value, like.dtype), sharding))

    for name in shared:
        params[name] = jax.tree.map(put, given[name], state.params[name], shardings.params[name])
    fresh, placed = map(serialization.to_state_dict, (state.variables, shardings.variables))
    names = carried.keys() & fresh.keys() & {name for network in shared for name in CARRIED.get(network, ())}
    shapes, wanted = (jax.tree.map(lambda x: x.shape, tree) for tree in (carried, fresh))
    found = {name: carried[name] for name in sorted(names) if shapes[name] == wanted[name]}
    say(f"starting from {', '.join(shared)} of {where}" + (f", carrying over {', '.join(found)}" if found else ""))
    if "codebook" in fresh and "autoencoder" in shared:  # its averages stand for entries: those of this network
        found.setdefault("codebook", vq.codebook(given["autoencoder"]["quantize"]["embedding"])._asdict())
    fresh |= {name: jax.tree.map(put, value, fresh[name], placed[name]) for name, value in found.items()}
    averages = {h: jax.tree.map(lambda x: x.copy(), params) for h in state.ema}
    return state._replace(params=params, variables=serialization.from_state_dict(state.variables, fresh), ema=averages)


# --- runs on disk --------------------------------------------------------------------------------------------------------


def write_dataset(workdir: pathlib.Path, train: Any, tune: Any) -> None:
    """DIR/dataset.json: what sampling needs to know of the data without having it at hand."""
    prompts = [tune[i]["text"] for i in range(min(64, len(tune)))] if tune.has_text else []
    facts = {"num_classes": train.num_classes, "class_names": list(train.class_names), "prompts": prompts}
    # Broken images that were left out: only this tells that a validation ran on fewer images than expected.
    facts["skipped"] = {"train": getattr(train, "skipped", 0), "tune": getattr(tune, "skipped", 0)}
    checkpoint.write_text(workdir / "dataset.json", json.dumps(facts, indent=1) + "\n")


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a run, see runs.read."""
    return runs.read(workdir).config


def is_finished(workdir: pathlib.Path) -> bool:
    """Whether the run in `workdir` has been trained to the end of its own config."""
    return (pathlib.Path(workdir) / "config.json").is_file() and runs.read(workdir).is_finished


def facts_of(stage: stages.FirstStage | None) -> dict[str, Any]:
    """What a checkpoint says of the first stage whose latents it was trained on, as JSON: see `same_first_stage`."""
    if stage is None:
        return {"first_stage": None}
    constants = {"mean": np.asarray(stage.mean, float).tolist(), "std": np.asarray(stage.std, float).tolist()}
    return {"first_stage": stage.sha256, "decoder": stage.decoder, "whitening": constants}


def same_first_stage(
    workdir: pathlib.Path, meta: dict[str, Any], stage: stages.FirstStage | None, decoder: bool = True
) -> None:
    """Raise ValueError unless a checkpoint (its `meta`) was trained on the latents of this very first stage, whitened as they are now,
    and, unless `decoder` is False, those of a published one with this decoder."""
    now = stage.sha256 if stage else None
    then = meta.get("first_stage", now)
    if then != now:
        which = f", {stage.published.path}" if stage and stage.published else ""
        raise ValueError(
            f"{workdir} was trained on the latents of another first stage ({str(then)[:12]}, now {str(now)[:12]}{which}): "
            "it was trained anew, exchanged or damaged; put it back"
        )
    if stage is None:
        return
    then = meta.get("decoder", stage.decoder)
    if decoder and then != stage.decoder:
        raise ValueError(
            f"{workdir} was trained with another decoder of the same latents ({then[:12] or 'of a run'}, now "
            f"{stage.decoder[:12] or 'of a run'}); put it back, or name the one to draw with: --first-stage"
        )
    # Statistics measured anew on another machine differ in their last digits; another scaling_factor by far more.
    for name, there in meta.get("whitening", {}).items():
        here = getattr(stage, name)
        if not np.allclose(there, here, rtol=1e-2, atol=1e-2 * float(np.min(stage.std))):
            raise ValueError(
                f"{workdir} was trained on latents whitened with the {name} {np.round(there, 4).tolist()}, which is now "
                f"{np.round(here, 4).tolist()}: put the first stage's scaling_factor, shift_factor or whitening.json back"
            )


def same_facts(workdir: pathlib.Path, meta: dict[str, Any], facts: dict[str, str]) -> None:
    """Raise ValueError unless a checkpoint (its `meta`) was trained with these `facts` of the task."""
    stored = meta.get("facts", meta.get("judges", facts))  # 'judges': what checkpoints called them before
    for name, sha256 in facts.items():
        if stored.get(name) != sha256:
            raise ValueError(f"{workdir} was trained with another network in config.task.{name}; put it back")


def latents_of(config: ConfigDict) -> str | None:
    """The first stage whose latents a decoder tuned alone goes on with, by the sha256 that names them; None for any other run."""
    if options_of(config.task).get("train") != "decoder" or not config.init_from.workdir or config.init_from.ema:
        return None
    workdir = pathlib.Path(config.init_from.workdir)
    return name_of_latents(workdir, checkpoint.pick(workdir, None))


def name_of_latents(workdir: pathlib.Path, step: int) -> str:
    """The sha256 of an autoencoder's checkpoint, or of the one whose encoder it has kept."""
    try:
        kept = checkpoint.restore_meta(workdir, step).get("latents_of")
    except FileNotFoundError:  # what `ldm convert --to=orbax` wrote: parameters alone
        kept = None
    return kept or checkpoint.identity(workdir, step)


def default_average(config: ConfigDict) -> str | None:
    """The average that is looked at, the first; None for the raw parameters of a run without."""
    return checkpoint.average(config.ema.half_lives[0]) if config.ema.half_lives else None


class Restored(NamedTuple):
    """A trained diffusion model, ready to draw from. `params` and `frozen` are host arrays; `facts` is dataset.json."""

    config: ConfigDict
    model: sampling.Model
    params: dict[str, Any]
    frozen: dict[str, Any]
    step: int
    sha256: str
    facts: dict[str, Any]


def restore(
    workdir: str | os.PathLike, step: int | None = None, average: str | None = None, first_stage: str = ""
) -> Restored:
    """The model of a run at a step (default: the newest), with an average's parameters ('none': the raw ones; default: the first).

    `first_stage`: an autoencoder to decode with, a run or a published one, in the place of the config's: one of the same latents.
    """
    startup.start()
    workdir = pathlib.Path(workdir).absolute()
    config = read_config(workdir)
    if config.task.name != "diffusion":
        raise ValueError(f"{workdir} holds a run of the task {config.task.name!r}; only 'diffusion' draws images")
    step = checkpoint.pick(workdir, step)
    name = default_average(config) if average is None else (None if average == "none" else average)
    params = checkpoint.restore_params(workdir, step, name)
    if first_stage and not needs_first_stage(config):
        raise ValueError(f"{workdir} is a run in pixels, which has no first stage; met {first_stage}")
    stage = None
    if needs_first_stage(config):
        try:
            stage_dir = published.place(first_stage) if first_stage else first_stage_workdir(config, workdir)
        except FileNotFoundError as error:
            hint = "" if first_stage else "; --first-stage=PLACE names where it lies now"
            raise FileNotFoundError(f"{error}{hint}") from None
        stage = load_first_stage(stage_dir, config=config, workdir=workdir)
    meta = checkpoint.restore_meta(workdir, step)
    if first_stage and "whitening" in meta:  # the run's own, whatever images the other autoencoder was measured on
        stage = stage._replace(**{name: np.float32(values) for name, values in meta["whitening"].items()})
    same_first_stage(workdir, meta, stage, decoder=not first_stage)
    facts = json.loads((workdir / "dataset.json").read_text())
    model = diffusion_model(config, stage, facts["num_classes"])
    return Restored(config, model, params, stages.frozen(stage), step, checkpoint.identity(workdir, step), facts)
