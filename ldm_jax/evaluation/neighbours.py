"""The metric neighbours: the training images nearest to generated ones in a feature space, and the share that is memorised.

    copied     |x - x1| <= |x - x2| / 3      x1, x2 the two nearest training images     (Yoon et al. 2023; Gu et al. 2023,
               arXiv:2310.02664, take the same third)
    authentic  |x - x1| > |x1 - x1'|         x1' the training image nearest to x1       (Alaa et al. 2022, arXiv:2102.08921;
               Stein et al. 2023, arXiv:2306.04675, report it on DINOv2 features)

The first is strict and looks at each image by itself. The second is about a half for images that are distributed as the training
images are, and falls with copying. Both have been published for distances of pixels and of features: say which.
"""

from typing import Any, NamedTuple

import numpy as np

from ldm_jax.data import contact_sheet
from ldm_jax.data.preprocess import crop_image
from ldm_jax.evaluation import images, reference
from ldm_jax.evaluation.metrics import GENERATED, Case, Figure, Metric, Need, suffix
from ldm_jax.evaluation.precision_recall import blocks, squared_distances
from ldm_jax.kernels import processes
from ldm_jax.training import streams

NEAREST, SHOWN = 4, 8  # training images beside each generated one in the grid, and rows of the grid


class Memorised(NamedTuple):
    """Shares of the generated images, in [0, 1]."""

    copied: float
    authentic: float


def nearest(features: np.ndarray, training: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of training f[M, D] for each of f[N, D]: (rows i64[N, k], Euclidean distances f64[N, k]).

    Nearest first. `training` may be a memory-mapped array of any float dtype: it is read once, a block at a time.
    Raises ValueError for shapes that do not match, or k outside 1 .. M.
    """
    if features.ndim != 2 or training.ndim != 2 or features.shape[1] != training.shape[1] or len(features) == 0:
        raise ValueError(
            f"features of shapes {features.shape} and {training.shape}, expected [N, D] and [M, D] with N >= 1"
        )
    if not 1 <= k <= len(training):
        raise ValueError(f"k = {k} neighbours among {len(training)} training images")
    features = np.asarray(features, np.float64)
    offset = features.mean(0)  # squared_distances loses digits where all features share one
    distances = np.full((len(features), k), np.inf)
    rows = np.zeros((len(features), k), np.int64)
    for block in blocks(len(training)):
        others = np.asarray(training[block], np.float64) - offset
        numbers = np.arange(block.start, block.start + len(others))
        for mine in blocks(len(features)):
            d = np.concatenate([distances[mine], squared_distances(features[mine] - offset, others)], 1)
            at = np.concatenate([rows[mine], np.broadcast_to(numbers, (len(d), len(numbers)))], 1)
            best = np.argpartition(d, k - 1, axis=1)[:, :k]
            distances[mine] = np.take_along_axis(d, best, 1)
            rows[mine] = np.take_along_axis(at, best, 1)
    # From the differences themselves: |a|² + |b|² - 2 a·b would put an exact copy at 1e-8 of |a| instead of 0.
    for j in range(k):
        distances[:, j] = np.linalg.norm(features - np.asarray(training[rows[:, j]], np.float64), axis=1)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)


def memorised(rows: np.ndarray, distances: np.ndarray, training: np.ndarray) -> Memorised:
    """The two shares, from what `nearest` returned with k >= 2 and the training features f[M, D].

    An image that training holds twice counts as copied at distance 0 of both; nearly equal pairs hide a copy from
    `copied`, so deduplicate. Raises ValueError for k = 1.
    """
    if distances.shape[1] < 2:
        raise ValueError(f"distances of shape {distances.shape}, expected [N, k] with k >= 2")
    matched, back = np.unique(rows[:, 0], return_inverse=True)
    # The nearest of all training images to one of them is itself, at 0.
    spacing = nearest(training[matched], training, 2)[1][:, 1]
    return Memorised(
        float((distances[:, 0] <= distances[:, 1] / 3).mean()), float((distances[:, 0] > spacing[back]).mean())
    )


def _picture(case: Case, network: str, rows: np.ndarray, distances: np.ndarray) -> str:
    """The path of a grid: at the left the generated images nearest to training images, beside each its nearest, by distance."""
    source, config = streams.source(case.config, "train"), case.config.input
    pictures, captions = [], []
    for i in np.argsort(distances[:, 0])[:SHOWN]:
        pictures.append(case.seen.rows["subset", "", "image"][i])
        captions.append("generated")
        for row, distance in zip(rows[i], distances[i]):
            image = source[int(row)]["image"]
            pictures.append(crop_image(image, config.resolution, config.crop, source.where(row)))
            captions.append(f"{distance:.3g}")
    name = f"neighbours{suffix(network)}_{case.images.made_by.get('step', 0):07d}_{case.mark}.png"
    path = case.settings.pictures / name
    if processes.is_first():
        contact_sheet.save(path, np.stack(pictures), 1 + NEAREST, labels=captions)
    return str(path)


def figures(case: Case, network: str) -> dict[str, Any]:
    split, settings, end = case.config.split.train, case.settings, suffix(network)
    takes = [("all", name, "features") for name in case.networks]  # all in one pass: the next network reads its file
    measured = reference.measure(
        images.real(case.config, split),
        takes,
        case.networks,
        cap=settings.subset,
        folder=settings.folder,
        say="" if settings.quiet else f"split:{split}",
    )
    training = measured.rows["all", network, "features"]
    rows, distances = nearest(case.seen.rows["subset", network, "features"], training, NEAREST)
    shares = memorised(rows, distances, training)._asdict()
    return {f"{name}{end}": share for name, share in shares.items()} | {
        f"neighbours{end}": _picture(case, network, rows, distances),
        "training": f"split:{split}",
        "training_num": len(training),
    }


def gives(network: str) -> tuple[Figure, ...]:
    end = suffix(network)
    return Figure(f"copied{end}", "share"), Figure(f"authentic{end}", "share", higher=True)


TRAINING = Need(
    lambda case: not getattr(streams.source(case.config, "train"), "is_latent", False),
    "the training images, and this run's data are latents",
)

METRIC = Metric(
    names=("neighbours",),
    of=GENERATED,
    help="shares of copied and of authentic images, and a grid of nearest training images",
    figures=figures,
    gives=gives,
    networks=("any",),
    takes=(("subset", "features"), ("subset", "image")),
    needs=(TRAINING,),
    reads=("out",),
)
