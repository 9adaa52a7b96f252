"""One pass over images serves every metric: batch by batch, each feature network runs once, and no set is ever whole in memory.

A metric says what it takes as (how, network, output); the network '' stands for the batch itself:

    moments    running mean and covariance over all the images (statistics.py)
    all        a row of every image, on disk
    subset     rows of at most `cap` images, on disk
    some, few  rows of 256 and of 16 images, likewise

`numbers` says which images these are: a random choice that is always the same. Images at even distances would not do, because labels
and prompts repeat in turn, and such a choice could hold a few of them only.

Rows lie in a file without a name, which the system removes when the process ends, however it ends.

Of several processes each has all the images. Networks run on the devices of all processes (features.py), and every process collects
the same.
"""

import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ldm_jax.evaluation import statistics
from ldm_jax.evaluation.features import Extractor
from ldm_jax.evaluation.images import Images
from ldm_jax.kernels import processes

SOME, FEW = 256, 16

Take = tuple[str, str, str]
Score = Callable[[dict[str, np.ndarray], slice], dict[str, Any]]


class Seen(NamedTuple):
    """What one pass collected.

    moments[network, output]; rows[how, network, output] f[n, ...], of the images numbered `numbers(count, cap)`;
    values[figure] f64[N, ...], one for each image, NaN where it has none.
    """

    moments: dict[tuple[str, str], statistics.Moments]
    rows: dict[Take, np.ndarray]
    values: dict[str, np.ndarray]


def numbers(count: int, cap: int) -> np.ndarray:
    """i64[min(count, cap)], rising: the random choice of `cap` images that every caller gets; all images where there are no more."""
    return np.sort(np.random.default_rng(0).permutation(count)[:cap])


def on_disk(folder: pathlib.Path, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array in a file of `folder` that has no name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here; met later, through the map of a sparse file, it kills the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
        return np.memmap(file, dtype, "r+", shape=tuple(shape))


def collect(
    images: Images,
    networks: Mapping[str, Extractor],
    takes: Iterable[Take],
    *,
    cap: int,
    folder: pathlib.Path,
    scores: Iterable[Score] = (),
    say: str = "",
) -> Seen:
    """Run through the images once.

    `scores` are functions (batch, slice of the images that it holds) -> {name: f[b]}. Rows are kept in `folder` until the process
    ends. `say` is the name of the progress bar ('': none). Raises ValueError for features that are not finite, and for fewer or more
    images than `images.count`.
    """
    takes, scores, start = sorted(takes), tuple(scores), 0
    caps = {"all": images.count, "subset": cap, "some": SOME, "few": FEW}
    chosen = {how: numbers(images.count, n) for how, n in caps.items()}
    moments, rows, values = {}, {}, {}
    quiet = not say or not processes.is_first()
    with tqdm(total=images.count, unit="img", desc=say, disable=quiet, leave=False, dynamic_ncols=True) as bar:
        for batch in images.batches():
            stop = start + len(batch["image"])
            outputs = {("", name): value for name, value in batch.items()}
            for network in {network for _, network, _ in takes if network}:
                of_network = networks[network].outputs(batch["image"])
                outputs |= {(network, name): np.asarray(value) for name, value in of_network.items()}
            for take in takes:
                how, *key = take
                key, value = tuple(key), outputs[tuple(key)]
                if how == "moments":
                    before = moments.get(key, statistics.empty(value.shape[-1]))
                    moments[key] = statistics.update(before, value)
                else:
                    if take not in rows:
                        rows[take] = on_disk(folder, (len(chosen[how]), *value.shape[1:]), value.dtype)
                    first, last = np.searchsorted(chosen[how], (start, stop))
                    rows[take][first:last] = value[chosen[how][first:last] - start]
            for score in scores:
                for figure, value in score(batch, slice(start, stop)).items():
                    values.setdefault(figure, []).append(np.asarray(value, np.float64))
            bar.update(stop - start)
            start = stop
    if start != images.count:
        raise ValueError(f"{start} images came, expected {images.count}")
    return Seen(moments, rows, {figure: np.concatenate(parts) for figure, parts in values.items()})
