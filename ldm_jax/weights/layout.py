"""One table a model: the names and layouts of torch's tensors <-> the leaves of our parameter trees.

    Row("down_blocks_{i}/resnets_{j}/conv1", "down_blocks.{i}.resnets.{j}.conv1", CONV2D)

A row names a module on both sides; {i}, {j}, ... stand for numbers. Its kind (kinds.py) says which tensors the module has, and how each
of them lies on both sides. Several names of theirs lie side by side along the last axis of ours
(q, k, v in one kernel); {*} in theirs, absent from ours, numbers the entries of a leading layer axis (`scan_layers`). A row
without ours names what a file may hold and no network needs. The same rows serve reading and writing.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from ldm_jax.weights.kinds import ARRAY, Kind, Transform

FLOATS = ("float32", "float16", "bfloat16", "float64")
SHOWN = 10


class Row(NamedTuple):
    """One line of a table.

    ours     path of a module, or of a leaf for ARRAY, keys joined by '/'; None: see the module
    theirs   torch's name for it without '.weight' and '.bias'; a tuple: joined along the last axis
    kind     which tensors it has, and how they lie
    copies   more names of theirs that hold the same numbers, all of them written
    old      more spellings of theirs, read but never written, where theirs is one name
    """

    ours: str | None
    theirs: str | tuple[str, ...]
    kind: Kind = ARRAY
    copies: tuple[str, ...] = ()
    old: tuple[str, ...] = ()


class Tensor(NamedTuple):
    """A tensor not yet read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Leaf(NamedTuple):
    """A leaf of our tree and the torch names that make it up, layer by layer; the same for each copy and old spelling."""

    path: str
    transform: Transform
    names: tuple[str, ...]
    copies: tuple[tuple[str, ...], ...]
    old: tuple[tuple[str, ...], ...]
    layers: int

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
            owner, key = (path, "") if "" in row.kind else (module, last)
            match = pattern.match(owner)
            if match is None or key not in row.kind:
                continue
            part, transform = row.kind[key]
            theirs = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
            layers = shape.shape[0] if any("{*}" in name for name in theirs) else 0

            spell = functools.partial(_spell, numbers=match.groupdict(), layers=layers, part=part)
            copies, old = (tuple(spell((name,)) for name in names) for names in (row.copies, row.old))
            yield Leaf(path, transform, spell(theirs), copies, old, layers), shape
            break
        else:
            raise ValueError(f"no name in torch's files is known for the parameter {path}")


def _their_shape(leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What each of leaf.names must measure where our leaf has `shape`."""
    shape = shape[1:] if leaf.layers else shape
    if leaf.joined > 1:
        shape = (*shape[:-1], shape[-1] // leaf.joined)
    # An array of this shape that takes no memory.
    return leaf.transform.to_torch(np.broadcast_to(np.int8(0), shape)).shape


def _fits(leaf: Leaf, wanted: tuple[int, ...], met: tuple[int, ...]) -> bool:
    if leaf.transform.flat:
        return met[:2] == wanted[:2] and all(n == 1 for n in met[2:])
    return met == wanted


def _to_theirs(leaf: Leaf, value: np.ndarray, k: int) -> np.ndarray:
    """The tensor called leaf.names[k], contiguous."""
    if leaf.layers:
        value = value[k // leaf.joined]
    if leaf.joined > 1:
        value = np.split(value, leaf.joined, -1)[k % leaf.joined]
    return np.asarray(leaf.transform.to_torch(value), order="C")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory of our own that jax may take over: XLA's CPU backend keeps an array that begins at a multiple of 64 bytes instead
    of copying it."""
    bytes_ = math.prod(shape) * dtype.itemsize
    buffer = np.empty(bytes_ + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + bytes_].view(dtype).reshape(shape)


def _cast_into(out: np.ndarray, where: str, value: np.ndarray) -> None:
    """`narrowed`, into `out`."""
    with np.errstate(over="ignore"):
        np.copyto(out, value, casting="unsafe")
    # By range and not by size: bfloat16, as wide as float16, goes as far as float32.
    if ml_dtypes.finfo(out.dtype).max >= ml_dtypes.finfo(value.dtype).max or np.isfinite(out).all():
        return
    lost = np.isfinite(value) & ~np.isfinite(out)
    if lost.any():
        advice = "; take bfloat16" if out.dtype == np.float16 else ""
        raise ValueError(f"{where}: {np.abs(value[lost]).max():g} is out of the range of {out.dtype.name}{advice}")


def narrowed(where: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`value` in `dtype`. ValueError where a number that was finite no longer is: float16 ends at 65504."""
    out = np.empty(value.shape, dtype)
    _cast_into(out, where, value)
    return out


def _filled(
    leaf: Leaf, shape: tuple[int, ...], names: Iterable[str], state: Mapping[str, Tensor], dtype: Any
) -> np.ndarray:
    """The leaf, of `shape`, out of its tensors called `names`, of which one is in memory at a time."""
    dtype = np.result_type(*(state[name].dtype for name in names)) if dtype is None else np.dtype(dtype)
    out = _aligned(shape, dtype)
    width = shape[-1] // leaf.joined if leaf.joined > 1 else 0
    for k, name in enumerate(names):
        part = out[k // leaf.joined, ...] if leaf.layers else out
        if leaf.joined > 1:
            part = part[..., k % leaf.joined * width :][..., :width]
        _cast_into(part, name, leaf.transform.to_ours(state[name].read()))
    return out


def listed(names: Iterable[str]) -> str:
    """The first of `names`, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _match(
    table: tuple[Row, ...], shapes: Any, state: Mapping[str, Tensor]
) -> list[tuple[Leaf, tuple[int, ...], tuple[str, ...], tuple[tuple[str, ...], ...]]]:
    """(leaf, its shape, names in `state`, copies of them there), the largest leaf first; ValueError for what does not fit."""
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
        chosen.append((leaf, wanted.shape, names, copies))
    extra = [name for name in state if name not in used and not any(_pattern(k).match(name) for k in known)]
    found = {
        "missing": missing,
        "not of this network": extra,
        "of another shape": misshapen,
        f"not of {', '.join(FLOATS)}": foreign,
    }
    if faults := [f"{len(names)} {what}: {listed(names)}" for what, names in found.items() if names]:
        raise ValueError(f"of {len(used)} tensors that the network has: " + "; ".join(faults))
    return sorted(chosen, key=lambda item: -math.prod(item[1]))


def read(
    table: Iterable[Row],
    shapes: Any,
    state: Mapping[str, Tensor],
    *,
    dtype: Any = None,
    place: Callable[[str, np.ndarray], Any] = lambda path, value: jax.device_put(value),
) -> Any:
    """The tree of `shapes` (as jax.eval_shape gives it) filled from `state`.

    dtype casts on the way (None: as in the file); place(path, array) puts a leaf where it belongs, by default on jax's first
    device. In memory are what has been placed, the leaf that is being filled, and the tensor that goes into it, or two that are
    compared. Raises ValueError listing what is missing, left over, of another shape and of a dtype not in FLOATS, before
    anything is read; for copies that differ; and for a number that `dtype` cannot hold, such as 1e5 in float16.
    """
    params: dict = {}
    # The largest first: a leaf and its one tensor are two of it, and by the end there is room for small ones alone.
    for leaf, shape, names, copies in _match(tuple(table), shapes, state):
        for copy in copies:
            for name, first in zip(copy, names, strict=True):
                if not np.array_equal(state[name].read(), state[first].read()):
                    raise ValueError(f"{name} differs from {first}: expected copies of one tensor")
        *parents, last = leaf.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = place(leaf.path, _filled(leaf, shape, names, state, dtype))
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
