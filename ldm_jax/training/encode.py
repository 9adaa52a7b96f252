"""Encoding a data set once: images -> posteriors of a first stage -> a cache that is a data source of its own.

On a CPU the encoder costs more than a small denoiser; cached, it is paid once and not once a step, and once for all runs over
one first stage: the cache lies in the first stage's folder, under a name that says what it was made from. Each process
writes shards of its own on its own devices and waits for the others at the end only; an interrupted cache goes on with
the shards that are missing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ldm_jax.data import eval_batches, latent_cache
from ldm_jax.data.subset import Subset, spread
from ldm_jax.kernels import mesh, processes
from ldm_jax.training.experiment import Experiment
from ldm_jax.training.first_stage import FirstStage, moments
from ldm_jax.training.images import from_uint8

BATCH = 64  # images on a device


def describe(experiment: Experiment, stage: FirstStage, images: Any, source_split: str, content: str) -> dict[str, Any]:
    """All that a cache depends on; two caches of one description hold the same numbers. content: images.fingerprint()."""
    return {
        "source": experiment.record["data"],
        "source_split": source_split,
        "content": content,
        "resolution": experiment.input.resolution,
        "crop": experiment.input.crop,
        "checkpoint": stage.sha256,
        "precision": stage.network.dtype,
        "num_classes": images.num_classes,
        "class_names": list(images.class_names),
        "has_text": images.has_text,
        "may_flip": getattr(images, "may_flip", True),
    } | ({"several_captions": True} if getattr(images, "several_captions", False) else {})


def folder(
    experiment: Experiment,
    stage: FirstStage,
    stage_dir: pathlib.Path,
    workdir: pathlib.Path,
    images: Any,
    content: str,
) -> pathlib.Path:
    """STAGE_DIR/latents/HASH, or WORKDIR/latents/HASH if STAGE_DIR is read-only. HASH names all that the latents depend on."""
    depends = describe(experiment, stage, images, experiment.split.train, content)
    depends |= {"flip": experiment.input.flip, "tune": [experiment.split.tune, experiment.train.validate_images]}
    depends["format"] = latent_cache.FORMAT
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    return (stage_dir if os.access(stage_dir, os.W_OK) else workdir) / "latents" / name


def encoded(
    experiment: Experiment,
    stage: FirstStage,
    stage_dir: pathlib.Path,
    workdir: pathlib.Path,
    train: Any,
    tune: Any,
    say: Callable[[str], None],
) -> tuple[Any, Any]:
    """The latents of the images of training and tuning, encoded once into the cache of `stage_dir`.

    The images themselves where config.first_stage.cache is False, or where they are latents already.
    """
    if not experiment.first_stage.cache or getattr(train, "is_latent", False):
        return train, tune
    content = train.fingerprint()
    out = experiment.first_stage.latents or folder(experiment, stage, stage_dir, workdir, train, content)
    out = pathlib.Path(out)
    latents = cached(experiment, out, "train", stage, train, flip=experiment.input.flip, content=content, say=say)
    split, limit = experiment.split.tune, experiment.train.validate_images
    return latents, cached(experiment, out, "tune", stage, tune, flip=False, source_split=split, limit=limit, say=say)


def check(cache: latent_cache.Latents, stage: FirstStage | None) -> None:
    """Raise ValueError unless a run with this first stage can train on the cache: another encoder's latents mean nothing to it."""
    if stage is None:
        raise ValueError(
            f"{cache.folder} holds latents, but config.first_stage is empty; it names the autoencoder that decodes them"
        )
    if cache.meta.get("checkpoint") != stage.sha256:
        raise ValueError(
            f"{cache.folder} was encoded by checkpoint {str(cache.meta.get('checkpoint'))[:12]}; this run's first stage is "
            f"{stage.sha256[:12]}"
        )


@contextlib.contextmanager
def _one_at_a_time(out: pathlib.Path, say: Callable[[str], None]):
    """Runs of a sweep share a cache: the first writes it, the others wait."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run, which writes {out}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(
    experiment: Experiment,
    out: pathlib.Path,
    split: str,
    stage: FirstStage,
    images: Any,
    *,
    flip: bool,
    source_split: str = "",
    limit: int | None = None,
    content: str = "",
    dtype: str | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> latent_cache.Latents:
    """The latents of `images` in out/split: read if they are there, else encoded now (`limit` of them, evenly spread).

    `source_split`: the split of the data that they are of (default: the one that the config trains on). `content`:
    images.fingerprint(), where it is at hand. `dtype` of what is stored: 'float16' or 'float32'; None takes what is there, and writes
    'float16'. To be called by all processes, which share the folder.

    Raises ValueError when the folder holds the latents of something else, and for images that cannot be encoded or
    mirrored as asked.
    """
    if getattr(images, "is_latent", False):
        raise ValueError(f"{images.name} holds latents already; expected images to encode")
    if flip and not getattr(images, "may_flip", True):
        raise ValueError(f"{images.name}: mirrored copies are asked for, but its captions would not fit them")
    images = spread(images, limit or len(images))
    content = content or images.fingerprint()
    facts = describe(experiment, stage, images, source_split or experiment.split.train, content)
    facts |= {"count": len(images), "flipped": flip} | ({"dtype": dtype} if dtype else {})
    here, main = out / split, processes.is_first()
    if not processes.from_first((here / "meta.json").exists()):
        meta = latent_cache.plan(**facts, **_latent(experiment, stage))
        with _one_at_a_time(out, say) if main else contextlib.nullcontext():
            if not processes.from_first(
                (here / "meta.json").exists()
            ):  # the others get here when process 0 holds the lock
                if main:
                    say(f"encoding {len(images)} images into {here}")
                    latent_cache.begin(here, meta)
                processes.wait("the cache of latents is begun")
                _encode(experiment, here, meta, stage, images, quiet or not main)
                processes.wait("the latents are encoded")
                if main:
                    latent_cache.finish(here, meta)
        processes.wait("the cache of latents is finished")
    latents = latent_cache.latents(split, path=str(out))
    held = {"content": content} | latents.meta  # a cache from before it was compared does not say
    for key, value in facts.items():
        if held.get(key) != value:
            raise ValueError(
                f"{here} holds the latents of something else ({key}: {held.get(key)!r}, expected {value!r}); "
                "remove it or take another folder"
            )
    return latents


def _latent(experiment: Experiment, stage: FirstStage) -> dict[str, Any]:
    """The shape of a latent of this config's images, and whether it is one without noise."""
    side = experiment.input.resolution
    moments_of = jax.eval_shape(
        lambda params, x: moments(stage.network, params, x), stage.params, np.zeros((1, side, side, 3), np.float32)
    )
    shape = moments_of["mean"].shape[1:]
    if shape != stage.shape:
        raise ValueError(
            f"config.input.resolution={side} gives latents of shape {shape}; this first stage's have {stage.shape}"
        )
    return {"shape": shape, "deterministic": "std" not in moments_of}


class _Captioned(Subset):
    """Keeps the captions of what is read: a batch has none, and to read an item again would decode its image again."""

    def __init__(self, source: Any, indices: Sequence[int]):
        super().__init__(source, indices)
        self.captions: list[Sequence[str]] = [()] * len(indices)

    def __getitem__(self, i: int) -> dict:
        item = super().__getitem__(i)
        self.captions[i] = item.get("captions", (item["text"],))
        return item


def _encode(
    experiment: Experiment, folder: pathlib.Path, meta: dict[str, Any], stage: FirstStage, images: Any, quiet: bool
) -> None:
    """Write this process's shards of those that are missing."""
    device_mesh = mesh.make_mesh(devices=jax.local_devices())
    by_row, everywhere = mesh.batch_sharding(device_mesh), mesh.replicated(device_mesh)

    def encode(params, x):
        x = from_uint8(x)
        plain = moments(stage.network, params, x)
        if not meta["flipped"]:
            return plain
        mirrored = moments(stage.network, params, x[:, :, ::-1])
        return plain | {f"{name}_flipped": value for name, value in mirrored.items()}

    encode = jax.jit(encode, in_shardings=(everywhere, by_row), out_shardings=by_row)
    params = jax.device_put(stage.params, everywhere)
    count = jax.local_device_count()
    batch_size = count * min(BATCH, -(-len(images) // count))

    def batches(part: _Captioned) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, list[Sequence[str]]]]:
        done = 0
        for batch in eval_batches(
            part,
            batch_size=batch_size,
            resolution=experiment.input.resolution,
            crop=experiment.input.crop,
            num_threads=experiment.input.num_threads,
            prefetch=experiment.input.prefetch,
        ):
            encoded = encode(params, batch["image"])
            valid = batch["valid"]
            labels = batch["label"][valid]
            texts = part.captions[done : done + len(labels)]
            yield {name: np.asarray(value)[valid] for name, value in encoded.items()}, labels, texts
            done += len(labels)
            bar.update(len(labels))

    shards = range(jax.process_index(), meta["shards"], jax.process_count())  # of this process
    todo = [shard for shard in latent_cache.missing(folder, meta) if shard in shards]
    total = sum(len(latent_cache.rows(meta, shard)) for shard in shards)
    done = total - sum(len(latent_cache.rows(meta, shard)) for shard in todo)
    with tqdm(total=total, initial=done, unit="img", desc="encode", disable=quiet, leave=False) as bar:
        for shard in todo:
            latent_cache.write_shard(folder, meta, shard, batches(_Captioned(images, latent_cache.rows(meta, shard))))
