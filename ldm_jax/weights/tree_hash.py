"""The sha256 of a tree of arrays, which names the parameters of a network whatever file they came in.

Digests are stored: in checkpoints, in caches of latents and of statistics, in reports. Their formats therefore never change.
"""

import hashlib
from typing import Any

import jax
import numpy as np


def tree_sha256(tree: Any, head: str = "", described: bool = True) -> str:
    """sha256, as hex digits, of `head` and then of every leaf in the order of the tree: its path, dtype and shape, and its bytes.

    described=False: of paths and bytes alone, as the facts of a task are stored (training.task.Task.facts).
    """
    sha256 = hashlib.sha256(head.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array, name = np.asarray(leaf), jax.tree_util.keystr(path)
        sha256.update((f"{name} {array.dtype.name} {array.shape}\n" if described else name).encode())
        sha256.update(np.ascontiguousarray(array).view(np.uint8).data)
    return sha256.hexdigest()
