"""A part of a source, as a source."""

from collections.abc import Sequence
from typing import Any


class Subset:
    """The items `indices` of `source`, in that order. Its other attributes (`num_classes`, ...) are those of the source."""

    def __init__(self, source: Any, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        return self.source[int(self.indices[i])]

    def where(self, i: int) -> str:
        return self.source.where(int(self.indices[i]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("source", "indices"):
            raise AttributeError(name)
        return getattr(self.source, name)


def spread(source: Any, count: int) -> Any:
    """`count` items at even distances: folders are ordered by class, so the first `count` items could be of one class."""
    size = len(source)
    return source if count >= size else Subset(source, [i * size // count for i in range(count)])
