"""One table a model: the names and layouts of torch's tensors <-> the leaves of our parameter trees.

    Row("down_blocks_{i}/resnets_{j}/conv1", "down_blocks.{i}.resnets.{j}.conv1", "conv")

A row names a module on both sides; {i}, {j}, ... stand for numbers. Its kind says what the module holds, ours and theirs:

    conv       kernel[kh, kw, I, O], bias[O]    weight[O, I, kh, kw], bias[O]
    dense      kernel[I, O], bias[O]            weight[O, I], bias[O]
    pixel      kernel[I, O], bias[O]            weight[O, I, 1, 1], bias[O]: a linear map of pixels stored as a convolution
    patch      kernel[(i, j, c), O], bias[O]    weight[O, c, i, j], bias[O]: patches of `Row.patch` pixels a side, likewise
    norm       scale[C], bias[C]                weight[C], bias[C]
    embedding  embedding[N, D]                  weight[N, D]
    array      the leaf itself                  the tensor itself

Dense and pixel read either form and differ in what they write. Several names of theirs lie side by side along the last axis of ours
(q, k, v in one kernel); {*} in theirs, absent from ours, numbers the entries of a leading layer axis (`scan_layers`). A row
without ours names what a file may hold and no network needs. The same rows serve reading and writing.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

KINDS: dict[str, dict[str, str]] = {
    "conv": {"kernel": "weight", "bias": "bias"},
    "dense": {"kernel": "weight", "bias": "bias"},
    "pixel": {"kernel": "weight", "bias": "bias"},
    "patch": {"kernel": "weight", "bias": "bias"},
    "norm": {"scale": "weight", "bias": "bias"},
    "embedding": {"embedding": "weight"},
    "array": {"": ""},
}
FLOATS = ("float32", "float16", "bfloat16", "float64")
SHOWN = 10


class Row(NamedTuple):
    """One line of a table.

    ours     path of a module, or of a leaf for 'array', keys joined by '/'; None: see the module
    theirs   torch's name for it without '.weight' and '.bias'; a tuple: joined along the last axis
    kind     of KINDS
    copies   more names of theirs that hold the same numbers, all of them written
    old      more spellings of theirs, read but never written, where theirs is one name
    patch    pixels a side of a 'patch'
    """

    ours: str | None
    theirs: str | tuple[str, ...]
    kind: str = "array"
    copies: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    patch: int = 0


class Tensor(NamedTuple):
    """A tensor not yet read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Leaf(NamedTuple):
    """A leaf of our tree and the torch names that make it up, layer by layer; the same for each copy and old spelling."""

    path: str
    kind: str
    part: str
    names: tuple[str, ...]
    copies: tuple[tuple[str, ...], ...]
    old: tuple[tuple[str, ...], ...]
    layers: int
    patch: int

    @property
    def joined(self) -> int:
        """How many names lie along the last axis."""
        return len(self.names) // max(self.layers, 1)


def tensors(state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays in memory as Tensors."""
    return {name: Tensor(value.shape, value.dtype, lambda value=value: value) for name, value in state.items()}


def under(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """`rows` one level down: both prefixes put before every name. '' adds nothing."""

    def put(prefix: str, joint: str, name: str) -> str:
        return joint.join(part for part in (prefix, name) if part)

    def names(value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(put(theirs, ".", name) for name in value)

    return tuple(
        Row(
            None if row.ours is None else put(ours, "/", row.ours),
            put(theirs, ".", row.theirs) if isinstance(row.theirs, str) else names(row.theirs),
            row.kind,
            names(row.copies),
            names(row.old),
            row.patch,
        )
        for row in rows
    )


@functools.cache
def _pattern(path: str) -> re.Pattern[str]:
    """A path with {i} in it -> the expression that finds the numbers."""
    parts = re.split(r"\{(\w+)\}", path)
    return re.compile("".join(re.escape(p) if k % 2 == 0 else rf"(?P<{p}>\d+)" for k, p in enumerate(parts)) + "$")


def _spell(names: tuple[str, ...], numbers: Mapping[str, str], layers: int, part: str) -> tuple[str, ...]:
    """The names of a row written out, layer by layer."""
    names = tuple(name.replace("{*}", str(k)) for k in range(layers or 1) for name in names)
    names = tuple(re.sub(r"\{(\w+)\}", lambda m: numbers[m[1]], name) for name in names)
    return tuple(f"{name}.{part}" for name in names) if part else names


def leaves(table: Iterable[Row], shapes: Any) -> Iterator[tuple[Leaf, Any]]:
    """(Leaf, shape) for every leaf of the tree `shapes`. Raises ValueError for a leaf that no row names."""
    rows = [(_pattern(row.ours), row) for row in table if row.ours is not None]
    for keys, shape in jax.tree_util.tree_leaves_with_path(shapes):
        path = "/".join(key.key for key in keys)
        module, _, last = path.rpartition("/")
        for pattern, row in rows:
            part = KINDS[row.kind].get("" if row.kind == "array" else last)
            match = pattern.match(path if row.kind == "array" else module)
            if match is None or part is None:
                continue
            theirs = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
            layers = shape.shape[0] if any("{*}" in name for name in theirs) else 0

            spell = functools.partial(_spell, numbers=match.groupdict(), layers=layers, part=part)
            copies, old = (tuple(spell((name,)) for name in names) for names in (row.copies, row.old))
            yield Leaf(path, row.kind, part, spell(theirs), copies, old, layers, row.patch), shape
            break
        else:
            raise ValueError(f"no name in torch's files is known for the parameter {path}")


def _their_shape(leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What each of leaf.names must measure where our leaf has `shape`."""
    shape = shape[1:] if leaf.layers else shape
    if leaf.joined > 1:
        shape = (*shape[:-1], shape[-1] // leaf.joined)
    if leaf.part != "weight" or leaf.kind in ("norm", "embedding"):
        return shape
    if leaf.kind == "conv":
        return (shape[3], shape[2], *shape[:2])
    if leaf.kind == "patch":
        return (shape[1], shape[0] // leaf.patch**2, leaf.patch, leaf.patch)
    return (*shape[::-1], 1, 1) if leaf.kind == "pixel" else shape[::-1]


def _fits(leaf: Leaf, wanted: tuple[int, ...], met: tuple[int, ...]) -> bool:
    if leaf.kind in ("dense", "pixel") and leaf.part == "weight":
        return met[:2] == wanted[:2] and all(n == 1 for n in met[2:])
    return met == wanted


def _to_ours(leaf: Leaf, arrays: list[np.ndarray]) -> np.ndarray:
    if leaf.part == "weight" and leaf.kind == "conv":
        arrays = [a.transpose(2, 3, 1, 0) for a in arrays]
    elif leaf.part == "weight" and leaf.kind == "patch":
        arrays = [a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]) for a in arrays]
    elif leaf.part == "weight" and leaf.kind in ("dense", "pixel"):
        arrays = [a.reshape(a.shape[:2]).T for a in arrays]
    if leaf.joined > 1:
        arrays = [np.concatenate(arrays[k : k + leaf.joined], -1) for k in range(0, len(arrays), leaf.joined)]
    return np.stack(arrays) if leaf.layers else arrays[0]


def _to_theirs(leaf: Leaf, value: np.ndarray, k: int) -> np.ndarray:
    """The tensor called leaf.names[k], contiguous."""
    shape = _their_shape(leaf, value.shape)
    if leaf.layers:
        value = value[k // leaf.joined]
    if leaf.joined > 1:
        value = np.split(value, leaf.joined, -1)[k % leaf.joined]
    if leaf.part == "weight" and leaf.kind == "conv":
        value = value.transpose(3, 2, 0, 1)
    elif leaf.part == "weight" and leaf.kind == "patch":
        value = value.reshape(leaf.patch, leaf.patch, -1, value.shape[1]).transpose(3, 2, 0, 1)
    elif leaf.part == "weight" and leaf.kind in ("dense", "pixel"):
        value = value.T.reshape(shape)
    return np.asarray(value, order="C")


def _own(value: np.ndarray, dtype: Any) -> np.ndarray:
    """A copy that jax may take over: XLA's CPU backend keeps an array that begins at a multiple of 64 bytes instead of copying
    it, so the memory of whoever gave `value` must not be it."""
    dtype = value.dtype if dtype is None else np.dtype(dtype)
    bytes_ = value.size * dtype.itemsize
    buffer = np.empty(bytes_ + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + bytes_].view(dtype).reshape(value.shape)
    np.copyto(copy, value, casting="unsafe")
    return copy


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"]


def _match(
    table: tuple[Row, ...], shapes: Any, state: Mapping[str, Tensor]
) -> list[tuple[Leaf, tuple[str, ...], tuple[tuple[str, ...], ...]]]:
    """(leaf, names in `state`, copies of them in `state`), the largest leaf first; ValueError for what does not fit."""
    known = {row.theirs for row in table if row.ours is None}
    missing, misshapen, foreign, used, chosen = [], [], [], set(), []
    for leaf, wanted in leaves(table, shapes):
        spellings = [names for names in (leaf.names, *leaf.old) if all(name in state for name in names)]
        # Early DDPM files hold a tensor under its old and its new name at once.
        names, *others = spellings or [leaf.names]
        copies = (*leaf.copies, *others)
        theirs = _their_shape(leaf, wanted.shape)
        for name in (name for group in (names, *copies) for name in group):
            used.add(name)
            if name not in state:
                missing.append(name)
            elif not _fits(leaf, theirs, state[name].shape):
                misshapen.append(f"{name} {list(state[name].shape)} (expected {list(theirs)})")
            elif state[name].dtype.name not in FLOATS:
                foreign.append(f"{name} {state[name].dtype.name}")
        chosen.append((math.prod(wanted.shape), (leaf, names, copies)))
    extra = [name for name in state if name not in used and not any(_pattern(k).match(name) for k in known)]
    faults = (
        *_listed("missing", missing),
        *_listed("not of this network", extra),
        *_listed("of another shape", misshapen),
        *_listed(f"not of {', '.join(FLOATS)}", foreign),
    )
    if faults:
        raise ValueError(f"of {len(used)} tensors that the network has: " + "; ".join(faults))
    return [item for _, item in sorted(chosen, key=lambda pair: -pair[0])]


def read(
    table: Iterable[Row],
    shapes: Any,
    state: Mapping[str, Tensor],
    *,
    dtype: Any = None,
    place: Callable[[str, np.ndarray], Any] = lambda path, value: jax.device_put(value),
) -> Any:
    """The tree of `shapes` (as jax.eval_shape gives it) filled from `state`, one leaf in memory at a time besides the result.

    dtype casts on the way (None: as in the file); place(path, array) puts a leaf where it belongs. Raises ValueError listing
    what is missing, left over, of another shape and of a dtype not in FLOATS, before anything is read, and for copies that
    differ.
    """
    params: dict = {}
    # The largest first: while a leaf is made there are two of it, and by the end there is room for small ones alone.
    for leaf, names, copies in _match(tuple(table), shapes, state):
        arrays = [state[name].read() for name in names]
        for copy in copies:
            for name, first in zip(copy, arrays, strict=True):
                if not np.array_equal(state[name].read(), first):
                    raise ValueError(f"{name} differs from {names[0]}: expected copies of one tensor")
        *parents, last = leaf.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = place(leaf.path, _own(_to_ours(leaf, arrays), dtype))
    return params


def written(table: Iterable[Row], params: Any) -> dict[str, Tensor]:
    """The inverse of `read`: every tensor by torch's name, of the parameters' dtypes, made when it is read."""
    state: dict[str, Tensor] = {}
    for leaf, value in leaves(tuple(table), params):
        shape, dtype = _their_shape(leaf, value.shape), np.dtype(value.dtype)
        for group in (leaf.names, *leaf.copies):
            for k, name in enumerate(group):
                make = functools.partial(_to_theirs, leaf, k=k)
                state[name] = Tensor(shape, dtype, lambda make=make, value=value: make(np.asarray(value)))
    return state


def write(table: Iterable[Row], params: Any) -> dict[str, np.ndarray]:
    """`written`, read."""
    return {name: tensor.read() for name, tensor in written(table, params).items()}
