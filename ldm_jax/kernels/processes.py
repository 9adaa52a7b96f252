"""What the processes of one jax.distributed job decide together.

Each function is collective: every process of the job calls it, in the same order. With one process nothing is sent.
"""

from typing import Any

import jax
import numpy as np


def is_first() -> bool:
    """Whether this is process 0, the one that writes files and prints."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """Process 0's value on every process: a bool, a number of 32 bits or an array of such, of one shape and type on all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    array = np.asarray(value)
    shared = np.asarray(multihost_utils.broadcast_one_to_all(array)).astype(array.dtype)
    return shared if isinstance(value, np.ndarray) else shared.item()


def any_process(value: bool) -> bool:
    """True on every process where it is True on at least one."""
    if jax.process_count() == 1:
        return bool(value)
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(value)).any())


def gather(tree: Any) -> Any:
    """The rows of all processes, one process after the other, as numpy arrays on each of them.

    A leaf holds the rows of this process, or is a jax.Array that is sharded over the processes.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def wait(what: str) -> None:
    """Returns when every process has come to the same `what`; raises AssertionError where one has come to another."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
