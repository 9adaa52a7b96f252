"""Batches for training (endless, shuffled, resumable) and for evaluation (one ordered pass), by grain.

The stream is a function of (source, seed, batch size) alone: global batch k holds the items kB .. (k+1)B - 1 of the
shuffled, repeated source, and process p of P takes the p-th of P runs of consecutive ones. Neither the number of threads nor
of processes changes which images are in batch k, how they are flipped or which of their captions they have. The position is one
integer. A run may resume from it on another number of processes at once, without replaying. Random choices are made before the split
over processes; after it, every process would make the same ones.
"""

import math
from collections.abc import Iterator

import grain
import numpy as np

from ldm_jax.data import captions
from ldm_jax.data.preprocess import check_crop, crop_image, random_flip
from ldm_jax.data.tokenize import Tokenizer


class _Cached:
    """The source with every image decoded and cropped once, in one u8[N, R, R, 3] array."""

    def __init__(self, source, resolution: int, crop: str):
        first = crop_image(source[0]["image"], resolution, crop, source.where(0))
        self.images = np.empty((len(source), *first.shape), np.uint8)
        self.labels = np.empty(len(source), np.int32)
        self.captions: list[tuple[str, ...]] = []
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
        for i, item in enumerate(grain.MapDataset.source(source).to_iter_dataset(options)):
            self.images[i] = crop_image(item["image"], resolution, crop, source.where(i))
            self.labels[i] = item["label"]
            self.captions.append(item.get("captions", (item["text"],)))
        self.where = source.where

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> dict:
        texts = self.captions[i]
        return {"image": self.images[i], "label": self.labels[i], "text": texts[0], "captions": texts}


class _Items:
    """Items of a source with their images cropped; past the end the last item is repeated."""

    def __init__(self, source, length: int, resolution: int | None, crop: str):
        self.source, self.length = source, length
        self.resolution, self.crop = resolution, crop

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        j = min(i, len(self.source) - 1)
        item = dict(self.source[j])
        if "image" in item and self.resolution is not None:
            item["image"] = crop_image(item["image"], self.resolution, self.crop, self.source.where(j))
        return item


def _check(source, batch_size: int, resolution: int | None, crop: str, process_index: int, process_count: int) -> None:
    check_crop(crop)
    if not len(source):
        raise ValueError(f"{source.name}: is empty")
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution {resolution}: expected at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index}: expected 0..{process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size}: expected a positive multiple of the {process_count} processes")


def _finish(item: dict, flip: bool, tokenizer: Tokenizer | None, rng: np.random.Generator | None) -> dict:
    """The item, flipped with probability 1/2 (a latent by its stored mirrored copy), with tokens in the place of captions.

    `rng` chooses one of several captions; without it, or without a tokenizer, it is the first.
    """
    mirrored = {k: item.pop(f"{k}_flipped") for k in ("mean", "std") if f"{k}_flipped" in item}
    if flip and "image" in item:
        item["image"] = random_flip(item["image"], rng)
    elif flip and rng.random() < 0.5:
        item.update(mirrored)
    text, several = item.pop("text"), item.pop("captions", ())
    if tokenizer is not None:
        # The choice comes after that of the flip, and only where there are several captions: a further caption changes no flip.
        item["tokens"] = tokenizer.encode(captions.draw(several, rng) if rng is not None and len(several) > 1 else text)
    return item


class Batches:
    """Endless iterator over batches. `position` = global batches handed out; give it back as `start_batch`."""

    def __init__(self, iterator: Iterator[dict], start_batch: int):
        self._iterator = iterator
        self.position = start_batch

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict:
        batch = next(self._iterator)
        self.position += 1
        return batch


class _Part(grain.MapDataset):
    """The consecutive rows of each `batch_size` rows that belong to one process.

    The parts of the processes, one after another, are the batch of a single process, row for row. Noise is drawn by row, so that the
    number of processes does not change the result.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, process_index: int, process_count: int):
        super().__init__(parent)
        self.batch_size, self.rows = batch_size, batch_size // process_count
        self.first = process_index * self.rows

    def __len__(self) -> int:
        return len(self._parent) // self.batch_size * self.rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[index // self.rows * self.batch_size + self.first + index % self.rows]


def train_batches(
    source,
    *,
    batch_size: int,
    seed: int = 0,
    resolution: int | None = None,
    crop: str = "adm",
    flip: bool = False,
    tokenizer: Tokenizer | None = None,
    start_batch: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch: int = 8,
    cache: bool = False,
) -> Batches:
    """An endless iterator over this process's part, `b = batch_size / process_count` rows, of each global batch.

    Each epoch is shuffled anew. A batch may hold the end of one epoch and the beginning of the next, so no image is dropped.

    Args:
        source: see `ldm_jax.data`.
        batch_size: rows of a global batch.
        seed: of the order, the flips and the captions drawn.
        resolution, crop: see preprocess.py; resolution None leaves images as they are (latents ignore both).
        flip: mirror half of the images, at random. ValueError for `shapes`, whose captions say left and right, and for
            latents without stored mirrored copies.
        tokenizer: adds 'tokens' i32[b, L] of the captions; one of several captions is chosen each time that the image comes.
        start_batch: number of global batches to leave out at the start: the `position` of the run that goes on.
        num_threads, prefetch: how many batches are made at once, and how many are ready at most.
        cache: decode and crop everything once, now, into one array in memory (not for latents).

    Yields {'image': u8[b, R, R, 3], 'label': i32[b], 'tokens': i32[b, L]}, or of a latents source 'mean' and 'std'
    f[b, h, w, C] for 'image' (no 'std' where it is 0). Raises ValueError for a bad argument, and what the source raises
    for a bad file.
    """
    _check(source, batch_size, resolution, crop, process_index, process_count)
    is_latent = getattr(source, "is_latent", False)
    if is_latent and flip and not source.has_flipped:
        raise ValueError(f"{source.name}: flip=True, but the latent cache holds no mirrored copies")
    if start_batch < 0:
        raise ValueError(f"start_batch {start_batch}: expected 0 or more")
    if flip and not getattr(source, "may_flip", True):
        raise ValueError(f"{source.name}: flip=True, but its captions would no longer fit the mirrored images")
    several = getattr(source, "several_captions", False)
    if cache and not is_latent:
        if resolution is None:
            raise ValueError("cache=True needs a resolution")
        source = _Cached(source, resolution, crop)
    draws = flip or (tokenizer is not None and several)
    items = _Items(source, len(source), resolution, crop)
    data = grain.MapDataset.source(items).seed(seed).shuffle().repeat(None)
    data = (
        data.random_map(lambda item, rng: _finish(item, flip, tokenizer, rng))
        if draws
        else data.map(lambda item: _finish(item, False, tokenizer, None))
    )
    data = _Part(data, batch_size, process_index, process_count).batch(batch_size // process_count, drop_remainder=True)
    iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))
    if start_batch:
        iterator.set_state({"next_index": start_batch})
    return Batches(iterator, start_batch)


def eval_batches(
    source,
    *,
    batch_size: int,
    resolution: int | None = None,
    crop: str = "adm",
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch: int = 8,
) -> Iterator[dict]:
    """One pass over the first `limit` items in order, never flipped; the last batch is filled up by repeating an item.

    Of several captions it takes the first. Yields the batches of `train_batches` with 'valid' bool[b] added, False in the
    rows that fill up. Every process gets equally many batches of equal shape. Raises as `train_batches`.
    """
    _check(source, batch_size, resolution, crop, process_index, process_count)
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1")
    count = min(len(source), limit or len(source))
    items = _Items(source, math.ceil(count / batch_size) * batch_size, resolution, crop)

    def item(i: int) -> dict:
        row = items[i]
        return {**_finish(row, False, tokenizer, None), "valid": np.bool_(i < count)}

    data = grain.MapDataset.range(len(items)).map(item)
    data = _Part(data, batch_size, process_index, process_count).batch(batch_size // process_count)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))
