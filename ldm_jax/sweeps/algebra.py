"""Lists of overrides. An override is a dict from a dotted key to a value; a list of them is a list of runs.

    product(sweep('optimizer.learning_rate', [1e-4, 3e-4]), sweep('model.hidden_size', [128, 256]))      4 runs
    zipit(sweep('model.depth', [4, 8]), sweep('train.images', [20_000, 40_000]))                         2 runs
    chain(grid, [{'optimizer.learning_rate': 1e-3, 'model.hidden_size': 128}])                           one more

Everything is a plain list of plain dicts, so that a list comprehension can make one as well.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

Overrides = dict[str, Any]


def sweep(key: str, values: Iterable[Any]) -> list[Overrides]:
    """One run for each value of `key`."""
    return [{key: value} for value in values]


def fixed(key: str, value: Any) -> list[Overrides]:
    """One run with `key` set: the factor of a `product` that sets a key in every run."""
    return [{key: value}]


def product(*lists: Sequence[Overrides]) -> list[Overrides]:
    """All combinations, in which the last list varies fastest. Raises ValueError where two lists set the same key."""
    return [_merge(combination, "product") for combination in itertools.product(*lists)]


def zipit(*lists: Sequence[Overrides]) -> list[Overrides]:
    """The i-th run of every list merged into one. Raises ValueError for unequal lengths or a key that is set twice."""
    lengths = [len(runs) for runs in lists]
    if len(set(lengths)) > 1:
        raise ValueError(f"zipit takes lists of one length, got lengths {lengths}")
    return [_merge(combination, "zipit") for combination in zip(*lists)]


def chain(*lists: Sequence[Overrides]) -> list[Overrides]:
    """The lists joined one after another."""
    return [dict(run) for runs in lists for run in runs]


def _merge(dicts: Iterable[Overrides], name: str) -> Overrides:
    merged: Overrides = {}
    for overrides in dicts:
        # If the last one replaced the others silently, the grid would be smaller than it looks.
        for key in overrides.keys() & merged.keys():
            raise ValueError(f"{name}: the key {key!r} is set by two of the lists")
        merged.update(overrides)
    return merged
