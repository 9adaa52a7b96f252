"""A config block as a call: the block {name, ...options} becomes table[name](**options).

A key that the constructor does not take raises, so that a misspelt key of a config is an error and not a default.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.config import config_keys


def options_of(block: ConfigDict) -> dict[str, Any]:
    """The keys of a block as keyword arguments, without its name."""
    return {key: value for key, value in block.to_dict().items() if key != "name"}


def named(kind: str, table: dict[str, Callable], block: ConfigDict) -> Any:
    """table[block.name]. Raises ValueError, which lists the names of the table, for a name that is not in it."""
    if block.name not in table:
        raise ValueError(f"config.{kind}.name={block.name!r} is unknown; there are {', '.join(sorted(table))}")
    return table[block.name]


def construct(kind: str, table: dict[str, Callable], block: ConfigDict, **more: Any) -> Any:
    """table[block.name](**the block's options, **more). Raises ValueError, which names the key, for an option that does not fit.

    kind: the name of the block in the config, for the message; more: arguments that are none of the block's.
    """
    make, options = named(kind, table, block), options_of(block)
    config_keys.check_call(f"config.{kind}", make, options, given=more)
    try:
        return make(**options, **more)
    except TypeError as error:
        raise ValueError(f"config.{kind} ({block.name}): {error}") from error
