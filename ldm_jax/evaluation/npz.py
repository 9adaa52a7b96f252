"""Samples as one file that evaluators of others read: ADM's npz (Dhariwal & Nichol 2021, arXiv:2105.05233, its evaluation code).

    arr_0  u8[N, H, W, 3]      the images
    arr_1  i64[N]              their classes, where they have any (older files of ours call them `labels`)

Reading and writing go through the archive a few images at a time, so that 50,000 images need no more memory than one batch.
"""

import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

LABELS = ("arr_1", "labels")


class Samples(NamedTuple):
    """What a file of samples holds: N images of `shape` (H, W, 3), and their classes i64[N] or None."""

    path: pathlib.Path
    count: int
    shape: tuple[int, int, int]
    labels: np.ndarray | None


def write(path: pathlib.Path, batches: Iterable[np.ndarray], count: int, labels: np.ndarray | None = None) -> None:
    """Write images u8[b, H, W, 3], `count` in all, and their labels i[count]. The file appears whole or not at all.

    Raises ValueError for batches of other shapes, or of more or fewer images.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                shape, written = None, 0
                for batch in batches:
                    if shape is None:
                        shape = batch.shape[1:]
                        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                        np.lib.format.write_array_header_1_0(file, header)
                    if batch.dtype != np.uint8 or batch.shape[1:] != shape:
                        raise ValueError(f"{path}: a batch {batch.dtype}{list(batch.shape)}, expected uint8 of {shape}")
                    file.write(np.ascontiguousarray(batch).data)
                    written += len(batch)
            if written != count:
                raise ValueError(f"{path}: {written} images, expected {count}")
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, np.int64))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def holds(path: pathlib.Path, name: str) -> bool:
    """Whether `path` is an npz with an array of this name."""
    return zipfile.is_zipfile(path) and f"{name}.npy" in zipfile.ZipFile(path).namelist()


def _header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[np.lib.format.read_magic(file)](file)


def read(path: pathlib.Path) -> Samples:
    """What `path` holds; no image is read yet. Raises FileNotFoundError, and ValueError for a file that is not of this kind."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy") for name in archive.namelist()}
            if "arr_0" not in members:
                raise ValueError(f"it holds {', '.join(sorted(members))}")
            with archive.open("arr_0.npy") as file:
                shape, fortran, dtype = _header(file)
            name = next((name for name in LABELS if name in members), None)
            labels = None
            if name:
                with archive.open(f"{name}.npy") as file:
                    labels = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # a damaged archive fails in as many ways as zipfile, zlib and numpy have
        raise ValueError(f"{path}: expected an npz with arr_0 u8[N,H,W,3] ({error})") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape or fortran:
        raise ValueError(f"{path}: arr_0 is {dtype}{list(shape)}; expected uint8[N, H, W, 3]")
    if labels is not None and (labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"{path}: {name} is {labels.dtype}{list(labels.shape)}; expected int64[{shape[0]}]")
    return Samples(path, shape[0], shape[1:], None if labels is None else labels.astype(np.int64))


def batches(samples: Samples, size: int = 64) -> Iterator[np.ndarray]:
    """The images in order, u8[b, H, W, 3] with b at most `size`. ValueError where the file ends early."""
    with zipfile.ZipFile(samples.path) as archive, archive.open("arr_0.npy") as file:
        _header(file)
        for start in range(0, samples.count, size):
            shape = (min(size, samples.count - start), *samples.shape)
            data = file.read(int(np.prod(shape)))
            if len(data) != np.prod(shape):
                raise ValueError(f"{samples.path}: arr_0 ends within image {start + len(data) // np.prod(shape[1:])}")
            yield np.frombuffer(data, np.uint8).reshape(shape)
