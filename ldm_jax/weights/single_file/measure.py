"""Measures of networks from the names and shapes of a file's tensors, before any tensor is read."""

from collections.abc import Mapping
from typing import Any

# The name of a tensor -> its shape.
Shapes = Mapping[str, tuple[int, ...]]


def below(prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, by the rest of the name."""
    return {name[len(prefix) :]: value for name, value in names.items() if name.startswith(prefix)}


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of the tensor `name`; ValueError where there is none."""
    if name not in shapes:
        raise ValueError(f"single file: no tensor {name}, by which the network is measured")
    return tuple(shapes[name])


def size(shapes: Shapes, name: str, axis: int) -> int:
    """The length of one axis of the tensor `name`; ValueError where there is no such tensor or axis."""
    shape = shape_of(shapes, name)
    if len(shape) <= axis:
        raise ValueError(f"single file: {name} is {list(shape)}, expected at least {axis + 1} dimensions")
    return shape[axis]


def count(shapes: Shapes, prefix: str) -> int:
    """How many entries the list of modules `prefix` has."""
    return len({name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)})
