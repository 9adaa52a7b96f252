"""What belongs to one published class of network: how its config.json reads, and how its tensors are called.

    Format(library, module, config, table, shapes),   module(config(m)) computes what m computes

An option that is not understood is an error that names it: a network that ignores one loads without complaint and computes
something else.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from ldm_jax.weights.layout import Row


class Format(NamedTuple):
    """One published class.

    library  'diffusers' or 'transformers': how its files are called
    module   config.json -> our module; ValueError naming an option that is unknown or unsupported, with its value
    config   our module -> the options to write, without the class name; ValueError for what the class cannot express
    table    our module -> the rows of its tensors
    shapes   our module -> its tree of parameters, shapes and dtypes alone
    """

    library: str
    module: Callable[[Mapping[str, Any]], nn.Module]
    config: Callable[[nn.Module], dict[str, Any]]
    table: Callable[[nn.Module], tuple[Row, ...]]
    shapes: Callable[[nn.Module], Any]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def options(
    name: str,
    config: Mapping[str, Any],
    known: Mapping[str, Any],
    *,
    fixed: Mapping[str, tuple] = {},
    unused: Collection[str] = (),
) -> dict[str, Any]:
    """The options of `known` out of the config.json of `name`, lists as tuples.

    known    option -> its default as published
    fixed    option -> the values that compute what our module computes
    unused   options without a bearing on the numbers
    Keys that begin with '_' are skipped. Raises ValueError for a value that is not in `fixed` and for any other key.
    """
    for key, value in config.items():
        if key in fixed and _tuples(value) not in fixed[key]:
            expected = " or ".join(repr(v) for v in fixed[key])
            raise ValueError(f"{name}: {key} is {value!r}, expected {expected}")
        if not (key.startswith("_") or key in known or key in fixed or key in unused):
            raise ValueError(f"{name}: option {key} (here {value!r}) is unknown")
    return {key: _tuples(config.get(key, default)) for key, default in known.items()}
