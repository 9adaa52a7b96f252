"""The images of an experiment: opened by role, checked against the task, and read in batches for training, validation and grids."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.config.construct import construct
from ldm_jax.data import SOURCES, eval_batches, train_batches
from ldm_jax.data.subset import Subset, spread
from ldm_jax.kernels import mesh
from ldm_jax.training.experiment import Experiment


def source(experiment: Experiment, role: str) -> Any:
    """The images that `role` ('train', 'tune' or 'report') reads; its split is named in config.split."""
    return construct("data", SOURCES, experiment.data, split=getattr(experiment.split, role))


def one_pass(
    experiment: Experiment,
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
        resolution=experiment.input.resolution,
        crop=experiment.input.crop,
        tokenizer=experiment.tokenizer,
        num_threads=experiment.input.num_threads,
        prefetch=experiment.input.prefetch,
        process_index=process_index,
        process_count=process_count,
    )


def training(experiment: Experiment, images: Any) -> Callable[[int], Any]:
    """batches(position): the endless batches of this process, from that batch number on (data/pipeline.py)."""

    def batches(position: int) -> Any:
        return train_batches(
            images,
            batch_size=experiment.train.batch_size,
            seed=experiment.seed,
            resolution=experiment.input.resolution,
            crop=experiment.input.crop,
            flip=experiment.input.flip,
            tokenizer=experiment.tokenizer,
            start_batch=position,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=experiment.input.num_threads,
            prefetch=experiment.input.prefetch,
            cache=experiment.input.cache
            and experiment.input.entry == "image"
            and not getattr(images, "is_latent", False),
        )

    return batches


def for_pictures(
    experiment: Experiment, images: Any, device_mesh: Mesh, from_images: bool = False
) -> tuple[dict[str, jax.Array], list[str] | None]:
    """(a batch of images for grids, what stands below each of them or None); labels go through the classes in order.

    Where a condition is read from the images, each keeps its own label.
    """
    count = rows(device_mesh, min(experiment.train.pictures, len(images)))
    images = spread(images, count)
    batch = next(one_pass(experiment, images, batch_size=count))
    batch.pop("valid")
    captions = [images[i % len(images)]["text"] for i in range(count)] if images.has_text else None
    if "label" in experiment.condition:
        if not from_images:
            batch["label"] = (np.arange(count) % images.num_classes).astype(np.int32)
            batch.pop("image", None)  # its own label is another one
        captions = [images.class_names[i] for i in batch["label"]]
    return mesh.shard_global(batch, device_mesh), captions


def items(experiment: Experiment, images: Any, indices: np.ndarray) -> dict[str, np.ndarray]:
    """One batch of the images `indices` i[B], prepared as in `one_pass`."""
    batch = next(one_pass(experiment, Subset(images, indices), batch_size=len(indices)))
    batch.pop("valid")
    return batch


def rows(device_mesh: Mesh, count: int) -> int:
    """`count`, rounded up to whole shards of the batch."""
    shards = device_mesh.shape["data"] * device_mesh.shape["fsdp"]
    return -(-count // shards) * shards


def some_captions(images: Any, most: int = 10_000) -> Iterator[str]:
    """Captions of `most` images at random, always the same ones: folders are ordered by class."""
    captions = getattr(images, "captions", None)  # of all images at once, where no image has to be decoded for it
    for i in np.random.default_rng(0).permutation(len(images))[:most]:
        yield from captions[i] if captions is not None else [images[int(i)]["text"]]
