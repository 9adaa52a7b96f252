"""A cache of latents: what a first stage makes of every image, written by `ldm encode` and read as a source.

    z = mean + std eps,   eps ~ N(0, 1)      (unscaled: whitening belongs to whoever trains on z)

DIR/<split>/latents-00000-of-00008.array_record, ...: the images in order, evenly divided, a record each. Little-endian:

    mean           f16[h, w, C], or f32
    std            likewise; not there where the first stage is deterministic (VQ, FSQ, the tiny autoencoder)
    mean_flipped   of the mirrored image, where asked for
    std_flipped
    label          i32
    caption        UTF-8, the rest of the record; where meta.json says `several_captions`, a JSON list of the image's

std and not its logarithm: rounded to f16, a log-variance near -12 changes std by up to 0.2 %, std itself by 0.05 %
(below 6e-5 by up to 3e-8, far less than what the mean loses).

DIR/<split>/meta.json is written last: a split without it is unfinished, and unfinished.json says of what. Besides what
the records are (`layout`) and were made of, it holds `mean` and `std` f64[C] of z over N, h, w, the size of each shard, and
a sha256 of all records.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ldm_jax.data.archive import resolve

FORMAT = 2
DTYPES = ("float16", "float32")
# What an interrupted writer loses is up to one shard; a reader holds all of them open.
SHARD_ROWS, MAX_SHARDS = 1024, 256


class Spread(NamedTuple):
    """`count` values a channel, with `mean` and `variance` f64[C]."""

    count: int
    mean: np.ndarray
    variance: np.ndarray


def merge(parts: Sequence[Spread]) -> Spread:
    """The Spread of all values of the parts together; order and grouping change the last digits only."""
    count = sum(p.count for p in parts)
    mean = sum(p.count * p.mean for p in parts) / count
    return Spread(count, mean, sum(p.count * (p.variance + np.square(p.mean - mean)) for p in parts) / count)


# --- the format ----------------------------------------------------------------------------------------------------------


def plan(
    *,
    count: int,
    shape: tuple[int, int, int],
    deterministic: bool = False,
    flipped: bool = False,
    dtype: str = "float16",
    **facts: Any,
) -> dict[str, Any]:
    """What meta.json will hold of a split of `count` images with latents of `shape` (h, w, C), as JSON.

    `deterministic`: std is 0 and not stored; `flipped`: mirrored copies are stored. `facts` say what the latents are
    (`source`, `checkpoint`, `num_classes`, `class_names`, `has_text`, ...). Raises ValueError for an unknown dtype, and for
    no images.
    """
    if count < 1:
        raise ValueError(f"a latent cache of {count} images; expected at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} of a latent cache; expected one of {', '.join(DTYPES)}")
    shards = min(-(-count // SHARD_ROWS), MAX_SHARDS)
    layout = {"format": FORMAT, "count": count, "shards": shards, "shape": shape, "deterministic": deterministic}
    return json.loads(json.dumps({**facts, **layout, "flipped": flipped, "dtype": dtype}))


def layout(meta: dict[str, Any]) -> np.dtype:
    """The fixed part of a record."""
    names = ["mean"] if meta["deterministic"] else ["mean", "std"]
    names += [f"{name}_flipped" for name in names] if meta["flipped"] else []
    moment = np.dtype(meta["dtype"]).newbyteorder("<")
    return np.dtype([(name, moment, tuple(meta["shape"])) for name in names] + [("label", "<i4")])


def rows(meta: dict[str, Any], shard: int) -> range:
    """The images of a shard."""
    return range(meta["count"] * shard // meta["shards"], meta["count"] * (shard + 1) // meta["shards"])


def shard_path(folder: pathlib.Path, meta: dict[str, Any], shard: int) -> pathlib.Path:
    """Where a shard lies once it is whole."""
    return folder / f"latents-{shard:05d}-of-{meta['shards']:05d}.array_record"


# --- writing -------------------------------------------------------------------------------------------------------------


def _write_json(path: pathlib.Path, content: Any) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content))
    os.replace(new, path)


def begin(folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Make `folder` (DIR/<split>) ready for the shards of a `plan`, or see that an interrupted writer had the same one.

    Raises ValueError if the split is complete already, or unfinished with another plan.
    """
    if (folder / "meta.json").exists():
        raise ValueError(f"{folder}: exists already; remove it to encode anew")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished.json"
    if not unfinished.exists():
        _write_json(unfinished, meta)
    old = json.loads(unfinished.read_text())
    for key in sorted(old.keys() | meta.keys()):
        if old.get(key) != meta.get(key):
            raise ValueError(
                f"{folder}: an unfinished cache of another kind ({key}: {old.get(key)!r}, now {meta.get(key)!r}); "
                "remove it to encode anew"
            )


def missing(folder: pathlib.Path, meta: dict[str, Any]) -> list[int]:
    """The shards that are not whole yet."""
    return [i for i in range(meta["shards"]) if not shard_path(folder, meta, i).exists()]


def _pack(kind: np.dtype, moments: dict[str, np.ndarray], labels: np.ndarray, where: str) -> np.ndarray:
    packed = np.empty(len(labels), kind)
    packed["label"] = labels
    for name in kind.names[:-1]:
        if name not in moments or np.shape(moments[name]) != packed[name].shape:
            shape = np.shape(moments[name]) if name in moments else None
            raise ValueError(f"{where}: {name} has shape {shape}; expected {packed[name].shape}")
        with np.errstate(over="ignore"):
            packed[name] = moments[name]
        if not np.isfinite(packed[name]).all():
            raise ValueError(f"{where}: {name} does not fit {kind[name].base.name}")
    return packed


@contextlib.contextmanager
def _disk_errors(path: pathlib.Path) -> Iterator[None]:
    """array_record says RuntimeError, of a full disk too."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path}: {error}") from error


def write_shard(
    folder: pathlib.Path,
    meta: dict[str, Any],
    shard: int,
    batches: Iterable[tuple[dict[str, np.ndarray], np.ndarray, Sequence[str | Sequence[str]]]],
) -> None:
    """Write one shard from batches of (moments f[n, h, w, C] by name, labels i[n], n texts or lists of texts) of its `rows` in order.

    It bears its name when it is whole. Raises ValueError for too few or too many rows, another shape, or a value that
    the dtype cannot hold, and OSError for a disk that takes no more.
    """
    path, kind, count = shard_path(folder, meta, shard), layout(meta), len(rows(meta, shard))
    partial = path.with_name(path.name + ".partial")
    digest, spreads, done = hashlib.sha256(), [], 0
    several = meta.get("several_captions", False)
    # Without group_size:1 reading one record decodes its neighbours; noise does not compress.
    with _disk_errors(partial):
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    for moments, labels, texts in batches:
        packed = _pack(kind, moments, labels, f"{path}, from row {done}")
        with _disk_errors(partial):
            for row, captions in zip(packed, texts, strict=True):
                captions = [captions] if isinstance(captions, str) else list(captions)
                text = json.dumps(captions) if several else "".join(captions[:1])
                record = row.tobytes() + text.encode()
                digest.update(record)
                writer.write(record)
        mean = packed["mean"].astype(np.float64)
        noise = 0.0 if meta["deterministic"] else np.square(packed["std"].astype(np.float64)).mean((0, 1, 2))
        spreads.append(Spread(mean[..., 0].size, mean.mean((0, 1, 2)), mean.var((0, 1, 2)) + noise))
        done += len(packed)
    if done != count:
        raise ValueError(f"{path}: {done} rows were given; expected {count}")
    with _disk_errors(partial):
        writer.close()
    spread = merge(spreads)
    facts = {"count": spread.count, "mean": list(spread.mean), "variance": list(spread.variance)}
    facts |= {"bytes": partial.stat().st_size, "sha256": digest.hexdigest()}
    _write_json(path.with_suffix(".json"), facts)
    os.replace(partial, path)


def finish(folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Make a split with all its shards a source: write meta.json."""
    beside = [shard_path(folder, meta, i).with_suffix(".json") for i in range(meta["shards"])]
    facts = [json.loads(path.read_text()) for path in beside]
    whole = merge([Spread(f["count"], np.array(f["mean"]), np.array(f["variance"])) for f in facts])
    sha256 = hashlib.sha256("".join(f["sha256"] for f in facts).encode()).hexdigest()
    measured = {"mean": list(whole.mean), "std": list(np.sqrt(whole.variance)), "bytes": [f["bytes"] for f in facts]}
    _write_json(folder / "meta.json", {**meta, **measured, "sha256": sha256})
    for path in [folder / "unfinished.json", *beside]:
        path.unlink()


# --- reading -------------------------------------------------------------------------------------------------------------


class Latents:
    """`self[i] -> {'mean', 'std': f[h, w, C], 'label', 'text'}`, and 'mean_flipped', 'std_flipped', 'captions'; each if it is stored.

    `mean` and `std` f32[C] are those of z over this split, `meta` what meta.json says.
    """

    is_latent = True

    def __init__(self, folder: pathlib.Path, meta: dict[str, Any]):
        self.folder, self.meta = folder, meta
        self.name = f"{folder.parent.name}/{folder.name}"
        self.origin = f"latents in {folder}"
        self.has_flipped = meta["flipped"]
        self.may_flip = meta.get("may_flip", True)
        self.shape = tuple(meta["shape"])
        self.class_names = tuple(meta.get("class_names", ()))
        self.num_classes = int(meta.get("num_classes", len(self.class_names)))
        self.has_text = meta.get("has_text", False)
        self.several_captions = meta.get("several_captions", False)
        self.mean, self.std = np.array(meta["mean"], np.float32), np.array(meta["std"], np.float32)
        self._layout = layout(meta)
        paths = [shard_path(folder, meta, i) for i in range(meta["shards"])]
        for path, size in zip(paths, meta["bytes"], strict=True):
            if path.stat().st_size != size:
                raise ValueError(f"{path}: damaged latent cache ({path.stat().st_size} bytes, expected {size})")
        # With the rows given, no shard is opened before it is read.
        parts = [f"{path}[0:{len(rows(meta, i))}]" for i, path in enumerate(paths)]
        self._records = grain.sources.ArrayRecordDataSource(parts)

    def where(self, i: int) -> str:
        return f"{self.folder}[{i}]"

    def fingerprint(self) -> str:
        """A sha256 of meta.json, and with it of all records."""
        return hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self.meta["count"]

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            record = self._records[i]
        except RuntimeError as error:
            raise ValueError(f"{self.where(i)}: damaged latent cache ({error})") from error
        row = np.frombuffer(record, self._layout, 1)[0]
        item = {name: row[name] for name in self._layout.names}
        text = record[self._layout.itemsize :].decode()
        if not self.several_captions:
            return {**item, "text": text}
        captions = tuple(json.loads(text))
        return {**item, "text": captions[0] if captions else "", "captions": captions}


def latents(split: str = "train", *, path: str) -> Latents:
    """The latents of `split` in the cache folder `path` (as it stands, or inside $LDM_DATA).

    Raises FileNotFoundError if there is none, ValueError if it is unfinished, damaged, or of an older format.
    """
    root = resolve(path)
    folder = root / split
    if (folder / "unfinished.json").exists() and not (folder / "meta.json").exists():
        raise ValueError(f"{folder}: unfinished latent cache; run the same `ldm encode` again to finish it")
    if not folder.is_dir():
        there = ", ".join(sorted(p.parent.name for p in root.glob("*/meta.json"))) or "none"
        raise ValueError(f"{root}: no latents of split '{split}'; there are: {there}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a latent cache, or a damaged one ({error})") from error
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: a latent cache of format {meta.get('format', 1)}, expected {FORMAT}; remove it and run `ldm encode` "
            "again"
        )
    try:
        return Latents(folder, meta)
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder}: damaged latent cache ({error})") from error
