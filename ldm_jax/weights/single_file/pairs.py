"""Tables of names: the tensors of a single file <-> those of the folder that diffusers or transformers writes of the same network.

    Pair("in_layers.2", "conv1")                                    a module: its weight and its bias under both names
    Pair("attn.in_proj_weight", ("q.weight", "k.weight"), JOINED)   a tensor that differs in how it is stored

One table serves both directions. A tensor is not read when it is renamed: what differs in layout is made when it is read.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ldm_jax.weights.layout import Tensor


class Storage(NamedTuple):
    """How a tensor is stored on both sides.

    to_folder  (its name in the file, the tensor, how many names it has in the folder) -> as many tensors of the folder
    to_file    the tensors of the folder -> the tensor of the file
    """

    to_folder: Callable[[str, Tensor, int], list[Tensor]]
    to_file: Callable[[list[Tensor]], Tensor]


def _transposed(tensor: Tensor) -> Tensor:
    shape, dtype, read = tensor
    return Tensor(shape[::-1], dtype, lambda: np.ascontiguousarray(read().T))


def _as_linear(tensor: Tensor) -> Tensor:
    shape, dtype, read = tensor
    if any(n != 1 for n in shape[2:]):
        return tensor
    return Tensor(shape[:2], dtype, lambda: read().reshape(shape[:2]))


def _as_pixels(tensor: Tensor) -> Tensor:
    shape, dtype, read = tensor
    return Tensor((*shape, 1, 1), dtype, lambda: read().reshape(*shape, 1, 1)) if len(shape) == 2 else tensor


def _cut(name: str, tensor: Tensor, count: int) -> list[Tensor]:
    shape, dtype, read = tensor
    length, rest = divmod(shape[0] if shape else 1, count)
    if rest:
        raise ValueError(f"single file: {name} is {list(shape)}, expected {count} tensors one after the other")
    return [
        # A copy, or the joined tensor stays in memory for each of its parts.
        Tensor((length, *shape[1:]), dtype, lambda k=k: read()[k * length : (k + 1) * length].copy())
        for k in range(count)
    ]


def _concatenated(tensors: list[Tensor]) -> Tensor:
    shape, dtype, _ = tensors[0]
    length = sum(tensor.shape[0] for tensor in tensors)
    return Tensor((length, *shape[1:]), dtype, lambda: np.concatenate([tensor.read() for tensor in tensors]))


# One array under two names.
SAME = Storage(lambda name, tensor, count: [tensor], lambda tensors: tensors[0])
# A linear map of pixels: weight[O, I, 1, 1] in the file, weight[O, I] in the folder.
PIXEL = Storage(lambda name, tensor, count: [_as_linear(tensor)], lambda tensors: _as_pixels(tensors[0]))
# [I, O] in the file, [O, I] in the folder.
TRANSPOSED = Storage(lambda name, tensor, count: [_transposed(tensor)], lambda tensors: _transposed(tensors[0]))
# One tensor in the file; several in the folder, which lie one after the other along axis 0 in the file.
JOINED = Storage(_cut, _concatenated)


class Pair(NamedTuple):
    """One line of a table: a module (its weight and its bias), or a whole tensor, under both names.

    Only a JOINED tensor has several names `hf`.
    """

    ldm: str
    hf: str | tuple[str, ...]
    storage: Storage = SAME

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the folder."""
        return (self.hf,) if isinstance(self.hf, str) else self.hf


def under(ldm: str, hf: str, pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """`pairs` one level down: each prefix, with a dot, is put before every name of its side."""
    return tuple(
        Pair(f"{ldm}.{pair.ldm}", tuple(f"{hf}.{name}" for name in pair.names), pair.storage) for pair in pairs
    )


def alike(*names: str) -> tuple[Pair, ...]:
    """Pairs of what both sides call by one name."""
    return tuple(Pair(name, name) for name in names)


def find(rows: Mapping[str, Pair], name: str) -> tuple[Pair | None, str]:
    """The row that `name` belongs to, and the rest of the name: '.weight' or '.bias' of a module, '' of a tensor."""
    module, dot, last = name.rpartition(".")
    if name not in rows and last in ("weight", "bias"):
        return rows.get(module), dot + last
    return rows.get(name), ""
