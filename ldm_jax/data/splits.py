"""Which split a name means, and at which depth of its paths a data set has the names of splits.

The words are those of Hugging Face's imagefolder (datasets/data_files.py): train, training; validation, valid, val, dev; test,
testing, eval, evaluation. A name means a split when it holds nothing but such a word, upper or lower case, besides digits,
separators and fillers: Train, TRAIN, training_set, train2017, test-images, TestData, X_train.
"""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ldm_jax.data.archive import Folder, Zip

WORDS = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val"}
WORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
FILLERS = ("datasets?", "data", "sets?", "images?", "imgs?", "pictures?", "photos?", "splits?", "folder", "files?")
_FILLER = "|".join((*FILLERS, "jpe?g", "png", "x", "v"))
_WORD = "|".join(sorted(WORDS, key=len, reverse=True))
_PLAIN = re.compile(rf"(?:{_FILLER})*({_WORD})(?:{_FILLER})*")
_TWO = re.compile(rf"(?:{_FILLER})*({_WORD})({_WORD})(?:{_FILLER})*")
_FILLED = re.compile(rf"(?:{'|'.join(FILLERS)})+")
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")
_WAY_OUT = (
    "config.data.splits says which folders are which, such as {'train': 'a', 'test': 'b'}, or {} where none is a split"
)
SHOWN = 6


class Name(NamedTuple):
    """What a name says: `split` is 'train', 'val', 'test', '?' (two of them) or '' (none), `rest` holds its other words."""

    split: str
    rest: str


class Place(NamedTuple):
    """Where an image belongs: its split, '' for none, and the folders of its path that say something else."""

    split: str
    folders: tuple[str, ...]


@functools.lru_cache(4096)
def read_name(name: str) -> Name:
    """The split that `name` says, with its other words in `rest` ('cats_train')."""
    compact = re.sub(r"[\W\d_]+", "", name).lower()
    if plain := _PLAIN.fullmatch(compact):
        return Name(WORDS[plain[1]], "")
    if two := _TWO.fullmatch(compact):
        same = WORDS[two[1]] == WORDS[two[2]]
        return Name(WORDS[two[1]] if same else "?", "")
    marks, rest = set(), []
    for token in _TOKEN.findall(name):
        if token.lower() in WORDS:
            marks.add(WORDS[token.lower()])
        elif not _FILLED.fullmatch(token.lower()):
            rest.append(token.lower())
    return Name("?" if len(marks) > 1 else "".join(marks), " ".join(rest))


def canonical(name: str) -> str:
    """'train', 'val' or 'test' for a name that means one of them, else `name` itself ('test_tone')."""
    split, rest = read_name(name)
    return split if split not in ("", "?") and not rest else name


def _is_mark(name: str) -> bool:
    split, rest = read_name(name)
    return split != "" and not rest


def below_one_folder(folders: set[tuple[str, ...]]) -> int:
    """How many folders contain all others and mean nothing: the folder that Finder and Explorer put around a zip, and 'images'.

    The last of them counts only if its name means nothing, because a set of one class has one folder too.
    """
    depth = 0
    while folders and all(len(f) > depth for f in folders) and len({f[depth] for f in folders}) == 1:
        name = next(iter(folders))[depth]
        deeper = any(len(f) > depth + 1 for f in folders)
        if _is_mark(name) or not (deeper or _FILLED.fullmatch(re.sub(r"[\W\d_]+", "", name).lower())):
            break
        depth += 1
    return depth


def _shown(names) -> str:
    names = sorted({"/".join(n) if isinstance(n, tuple) else n for n in names})
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{n}'" for n in names[:SHOWN]) + more


def _mixed(folders: set[tuple[str, ...]]) -> dict[tuple[str, ...], set[str]]:
    """{parent: names} of neighbouring folders whose names hold words of several splits beside other words: cats_train, cats_test."""
    beside: dict[tuple[str, ...], set[str]] = {}
    for path in {f[: i + 1] for f in folders for i in range(len(f))}:
        split, rest = read_name(path[-1])
        if split and rest:
            beside.setdefault(path[:-1], set()).add(path[-1])
    return {parent: names for parent, names in beside.items() if len({read_name(n).split for n in names}) > 1}


def _single(folders: set[tuple[str, ...]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Each path with a split's folder once where it stands twice, as unpacked archives have it: train/train/, seg_test/seg_test/."""
    inside: dict[tuple[str, ...], set[str]] = {}
    for f in folders:
        for i in range(len(f) + 1):
            inside.setdefault(f[:i], set()).add(f[i] if i < len(f) else "")

    def again(f: tuple[str, ...], i: int) -> bool:
        return f[i] == f[i - 1] and read_name(f[i]).split != "" and inside[f[:i]] == {f[i]}

    return {f: tuple(name for i, name in enumerate(f) if not (i and again(f, i))) for f in folders}


def _depth(folders: set[tuple[str, ...]], where: str, stray: str) -> int | None:
    """The depth of the paths at which the splits stand; None: nowhere. `stray` names an image whose path names no split.

    Raises ValueError where the folders can be read in two ways.
    """
    marks = {f: tuple(i for i, name in enumerate(f) if _is_mark(name)) for f in folders}
    named = {f[: i + 1] for f, at in marks.items() for i in at}
    unclear = {path for path in named if read_name(path[-1]).split == "?"}
    if unclear:
        raise ValueError(f"{where}: {_shown(unclear)} names two splits at once; {_WAY_OUT}")
    mixed, tops = _mixed(folders), {f[0] if f else "" for f in folders}
    if not named and mixed == {(): tops}:
        names = [read_name(top) for top in tops]
        # The names differ in that word alone, as DIV2K_train_HR and DIV2K_valid_HR do.
        if len({n.rest for n in names}) == 1 and len({n.split for n in names} - {"?"}) == len(tops):
            return 0
    if mixed:
        beside = {(*parent, name) for parent, names in mixed.items() for name in names}
        raise ValueError(f"{where}: {_shown(beside)} can be read as classes or as splits; {_WAY_OUT}")
    if not named:
        return None
    inside = {f[: at[1] + 1] for f, at in marks.items() if len(at) > 1}
    if inside:
        raise ValueError(f"{where}: {_shown(inside)}: named like a split inside of a split; {_WAY_OUT}")
    if not all(marks.values()):
        raise ValueError(f"{stray}: lies outside the split folders {_shown(named)}; {_WAY_OUT}")
    if len({at[0] for at in marks.values()}) > 1:
        raise ValueError(f"{where}: the split folders {_shown(named)} do not lie at one depth; {_WAY_OUT}")
    depth = next(iter(marks.values()))[0]
    alike: dict[tuple[tuple[str, ...], str], set[tuple[str, ...]]] = {}
    for path in named:
        alike.setdefault((path[:-1], read_name(path[-1]).split), set()).add(path)
    twice = next((sorted(v) for v in alike.values() if len(v) > 1), None)
    if twice:
        raise ValueError(f"{where}: {_shown(twice)} mean the same split '{read_name(twice[0][-1]).split}'; {_WAY_OUT}")
    return depth


def _check_file_names(names: Sequence[str], where: str) -> None:
    """Raise ValueError where all file names begin with a split (train_1.png, test_1.png), and with several of them."""
    seen: dict[str, str] = {}
    for name in names:
        stem = name.rpartition("/")[2].rpartition(".")[0]
        split = read_name(stem).split
        if not split:
            return
        seen.setdefault(split, name)
    if len(seen) > 1:
        raise ValueError(f"{where}: the file names {_shown(seen.values())} name splits; sort them into folders, or "
                         "config.data.splits={} makes all of them 'train'")  # fmt: skip


def _declared(
    folders: set[tuple[str, ...]], splits: Mapping[str, str | Sequence[str]], where: str
) -> dict[tuple[str, ...], Place | None]:
    """The place of each folder by `splits`, {split: folder or folders}, from the root or from below the folders that contain all."""
    strip = below_one_folder(folders)
    prefixes = {}
    for split, values in splits.items():
        for value in [values] if isinstance(values, str) else values:
            parts = tuple(part for part in value.replace("\\", "/").split("/") if part not in ("", "."))
            prefix = next((p for p in (parts, (*next(iter(folders))[:strip], *parts))
                           if any(f[: len(p)] == p for f in folders)), None)  # fmt: skip
            if prefix is None:
                there = _shown({f[:1] for f in folders if f} | {f[: strip + 1] for f in folders if len(f) > strip})
                raise ValueError(
                    f"{where}: config.data.splits['{split}'] is '{value}', where no image lies; there are {there or 'no folders'}"
                )
            if prefix in prefixes and prefixes[prefix] != canonical(split):
                raise ValueError(f"{where}: config.data.splits gives '{value}' to two splits")
            prefixes[prefix] = canonical(split)
    out: dict[tuple[str, ...], Place | None] = {}
    for f in folders:
        prefix = max((p for p in prefixes if f[: len(p)] == p), key=len, default=None)
        out[f] = None if prefix is None else Place(prefixes[prefix], f[len(prefix) :])
    return out


def _is_names(value) -> bool:
    return isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(v, str) for v in value))


def place(
    names: Sequence[str],
    archive: Folder | Zip,
    splits: Mapping[str, str | Sequence[str]] | None = None,
) -> list[Place | None]:
    """The Place of each image by its path; None where `splits` leaves it out.

    Args:
        names: paths with '/' between the folders.
        archive: where the names come from, for messages.
        splits: {split: folder or folders}, where the folders' names do not say it; {}: no folder is a split.

    Raises ValueError, with the names that it met, where the folders can be read in two ways.
    """
    paths = [tuple(n.split("/")[:-1]) for n in names]
    folders = set(paths)
    once = _single(folders)
    strip = below_one_folder(set(once.values()))
    where = str(archive.path)
    if not isinstance(splits, Mapping | None) or not all(map(_is_names, (splits or {}).values())):
        raise ValueError(
            f"config.data.splits={splits!r}; expected {{split: folder or folders}}, such as {{'train': 'a'}}"
        )
    if splits:
        placed = _declared(folders, splits, where)
    else:
        depth = None
        if splits is None:
            stray = next((n for n, f in zip(names, paths) if not any(map(_is_mark, once[f][strip:]))), "")
            depth = _depth({f[strip:] for f in once.values()}, where, archive.where(stray))
        if depth is None:
            placed = {f: Place("", f[strip:]) for f in folders}
        else:
            at = strip + depth
            placed = {f: Place(read_name(o[at]).split, o[strip:at] + o[at + 1 :]) for f, o in once.items()}
        if splits is None and depth is None:
            _check_file_names(names, where)
    inner = {p.folders for p in placed.values() if p is not None}
    again = below_one_folder(inner)  # train/images/CLASS: each split has the same single folder at its top
    placed = {f: p and Place(p.split, p.folders[again:]) for f, p in placed.items()}
    return [placed[f] for f in paths]


def value_splits(values: Sequence[str], where: str) -> dict[str, str]:
    """{value: split} of the `split` values that metadata gives. Raises ValueError where two of them mean one split."""
    out = {value: canonical(value) for value in dict.fromkeys(values)}
    for a, b in itertools.combinations(out, 2):
        if out[a] == out[b] and a.lower() != b.lower():
            raise ValueError(
                f"{where}: the splits '{a}' and '{b}' mean the same split '{out[a]}'; expected one of the names"
            )
    return out
