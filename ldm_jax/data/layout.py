"""What an archive of images says about itself: file names, labels and captions, split by split. Three layouts are read.

- `dataset.json` (EDM): {"labels": [[file name, class index], ...]} or {"labels": null}; everything is 'train'.
- `metadata.jsonl` (Hugging Face's imagefolder), at the root or inside split folders: an object a line with `file_name`
  and, where present, `text`, `label` (index or name) and `split`; label names are `labels` in a root `classes.json`.
- class folders: [train|val|test/]CLASS/FILE, label = position of CLASS among the sorted class names; files without a
  class folder make an unlabelled set.
"""

import json
from typing import NamedTuple

import numpy as np

from ldm_jax.data.archive import Folder, Zip, check_name
from ldm_jax.data.decode import EXTENSIONS

SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


class Records(NamedTuple):
    """The images of a data set: parallel lists, ordered by split and file name; labels i32[N], -1 = none."""

    names: list[str]
    labels: np.ndarray
    texts: list[str]
    splits: list[str]
    class_names: tuple[str, ...]


def records(archive: Folder | Zip, text_key: str = "text") -> Records:
    """All images of `archive` by whichever layout it has. Raises ValueError that names the file that breaks it."""
    members = set(archive.names)
    metadata = [n for n in archive.names if n == "metadata.jsonl" or n.endswith("/metadata.jsonl")]
    if "dataset.json" in members:
        found = _edm(archive, members)
    elif metadata:
        found = _metadata(archive, members, metadata, text_key)
    else:
        found = _class_folders(archive)
    if not found.names:
        raise ValueError(f"{archive.path}: holds no image (looked for {', '.join(EXTENSIONS)})")
    return found


def _json(archive: Folder | Zip, name: str):
    try:
        return json.loads(archive.read(name))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{archive.where(name)}: not valid JSON ({error})") from error


def _images(archive: Folder | Zip) -> list[str]:
    return [n for n in archive.names if n.lower().endswith(EXTENSIONS)]


def _class_index(value, class_names: tuple[str, ...], where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: label {value!r} is not a class index")
    if value < 0 or (class_names and value >= len(class_names)):
        expected = f"0..{len(class_names) - 1}" if class_names else "0 or more"
        raise ValueError(f"{where}: label {value} is out of range; expected {expected}")
    return value


def _all_or_none(labels: list[int | None], names: list[str], where: str) -> np.ndarray:
    missing = [n for n, label in zip(names, labels) if label is None]
    if missing and len(missing) < len(labels):
        raise ValueError(f"{where}: '{missing[0]}' has no label while others have one")
    return np.asarray([-1 if label is None else label for label in labels], np.int32)


def _numbered(labels: np.ndarray, class_names: tuple[str, ...]) -> tuple[str, ...]:
    return class_names or tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))


def _edm(archive: Folder | Zip, members: set[str]) -> Records:
    where = archive.where("dataset.json")
    content = _json(archive, "dataset.json")
    pairs = content.get("labels") if isinstance(content, dict) else None
    if pairs is None:
        names = _images(archive)
        return Records(names, np.full(len(names), -1, np.int32), [""] * len(names), ["train"] * len(names), ())
    found = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"{where}: entry {pair!r} is not a pair [file name, class index]")
        name = check_name(pair[0], where)
        if name not in members:
            raise ValueError(f"{where}: '{name}' is listed but not there")
        found[name] = _class_index(pair[1], (), f"{where}: '{name}'")
    names = sorted(found)
    unlisted = next((n for n in _images(archive) if n not in found), None)
    if unlisted is not None:
        raise ValueError(f"{where}: '{unlisted}' has no label while others have one")
    labels = np.asarray([found[n] for n in names], np.int32)
    return Records(names, labels, [""] * len(names), ["train"] * len(names), _numbered(labels, ()))


def _metadata(archive: Folder | Zip, members: set[str], files: list[str], text_key: str) -> Records:
    class_names: tuple[str, ...] = ()
    if "classes.json" in members:
        content = _json(archive, "classes.json")
        class_names = tuple(content["labels"] if isinstance(content, dict) else content)
    rows = []
    for file in files:
        base = file[: -len("metadata.jsonl")]
        text = archive.read(file).decode("utf-8-sig", errors="replace")
        # Not splitlines(): it also cuts at U+2028 and its like, which may stand inside a JSON string.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{archive.where(file)}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f"{where}: expected an object with a file_name")
            name = base + check_name(row["file_name"], where)
            if name not in members:
                raise ValueError(f"{where}: '{name}' is listed but not there")
            top = name.split("/")[0]
            split = str(row.get("split") or (SPLITS.get(top, "train") if "/" in name else "train"))
            rows.append((SPLITS.get(split, split), name, row.get("label"), str(row.get(text_key) or ""), where))
    if rows and all(isinstance(r[2], str) for r in rows):
        class_names = class_names or tuple(sorted({r[2] for r in rows}))
        index = {n: i for i, n in enumerate(class_names)}
        for r in rows:
            if r[2] not in index:
                raise ValueError(f"{r[4]}: label '{r[2]}' of '{r[1]}' is not among the {len(class_names)} class names")
        rows = [(s, n, index[label], t, w) for s, n, label, t, w in rows]
    seen: dict[str, str] = {}
    for _, name, _, _, where in rows:
        if name in seen:
            raise ValueError(f"{where}: '{name}' is listed twice (first at {seen[name]})")
        seen[name] = where
    rows.sort(key=lambda r: r[:2])
    names = [r[1] for r in rows]
    labels = [None if r[2] is None else _class_index(r[2], class_names, f"{r[4]}: '{r[1]}'") for r in rows]
    labels = _all_or_none(labels, names, archive.where(files[0]))
    return Records(names, labels, [r[3] for r in rows], [r[0] for r in rows], _numbered(labels, class_names))


def _class_folders(archive: Folder | Zip) -> Records:
    paths = [n.split("/") for n in _images(archive)]
    tops = {p[0] for p in paths if len(p) > 1}
    split_folders = tops & set(SPLITS)
    if split_folders:
        stray = next((p for p in paths if p[0] not in split_folders), None)
        if stray is not None:
            raise ValueError(
                f"{archive.where('/'.join(stray))}: lies outside the split folders {sorted(split_folders)}"
            )
    rows = []
    for parts in paths:
        inner = parts[1:] if split_folders else parts
        split = SPLITS[parts[0]] if split_folders else "train"
        rows.append((split, "/".join(parts), inner[0] if len(inner) > 1 else None))
    rows.sort(key=lambda r: r[:2])
    class_names = tuple(sorted({r[2] for r in rows if r[2] is not None}))
    index = {n: i for i, n in enumerate(class_names)}
    names = [r[1] for r in rows]
    labels = _all_or_none([index.get(r[2]) for r in rows], names, str(archive.path))
    return Records(names, labels, [""] * len(names), [r[0] for r in rows], class_names)


def select(found: Records, split: str, where: str, val_from_train: int = 0) -> tuple[list[str], np.ndarray, list[str]]:
    """(names, labels, texts) of one split. With `val_from_train` = k, 'val' is the last k training images of each class
    (by file name) and 'train' the others; no image is ever in two splits.

    Raises ValueError if there is no such split, or a class has no more than k training images.
    """
    splits = np.asarray(found.splits)
    if val_from_train:
        if (splits == "val").any():
            raise ValueError(f"{where}: val_from_train={val_from_train}, but there is a 'val' split already")
        for label in np.unique(found.labels[splits == "train"]):
            members = np.flatnonzero((splits == "train") & (found.labels == label))
            if val_from_train < 0 or len(members) <= val_from_train:
                which = f"class '{found.class_names[label]}'" if label >= 0 else "the set"
                raise ValueError(f"{where}: val_from_train={val_from_train}, but {which} has {len(members)} images")
            splits = splits.astype(object)
            splits[members[-val_from_train:]] = "val"
    chosen = np.flatnonzero(splits == SPLITS.get(split, split))
    if not len(chosen):
        known = ", ".join(f"{s} ({n})" for s, n in zip(*np.unique(splits.astype(str), return_counts=True)))
        hint = "; val_from_train=k makes 'val' of the last k of each class" if split == "val" else ""
        raise ValueError(f"{where}: no split '{split}'; there are {known}{hint}")
    return [found.names[i] for i in chosen], found.labels[chosen], [found.texts[i] for i in chosen]
