"""What an archive of images says about itself: file names, labels, captions and splits. Three layouts are read:

- `dataset.json` (EDM): {"labels": [[file name, class index], ...]} or {"labels": null}.
- `metadata.jsonl`, `.csv` or `.tsv` (Hugging Face's imagefolder), at the top or in any folder: a row an image with `file_name` and,
  where present, captions (captions.py), `label` (index or name) and `split`; label names are `labels` in a `classes.json`.
- class folders: label = position of CLASS among the sorted class names; files without a class folder make an unlabelled set; a
  text file beside an image holds its captions.

The split of an image is what the metadata says, else the folder in its path that is named like a split (splits.py), else 'train'. What
can be read in two ways is refused. docs/data.md has the table for users.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ldm_jax.data import captions, metadata
from ldm_jax.data.archive import Folder, Zip, check_name
from ldm_jax.data.decode import EXTENSIONS
from ldm_jax.data.splits import Place, canonical, place, value_splits

MAX_CLASSES = 2**20  # a larger number is an id and no class index; all classes below it would need a name
Splits = Mapping[str, str | Sequence[str]] | None


class Records(NamedTuple):
    """The images of a data set: parallel lists, ordered by split and file name; labels i32[N], -1 = none.

    `captions` holds none, one or several for each image; `left_out` counts by kind the files that were not read.
    """

    names: list[str]
    labels: np.ndarray
    captions: list[tuple[str, ...]]
    splits: list[str]
    class_names: tuple[str, ...]
    layout: str
    left_out: dict[str, int]


class _Part(NamedTuple):
    """An image as a layout lists it: name, split ('' where only the path says it), label or None, captions."""

    name: str
    split: str
    label: int | None
    captions: tuple[str, ...]


def records(archive: Folder | Zip, text_key: str = "", splits: Splits = None) -> Records:
    """All images of `archive`, read by the layout that it has.

    `text_key` is the key of the captions in metadata; `splits` is {split: folder or folders}, where the folders' names do not say it.
    Raises ValueError that names the file that breaks the layout.
    """
    images = _images(archive)
    edm = [n for n in archive.names if n.rpartition("/")[2] == "dataset.json" and _covers(n, images)]
    tables = metadata.files(archive)
    if edm and tables:
        raise ValueError(f"{archive.where(edm[0])}: there is {tables[0]} besides; expected one of them")
    left_out: collections.Counter[str] = collections.Counter(archive.left_out)
    if edm:
        layout, read, parts, class_names = "dataset.json", set(edm), _edm(archive, images, edm), ()
    elif tables:
        layout = " and ".join(sorted({n.rpartition("/")[2] for n in tables}))
        parts, class_names, read = _metadata(archive, tables, text_key, splits)
        listed = {p.name for p in parts}
        left_out["images that the metadata does not list"] = sum(n not in listed for n in images)
    else:
        texts, read = captions.beside(archive, images)
        layout, class_names = "folders", ()
        parts = [_Part(n, "", None, t) for n, t in zip(images, texts)]
    if not parts and tables:
        raise ValueError(f"{archive.where(tables[0])}: lists no image")
    if not parts:
        there = ", ".join(f"{n} {kind}" for kind, n in collections.Counter(map(_kind, archive.names)).most_common(5))
        raise ValueError(f"{archive.path}: holds no image{f'; there are {there}' if there else ''}")
    if any(not p.split for p in parts):
        places = place([p.name for p in parts], archive, splits)
    else:
        places = [Place(p.split, ()) for p in parts]
    if layout == "folders":
        layout, parts, class_names = _by_folder(archive, parts, places)
    left_out["images outside config.data.splits"] = sum(p is None for p in places)
    rows = [(q.split or "train", p) for p, q in zip(parts, places) if q is not None]
    rows.sort(key=lambda row: (row[0], row[1].name))
    kept = [p for _, p in rows]
    labels = _all_or_none([p.label for p in kept], [p.name for p in kept], str(archive.path))
    taken = read.union(images, (p.name for p in parts))
    left_out.update(_kind(n) for n in archive.names if n not in taken)
    return Records(
        [p.name for p in kept],
        labels,
        [p.captions for p in kept],
        [split for split, _ in rows],
        _numbered(labels, class_names),
        layout,
        {kind: count for kind, count in left_out.items() if count},
    )


def _json(archive: Folder | Zip, name: str):
    try:
        return json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{archive.where(name)}: not valid JSON ({error})") from error


def _images(archive: Folder | Zip) -> list[str]:
    ends = set(EXTENSIONS)
    return [n for n in archive.names if n[n.rfind(".") :].lower() in ends]


def _kind(name: str) -> str:
    stem, dot, end = name.rpartition("/")[2].rpartition(".")
    return f".{end.lower()}" if dot and stem else "files without an extension"


def _base(name: str) -> str:
    return name[: len(name) - len(name.rpartition("/")[2])]


def _covers(name: str, images: list[str]) -> bool:
    base = _base(name)
    return not base or any(n.startswith(base) for n in images)


def _class_index(value, class_names: tuple[str, ...], where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: label {value!r} is not a class index")
    most = len(class_names) or MAX_CLASSES
    if not 0 <= value < most:
        raise ValueError(f"{where}: label {value} is out of range; expected 0..{most - 1}")
    return value


def _all_or_none(labels: list[int | None], names: list[str], where: str) -> np.ndarray:
    missing = [n for n, label in zip(names, labels) if label is None]
    if missing and len(missing) < len(labels):
        raise ValueError(f"{where}: '{missing[0]}' has no label while others have one")
    return np.asarray([-1 if label is None else label for label in labels], np.int32)


def _numbered(labels: np.ndarray, class_names: tuple[str, ...]) -> tuple[str, ...]:
    return class_names or tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))


def _edm(archive: Folder | Zip, images: list[str], files: list[str]) -> list[_Part]:
    members, labels = set(archive.names), {}
    for file in files:
        where, base = archive.where(file), _base(file)
        content = _json(archive, file)
        if not isinstance(content, dict) or not isinstance(content.get("labels", ""), list | None):
            met = ", ".join(map(str, content))[:80] if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{where}: expected EDM's {{'labels': [[file name, class index], ...]}}; met {met}")
        for pair in content["labels"] or ():
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ValueError(f"{where}: entry {pair!r:.80} is not a pair [file name, class index]")
            name = base + check_name(pair[0], where)
            if name not in members:
                raise ValueError(f"{where}: '{name}' is listed but not there")
            labels[name] = _class_index(pair[1], (), f"{where}: '{name}'")
    unlisted = next((n for n in images if n not in labels), None)
    if labels and unlisted is not None:
        raise ValueError(f"{archive.where(files[0])}: '{unlisted}' has no label while others have one")
    return [_Part(n, "", labels.get(n), ()) for n in (sorted(labels) or images)]


def _class_names(archive: Folder | Zip, tables: list[str]) -> tuple[tuple[str, ...], set[str]]:
    """(label names, the file that they come from): the topmost classes.json in or above a folder with a metadata file."""
    above = {"/".join(_base(t).split("/")[:i]) for t in tables for i in range(_base(t).count("/") + 1)}
    there = sorted({f"{a}/classes.json".lstrip("/") for a in above} & set(archive.names), key=lambda n: n.count("/"))
    if not there:
        return (), set()
    content = _json(archive, there[0])
    names = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise ValueError(
            f"{archive.where(there[0])}: expected 'labels', a list of names of which none stands there twice"
        )
    return tuple(names), {there[0]}


def _metadata(
    archive: Folder | Zip, tables: list[str], text_key: str, splits: Splits
) -> tuple[list[_Part], tuple[str, ...], set[str]]:
    class_names, read = _class_names(archive, tables)
    rows = [row for file in tables for row in metadata.rows(archive, file)]
    seen: dict[str, str] = {}
    for row in rows:
        if row.name in seen:
            raise ValueError(f"{row.where}: '{row.name}' is listed twice (first at {seen[row.name]})")
        seen[row.name] = row.where
    where = archive.where(tables[0])
    keys = list(dict.fromkeys(k for row in rows for k in row.values))
    key = captions.key_of(keys, text_key, where) if rows else None
    labels = [row.values.get("label") for row in rows]
    if {type(v) for v in labels} - {type(None)} == {str}:
        class_names = class_names or tuple(sorted({v for v in labels if v is not None}))
        index = {n: i for i, n in enumerate(class_names)}
        for row, v in zip(rows, labels):
            if v is not None and v not in index:
                raise ValueError(
                    f"{row.where}: label '{v}' of '{row.name}' is not among the {len(class_names)} class names"
                )
        labels = [None if v is None else index[v] for v in labels]
    labels = [
        v if v is None else _class_index(v, class_names, f"{row.where}: '{row.name}'") for row, v in zip(rows, labels)
    ]
    values = metadata.split_values(rows, key) or [""] * len(rows)
    names = value_splits(values, where) if splits is None else {}
    parts = [
        _Part(row.name, names.get(split, split), label, captions.read(row.values.get(key), row.where) if key else ())
        for row, label, split in zip(rows, labels, values)
    ]
    return parts, class_names, read | set(tables)


def _by_folder(
    archive: Folder | Zip, parts: list[_Part], places: list[Place | None]
) -> tuple[str, list[_Part], tuple[str, ...]]:
    """(layout, parts with labels, class names); the class is the first folder that is no split."""
    classes = [p.folders[0] if p and p.folders else None for p in places]
    class_names = tuple(sorted({c for c in classes if c is not None}))
    index = {c: i for i, c in enumerate(class_names)}
    splits: dict[str, dict[str, set[str]]] = {}
    for p, c in zip(places, classes):
        if c is not None:
            splits.setdefault(c.casefold(), {}).setdefault(c, set()).add(p.split)
    for names in splits.values():  # 'A' and 'a' in one split are two classes
        if len(names) > 1 and sum(map(len, names.values())) == len(set.union(*names.values())):
            raise ValueError(
                f"{archive.path}: {' and '.join(map(repr, names))} are one class in two splits; expected one name"
            )
    labelled = [part._replace(label=index.get(c)) for part, c in zip(parts, classes)]
    return "class folders" if class_names else "images", labelled, class_names


def select(records: Records, split: str, where: str, val_from_train: int = 0) -> tuple[np.ndarray, dict[str, int]]:
    """(indices of the images of a split, number of images by split).

    With `val_from_train` = k, 'val' is the last k training images of each class (by file name) and 'train' the others; no image is
    ever in two splits.

    Raises ValueError if there is no such split, or a class has no more than k training images.
    """
    splits = np.asarray(records.splits, object)
    if val_from_train:
        if (splits == "val").any():
            raise ValueError(f"{where}: val_from_train={val_from_train}, but there is a 'val' split already")
        for label in np.unique(records.labels[splits == "train"]):
            members = np.flatnonzero((splits == "train") & (records.labels == label))
            if val_from_train < 0 or len(members) <= val_from_train:
                which = f"class '{records.class_names[label]}'" if label >= 0 else "the set"
                raise ValueError(f"{where}: val_from_train={val_from_train}, but {which} has {len(members)} images")
            splits[members[-val_from_train:]] = "val"
    counts = {str(s): int(n) for s, n in zip(*np.unique(splits.astype(str), return_counts=True))}
    chosen = np.flatnonzero(splits == (split if split in counts else canonical(split)))
    if not len(chosen):
        there = ", ".join(f"{s} ({n})" for s, n in counts.items())
        hint = "; val_from_train=k makes 'val' of the last k of each class" if split == "val" else ""
        raise ValueError(f"{where}: no split '{split}'; there are {there}{hint}")
    return chosen, counts
