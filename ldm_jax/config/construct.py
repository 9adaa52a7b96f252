"""A config block as a call: the block {name, ...options} becomes table[name](**options).

A key that the constructor does not take raises, so that a misspelt key of a config is an error and not a default.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ldm_jax.config import config_keys


class Block(NamedTuple):
    """A block of a config that names a constructor, and the constructor's arguments."""

    name: str
    options: dict[str, Any]


def block_of(config: ConfigDict) -> Block:
    """The Block of a config's block."""
    options = config.to_dict()
    return Block(options.pop("name"), options)


def named(kind: str, table: Mapping[str, Any], name: str) -> Any:
    """table[name]. Raises ValueError, which lists the names of the table, for a name that is not in it; kind: that of the block."""
    if name not in table:
        raise ValueError(f"config.{kind}.name={name!r} is unknown; there are {', '.join(sorted(table))}")
    return table[name]


def construct(kind: str, table: Mapping[str, Callable], block: Block, **more: Any) -> Any:
    """table[block.name](**block.options, **more). Raises ValueError, which names the key, for an option that does not fit.

    kind: the name of the block in the config, for the message; more: arguments that are none of the block's.
    """
    make = named(kind, table, block.name)
    config_keys.check_call(f"config.{kind}", make, block.options, excluded=more)
    try:
        return make(**block.options, **more)
    except TypeError as error:
        raise ValueError(f"config.{kind} ({block.name}): {error}") from error
