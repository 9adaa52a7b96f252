"""Images to be measured: the type, and those of a data set and of a file. drawn.py draws them, reconstructions.py reconstructs them.

Images are N pictures in batches, which are made anew each time that they are asked for, with what they were conditioned on and a record
of how they came to be.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.data.subset import spread
from ldm_jax.evaluation import npz
from ldm_jax.kernels import mesh, processes
from ldm_jax.runs import checkpoint
from ldm_jax.training import streams
from ldm_jax.training.experiment import Experiment

BATCH = 64


class Images(NamedTuple):
    """N = `count` images: `batches()` yields dicts of arrays, 'image' u8[b, H, W, 3] and whatever else is named in `holds`.

    Where there are `classes`, 'label' i[b] is among these: the class that an image was drawn for. The N `prompts` are what it was
    drawn for in words. `made_by` says how the images came to be, as plain values.
    """

    batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    count: int
    made_by: dict[str, Any]
    holds: frozenset[str] = frozenset({"image"})
    classes: int = 0
    prompts: list[str] | None = None


def with_labels(batches: Iterator[np.ndarray], labels: np.ndarray | None) -> Iterator[dict[str, np.ndarray]]:
    """Batches u8[b, H, W, 3] as dicts, with those of the labels i[N] that belong to them, if there are any."""
    start = 0
    for batch in batches:
        stop = start + len(batch)
        yield {"image": batch} if labels is None else {"image": batch, "label": labels[start:stop]}
        start = stop


def names(labels: Any) -> frozenset[str]:
    """What the batches of `with_labels` hold."""
    return frozenset({"image"} if labels is None else {"image", "label"})


def of_split(config: Experiment, split: str) -> Experiment:
    """The config with `split` in the place of its reporting split."""
    return config._replace(split=config.split._replace(report=split))


def _share(config: Experiment, source: Any, size: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of each batch of `size` images of a source; it decodes no others."""
    index, count = jax.process_index(), jax.process_count()
    return streams.one_pass(config, source, size, process_index=index, process_count=count)


def sharded(config: Experiment, source: Any, size: int, device_mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """The batches of streams.one_pass as arrays that are split over all devices; each process decodes its own rows."""
    for batch in _share(config, source, size):
        yield mesh.shard_batch(batch, device_mesh)


def real(config: Experiment, split: str, limit: int | None = None) -> Images:
    """Images of a split of the run's data set (`limit` of them, evenly spread), prepared as in training.

    All processes have all the images; each decodes its share and receives the others. ValueError for a split of latents.
    """
    config = of_split(config, split)
    source = streams.source(config, "report")
    if getattr(source, "is_latent", False):
        raise ValueError(
            f"split:{split} of this run holds latents, not images; give --reference=FILE.npz, or train with the images in "
            "config.data and the latents in config.first_stage.latents"
        )
    source = spread(source, limit or len(source))
    count, holds, parts = len(source), names(source.num_classes or None), jax.process_count()

    def batches():
        for batch in _share(config, source, -(-BATCH // parts) * parts):
            batch = {name: batch[name] for name in (*holds, "valid")}
            if parts > 1:
                batch = processes.gather(batch)
            yield {name: np.asarray(batch[name])[batch["valid"]] for name in holds}

    made_by = {"images": f"split:{split}", "data": fingerprint(config, source, count)}
    return Images(batches, count, made_by, holds, source.num_classes)


def from_file(path: pathlib.Path) -> Images:
    """The samples of an npz as `ldm sample` and ADM's code write it."""
    samples = npz.read(path)
    classes = 0 if samples.labels is None else int(samples.labels.max()) + 1

    def batches():
        yield from with_labels(npz.batches(samples, BATCH), samples.labels)

    made_by = {"images": str(path), "images_sha256": checkpoint.sha256(path)}
    return Images(batches, samples.count, made_by, names(samples.labels), classes)


def fingerprint(config: Experiment, source: Any, count: int) -> dict[str, Any]:
    """All that reference statistics of a data set depend on, as plain values."""
    content = getattr(source, "fingerprint", None)
    return {
        "data": config.record["data"],
        "content": content() if callable(content) else content,
        "split": config.split.report,
        "count": count,
        "resolution": config.input.resolution,
        "crop": config.input.crop,
    }
