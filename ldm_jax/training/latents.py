"""Encoding a data set once: images -> posteriors of a first stage -> a cache that is a data source of its own.

On a CPU the encoder costs more than a small denoiser; cached, it is paid once and not once a step, and once for all runs over
one first stage: the cache lies in the first stage's folder, under a name that says what it was made from. An interrupted cache
goes on where it stopped.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax.data import eval_batches
from ldm_jax.data import latents as caches
from ldm_jax.data.subset import Subset, spread
from ldm_jax.training.first_stage import FirstStage
from ldm_jax.training.images import from_uint8

BATCH = 64


def describe(config: ConfigDict, stage: FirstStage, images: Any, source_split: str) -> dict[str, Any]:
    """All that a cache depends on; two caches of one description hold the same numbers."""
    return {
        "source": json.loads(config.data.to_json()),
        "source_split": source_split,
        "resolution": config.input.resolution,
        "crop": config.input.crop,
        "checkpoint": stage.sha256,
        "precision": stage.network.dtype,
        "num_classes": images.num_classes,
        "class_names": list(images.class_names),
        "may_flip": getattr(images, "may_flip", True),
    }


def folder(
    config: ConfigDict, stage: FirstStage, stage_dir: pathlib.Path, workdir: pathlib.Path, images: Any
) -> pathlib.Path:
    """STAGE_DIR/latents/HASH, HASH naming all that the latents of this config depend on; below `workdir` if that is read-only."""
    depends = describe(config, stage, images, config.split.train)
    own = getattr(images, "fingerprint", None)
    depends["content"] = own() if callable(own) else None
    depends |= {"flip": config.input.flip, "tune": [config.split.tune, config.train.validate_images]}
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    return (stage_dir if os.access(stage_dir, os.W_OK) else workdir) / "latents" / name


def check(cache: caches.Latents, stage: FirstStage | None) -> None:
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
    config: ConfigDict,
    out: pathlib.Path,
    split: str,
    stage: FirstStage,
    images: Any,
    *,
    flip: bool,
    source_split: str = "",
    limit: int | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> caches.Latents:
    """The latents of `images` in out/split: read if they are there, else encoded now (`limit` of them, evenly spread).

    `source_split`: the split of the data that they are of (default: the one that the config trains on).

    Raises ValueError when the folder holds the latents of something else. On several processes, process 0 writes.
    """
    images = spread(images, limit or len(images))
    count = len(images)
    meta = describe(config, stage, images, source_split or config.split.train) | {"count": count, "flipped": flip}
    if not (out / split).is_dir() and jax.process_index() == 0:
        with _one_at_a_time(out, say):
            if not (out / split).is_dir():
                say(f"encoding {count} images into {out / split}")
                _encode(config, out, split, stage, images, count, flip, meta, quiet)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"latents {out} {split}")
    found = caches.latents(split, path=str(out))
    for key, value in meta.items():
        if found.meta.get(key) != value:
            raise ValueError(
                f"{out / split} holds the latents of something else ({key}: {found.meta.get(key)!r}, wanted {value!r}); "
                "remove it or take another folder"
            )
    return found


def _encode(config, out, split, stage, images, count, flip, meta, quiet) -> None:
    @jax.jit
    def encode(params, x):
        x = from_uint8(x)
        sides = [x, x[:, :, ::-1]] if flip else [x]
        return [stage.network.apply({"params": params}, side, method="encode") for side in sides]

    params = jax.device_put(stage.params)
    texts = images if images.has_text else None
    with caches.Writer(out, split, count=count, shape=stage.shape, flipped=flip, meta=meta) as writer:
        if writer.done == count:
            return
        rest = Subset(images, range(writer.done, count))
        batches = eval_batches(rest, batch_size=BATCH, resolution=config.input.resolution, crop=config.input.crop)
        with tqdm(total=count, initial=writer.done, unit="img", desc="encode", disable=quiet, leave=False) as bar:
            for n, batch in enumerate(batches):
                keep = batch["valid"]
                moments = [np.asarray(a)[keep] for posterior in encode(params, batch["image"]) for a in posterior]
                first = writer.done
                rows = int(keep.sum())
                captions = [texts[i]["text"] for i in range(first, first + rows)] if texts is not None else None
                writer.append(moments[0], moments[1], batch["label"][keep], captions, *moments[2:])
                if n % 50 == 49:
                    writer.flush()
                bar.update(rows)
