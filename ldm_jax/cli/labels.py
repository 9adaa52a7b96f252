"""Classes as they are given on a command line: numbers and names between commas, where names may hold commas themselves.

    --label=3,7     --label="golden retriever"     --label="tench, Tinca tinca,goldfish"     --label=tench

ImageNet's names are lists of synonyms, 'tench, Tinca tinca': the whole name and each synonym are understood, whatever the case.
"""

import difflib
from collections.abc import Mapping


def _plain(name: str) -> str:
    """A name as it is compared: one space after each comma, no case."""
    return ", ".join(" ".join(part.split()) for part in name.split(",")).casefold()


def _by_name(names: Mapping[int, str]) -> dict[str, list[int]]:
    """{plain name or synonym: its classes}; a whole name hides synonyms that are spelt alike."""
    whole, synonyms = {}, {}
    for label, name in names.items():
        whole.setdefault(_plain(name), []).append(label)
        for word in _plain(name).split(", "):
            synonyms.setdefault(word, []).append(label)
    return synonyms | whole


def read(text: str, names: Mapping[int, str], classes: int) -> list[int]:
    """The classes in `text`, each from 0 to classes - 1; the longest run of words that is a name is one.

    A name that is also a number is the class of that name. Raises ValueError for what is neither, with the nearest names, and for a
    name of several classes, with their numbers.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    by_name, labels = _by_name(names), []
    while words:
        runs = [_plain(", ".join(words[:n])) for n in range(len(words), 0, -1)]
        name = next((run for run in runs if run in by_name), None)
        if name is None:
            labels.append(_number(words.pop(0), names, by_name, classes))
            continue
        if len(by_name[name]) > 1:
            raise ValueError(
                f"--label={name} names several classes: {', '.join(f'{i} ({names[i]})' for i in by_name[name][:8])}; expected a number"
            )
        labels += by_name[name]
        del words[: name.count(", ") + 1]
    return labels


def _number(word: str, names: Mapping[int, str], by_name: Mapping[str, list[int]], classes: int) -> int:
    if word.isdecimal() and int(word) < classes:
        return int(word)
    expected = f"0 to {classes - 1}"
    if names and not word.lstrip("+-").isdecimal():
        near = difflib.get_close_matches(_plain(word), by_name, n=3, cutoff=0.5)
        near = near or [name for name in by_name if _plain(word) in name][:3]
        some = near or list(names.values())[:3]
        expected += f" or a name, such as {' or '.join(map(repr, some))}"
    raise ValueError(f"--label={word} is no class; expected {expected}")
