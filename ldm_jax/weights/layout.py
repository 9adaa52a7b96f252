"""Tables of names: for each network, one table maps the names and shapes of torch's tensors to the leaves of our tree, and back.

    Row("down_blocks_{i}/resnets_{j}/conv1", "down_blocks.{i}.resnets.{j}.conv1", CONV2D)

A row has the name of one module on both sides; {i}, {j}, ... stand for numbers. The kind of the row (kinds.py) says which tensors the
module has, and how they differ on both sides. A row may have several names of theirs: these tensors lie side by side along the last
axis of ours (q, k and v in one kernel). {*} stands in theirs only: it numbers the entries of a leading layer axis of ours
(`scan_layers`). A row without a name of ours is for tensors that a file may hold and that no network needs. The same rows serve
reading and writing.
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

    ours     path of a module (of a leaf for ARRAY), keys joined by '/'; None: see the module docstring
    theirs   torch's name of it without '.weight' and '.bias'; a tuple of names: tensors that are joined along the last axis
    kind     which tensors the module has, and how they differ on both sides
    copies   further names of theirs that hold the same numbers; all of them are written
    old      older spellings of theirs, which are read and never written; only where theirs is one name
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
    """A leaf of our tree, and the names of the torch tensors that it is made of, of their copies and of their old spellings.

    Names are ordered layer by layer.
    """

    path: str
    transform: Transform
    names: tuple[str, ...]
    copies: tuple[tuple[str, ...], ...]
    old: tuple[tuple[str, ...], ...]
    layers: int

    @property
    def joined(self) -> int:
        """How many tensors lie side by side along the last axis."""
        return len(self.names) // max(self.layers, 1)


def tensors(state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays in memory as Tensors."""
    return {name: Tensor(value.shape, value.dtype, lambda value=value: value) for name, value in state.items()}


def under(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """`rows` one level down: both prefixes are put before each name. A prefix of '' adds nothing."""

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
    """A path with {i} in it -> the regular expression that matches it and captures the numbers."""
    parts = re.split(r"\{(\w+)\}", path)
    return re.compile("".join(re.escape(p) if k % 2 == 0 else rf"(?P<{p}>\d+)" for k, p in enumerate(parts)) + "$")


def _spell(names: tuple[str, ...], numbers: Mapping[str, str], layers: int, part: str) -> tuple[str, ...]:
    """The names of a row with all numbers filled in, layer by layer."""
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
    """The shape that each of the tensors leaf.names must have where our leaf has `shape`."""
    shape = shape[1:] if leaf.layers else shape
    if leaf.joined > 1:
        shape = (*shape[:-1], shape[-1] // leaf.joined)
    # broadcast_to makes an array of this shape that takes no memory.
    return leaf.transform.to_torch(np.broadcast_to(np.int8(0), shape)).shape


def _fits(leaf: Leaf, expected: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if leaf.transform.flat:
        return shape[:2] == expected[:2] and all(n == 1 for n in shape[2:])
    return shape == expected


def _to_theirs(leaf: Leaf, value: np.ndarray, k: int) -> np.ndarray:
    """The tensor of the name leaf.names[k], contiguous."""
    if leaf.layers:
        value = value[k // leaf.joined]
    if leaf.joined > 1:
        value = np.split(value, leaf.joined, -1)[k % leaf.joined]
    return np.asarray(leaf.transform.to_torch(value), order="C")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that jax may take over: XLA's CPU backend does not copy an array whose memory begins at a multiple of 64 bytes."""
    bytes_ = math.prod(shape) * dtype.itemsize
    buffer = np.empty(bytes_ + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + bytes_].view(dtype).reshape(shape)


def _cast_into(out: np.ndarray, where: str, value: np.ndarray) -> None:
    """Write `narrowed` into `out`; `where` names the tensor in an error."""
    with np.errstate(over="ignore"):
        np.copyto(out, value, casting="unsafe")
    # Compare the ranges and not the sizes: bfloat16 is as wide as float16, and has the range of float32.
    if ml_dtypes.finfo(out.dtype).max >= ml_dtypes.finfo(value.dtype).max or np.isfinite(out).all():
        return
    lost = np.isfinite(value) & ~np.isfinite(out)
    if lost.any():
        advice = "; take bfloat16" if out.dtype == np.float16 else ""
        raise ValueError(f"{where}: {np.abs(value[lost]).max():g} is out of the range of {out.dtype.name}{advice}")


def narrowed(where: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`value` in `dtype`. ValueError where a finite number becomes infinite: float16 ends at 65504."""
    out = np.empty(value.shape, dtype)
    _cast_into(out, where, value)
    return out


def _filled(
    leaf: Leaf, shape: tuple[int, ...], names: Iterable[str], state: Mapping[str, Tensor], dtype: Any
) -> np.ndarray:
    """The leaf, of `shape`, made of the tensors `names`. One of them is in memory at a time."""
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
    """The first of `names` as text, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _match(
    table: tuple[Row, ...], shapes: Any, state: Mapping[str, Tensor]
) -> list[tuple[Leaf, tuple[int, ...], tuple[str, ...], tuple[tuple[str, ...], ...]]]:
    """(leaf, its shape, its names in `state`, the names of copies) for each leaf, the largest first; ValueError where something does
    not fit."""
    ignored = {row.theirs for row in table if row.ours is None}
    missing, misshapen, foreign, used, chosen = [], [], [], set(), []
    for leaf, expected in leaves(table, shapes):
        spellings = [names for names in (leaf.names, *leaf.old) if all(name in state for name in names)]
        # Early DDPM files hold a tensor twice, under its old and its new name.
        names, *others = spellings or [leaf.names]
        copies = (*leaf.copies, *others)
        theirs = _their_shape(leaf, expected.shape)
        for name in (name for group in (names, *copies) for name in group):
            used.add(name)
            if name not in state:
                missing.append(name)
            elif not _fits(leaf, theirs, state[name].shape):
                misshapen.append(f"{name} {list(state[name].shape)} (expected {list(theirs)})")
            elif state[name].dtype.name not in FLOATS:
                foreign.append(f"{name} {state[name].dtype.name}")
        chosen.append((leaf, expected.shape, names, copies))
    extra = [name for name in state if name not in used and not any(_pattern(k).match(name) for k in ignored)]
    problems = {
        "missing": missing,
        "not of this network": extra,
        "of another shape": misshapen,
        f"not of {', '.join(FLOATS)}": foreign,
    }
    if faults := [f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names]:
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
    """The tree of `shapes` (as jax.eval_shape gives it), filled from `state`.

    dtype is that of the leaves (None: as in the file). place(path, array) puts a leaf where it belongs, by default on jax's first
    device. The memory holds the leaves that have been placed, the leaf that is being filled, and the tensor that goes into it, or two
    tensors that are compared. Raises ValueError, before anything is read, listing tensors that are missing, that belong to no leaf,
    that have another shape, and whose dtype is not in FLOATS; then for copies that differ, and for a number that `dtype` cannot hold,
    such as 1e5 in float16.
    """
    params: dict = {}
    # The largest first: while a leaf is filled, the memory holds it and its tensor. At the end there may be room for small ones only.
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
    """The inverse of `read`: all tensors by torch's names, in the dtypes of the parameters. Each is made when it is read."""
    state: dict[str, Tensor] = {}
    for leaf, value in leaves(tuple(table), params):
        shape, dtype = _their_shape(leaf, value.shape), np.dtype(value.dtype)
        for group in (leaf.names, *leaf.copies):
            for k, name in enumerate(group):
                make = functools.partial(_to_theirs, leaf, k=k)
                state[name] = Tensor(shape, dtype, lambda make=make, value=value: make(np.asarray(value)))
    return state


def write(table: Iterable[Row], params: Any) -> dict[str, np.ndarray]:
    """As `written`, with all tensors read."""
    return {name: tensor.read() for name, tensor in written(table, params).items()}
