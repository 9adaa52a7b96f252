"""Mean and covariance of a stream of features, in float64, and the files that keep them.

Batches are merged as in Chan, Golub and LeVeque 1979, by n, the mean and m2 = sum (f - mean)(f - mean)^T:

    mean = mean_a + d n_b / n,    m2 = m2_a + m2_b + d d^T n_a n_b / n,    d = mean_b - mean_a

Sums of f and f f^T would lose digits where the mean is large against the spread. Covariances divide by n - 1.
"""

import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np


class Moments(NamedTuple):
    """The moments of n features of width D: mean f64[D], m2 f64[D, D]."""

    n: int
    mean: np.ndarray
    m2: np.ndarray


class Gaussian(NamedTuple):
    """What a Fréchet distance compares: mean f64[D] and covariance f64[D, D] of n features (0: the file does not say)."""

    n: int
    mean: np.ndarray
    covariance: np.ndarray


def empty(dim: int) -> Moments:
    """The moments of nothing, in `dim` dimensions."""
    return Moments(0, np.zeros(dim), np.zeros((dim, dim)))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both samples together. ValueError if their widths differ."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of width {len(a.mean)} and {len(b.mean)} cannot be merged")
    if 0 in (a.n, b.n):
        return b if a.n == 0 else a
    n = a.n + b.n
    d = b.mean - a.mean
    return Moments(n, a.mean + d * (b.n / n), a.m2 + b.m2 + np.outer(d, d * (a.n * b.n / n)))


def update(moments: Moments, features: Any) -> Moments:
    """`moments` with features f[B, D] added. Raises ValueError for another width or numbers that are not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] != len(moments.mean):
        raise ValueError(f"features of shape {features.shape}, expected [B, {len(moments.mean)}]")
    if not np.isfinite(features).all():
        rows = np.flatnonzero(~np.isfinite(features).all(1))
        raise ValueError(f"features of {len(rows)} images are not finite (the first is image {moments.n + rows[0]})")
    if len(features) == 0:
        return moments
    mean = features.mean(0)
    centred = features - mean
    return merge(moments, Moments(len(features), mean, centred.T @ centred))


def covariance(moments: Moments) -> np.ndarray:
    """f64[D, D], divided by n - 1. ValueError for n < 2."""
    if moments.n < 2:
        raise ValueError(f"a covariance needs at least 2 images, there are {moments.n}")
    return moments.m2 / (moments.n - 1)


def gaussian(moments: Moments) -> Gaussian:
    """The Gaussian with these moments. ValueError for n < 2."""
    return Gaussian(moments.n, moments.mean, covariance(moments))


def write(path: str | pathlib.Path, statistics: Gaussian, fingerprint: dict[str, Any] | None = None) -> pathlib.Path:
    """An npz as ADM's evaluator reads it (`mu`, `sigma`), with `n` and, as JSON, what it was made from (`fingerprint`).

    The file appears whole or not at all. Raises ValueError for numbers that are not finite: a NaN that is kept here would spoil
    every later figure.
    """
    path = pathlib.Path(path)
    if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.covariance).all()):
        raise ValueError(f"{path}: the statistics are not finite and are not written")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"mu": statistics.mean, "sigma": statistics.covariance, "n": np.int64(statistics.n)}
    if fingerprint is not None:
        arrays["fingerprint"] = np.array(json.dumps(fingerprint, sort_keys=True))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(path: str | pathlib.Path, spatial: bool = False) -> Gaussian:
    """Statistics from an npz of ours, ADM's (`mu`, `sigma` beside other arrays) or pytorch-fid's.

    `spatial` reads ADM's `mu_s`, `sigma_s` instead, which sFID compares (models.inception's feature 'spatial').
    Raises FileNotFoundError, and ValueError for a file that is damaged, lacks them, or holds numbers that are not
    finite.
    """
    path = pathlib.Path(path)
    names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of statistics")
    try:
        with np.load(path, allow_pickle=False) as file:
            names_there = sorted(file.files)
            arrays = {name: np.asarray(file[name], np.float64) for name in (*names, "n") if name in file.files}
    except Exception as error:  # a damaged archive fails in as many ways as zipfile, zlib and numpy have
        raise ValueError(f"{path}: not an npz of statistics ({error})") from None
    if not set(names) <= set(arrays):
        raise ValueError(f"{path}: expected the arrays {names[0]} and {names[1]}, found {names_there}")
    mean, cov = (arrays[name] for name in names)
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(
            f"{path}: {names[0]} has shape {mean.shape} and {names[1]} {cov.shape}, expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: the statistics are not finite")
    return Gaussian(int(arrays.get("n", 0)), mean, cov)


def read_fingerprint(path: str | pathlib.Path) -> dict[str, Any]:
    """What a file of statistics says it was made from; {} where it does not say (ADM's, pytorch-fid's)."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["fingerprint"])) if "fingerprint" in file.files else {}


def reference_path(cache_dir: str | pathlib.Path, fingerprint: dict[str, Any]) -> pathlib.Path:
    """Where statistics with this fingerprint are cached.

    `fingerprint` holds all that they depend on, as plain values: the fingerprint and split of the data source, the
    extractor's name and the sha256 of its weights, the number of images, the preprocessing.
    """
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]
    return pathlib.Path(cache_dir) / f"reference-{name}.npz"
