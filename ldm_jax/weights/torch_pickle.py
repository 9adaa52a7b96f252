"""Reads the tensors of files of torch.save (.pth, .pt, .ckpt, .bin) without torch, and without executing what the files contain.

`torch.save` writes a pickle, which is a program: to unpickle an untrusted file runs whatever the file names. Here the pickle is read as
data (inert_pickle.py). The few calls that describe tensors are understood. Everything else that a training program wrote (callbacks,
options, numpy numbers, optimizers) is replaced by an object that does nothing. Both containers are read: the zip archive of torch >=
1.6, and the earlier stream of pickles and raw storages.
"""

import contextlib
import functools
import io
import math
import pathlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ldm_jax.weights import inert_pickle
from ldm_jax.weights.inert_pickle import Inert, Name
from ldm_jax.weights.layout import Tensor, listed

# The first pickle of a file in the old container (torch/serialization.py).
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


# The names that training programs give their dict of tensors. Averages of the weights are preferred to the weights.
AVERAGES = ("model_ema", "ema", "params_ema", "ema_state_dict")
NESTED = ("state_dict", *AVERAGES, "model", "module", "params", "model_state_dict")
# How deep dicts may be nested: {'state_dict': {'state_dict': ...}}.
DEEPEST = 4
# An array of numpy has at most so many dimensions.
MOST_DIMENSIONS = 64
# An expanded tensor repeats the elements of its storage. Up to so many elements it may be larger than the storage.
MOST_REPEATED = 1 << 24


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype | None
    start: int  # in bytes: in an old file a storage may be a part of another
    length: int  # in bytes


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: np.dtype | None
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _integers(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or len(values) > MOST_DIMENSIONS:
        raise ValueError(f"sizes and strides must be tuples of at most {MOST_DIMENSIONS} numbers")
    if not all(type(v) is int and 0 <= v < 1 << 63 for v in values):
        kinds = ", ".join(str(v) if type(v) is int and abs(v) < 1 << 64 else type(v).__name__ for v in values)
        raise ValueError(f"sizes, strides and offsets must be integers >= 0, met {kinds}")
    return tuple(values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor is made of a {type(storage).__name__.lstrip('_')}, expected a storage")
    return _Tensor(storage, storage.dtype, *_integers((offset,)), _integers(size), _integers(stride))


def _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> _Tensor:
    if not (isinstance(dtype, Name) and dtype.module == "torch" and dtype.name in DTYPES):
        raise ValueError(f"a tensor is of dtype {dtype if isinstance(dtype, Name) else type(dtype).__name__}")
    return _tensor(storage, offset, size, stride)._replace(dtype=DTYPES[dtype.name])


def _of_type(rebuild: Any, kind: Any, arguments: Any, *state: Any) -> Any:
    """The tensor in an object of a subclass of torch.Tensor, or in a tensor with further attributes."""
    if not isinstance(rebuild, Name) or str(rebuild) not in CALLS or type(arguments) is not tuple:
        return Inert(str(rebuild) if isinstance(rebuild, Name) else type(rebuild).__name__)
    return CALLS[str(rebuild)](*arguments)


def _ordered(pairs: Any = (), *_: Any) -> dict[str, Any]:
    """An OrderedDict: it is empty and filled later, or (in Python 2) made of its pairs."""
    pairs = pairs if type(pairs) in (list, tuple) else ()
    whole = [pair for pair in pairs if type(pair) in (list, tuple) and len(pair) == 2]
    return {key: value for key, value in whole if type(key) is str}


# Name of a function -> the function that is called in its place.
CALLS: dict[str, Callable] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": lambda size=(): size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data=None, *_: data,
    "torch.nn.parameter.Buffer": lambda data=None, *_: data,
    "torch.device": lambda *_: Inert("torch.device"),
}
# These make objects of subclasses: their first argument is the function above that makes the tensor.
CALLS["torch._tensor._rebuild_from_type_v2"] = CALLS["torch._tensor._rebuild_from_type"] = _of_type


def _key(key: Any) -> str:
    if type(key) not in (str, int) or len(str(key)) > 1000:
        raise ValueError("a storage is called by something other than text or a number")
    return str(key)


def _storage(sizes: dict[str, int], pid: Any) -> _Storage | Name:
    """The storage that a persistent id describes. The number of bytes of one element is written into `sizes`."""
    if type(pid) is tuple and len(pid) == 4 and type(pid[0]) is str and pid[0] == "module" and isinstance(pid[1], Name):
        return pid[1]  # the older container holds the source code of a module's class beside its name
    if type(pid) is not tuple or len(pid) not in (5, 6):
        raise ValueError("the pickle refers to something other than a storage")
    kind, dtype, key, _, numel, *view = pid
    if kind != "storage":
        text = repr(kind) if type(kind) is str else type(kind).__name__
        raise ValueError(f"the pickle refers to a {text}, expected a storage: it holds code and not tensors")
    untyped = isinstance(dtype, Name) and str(dtype) in ("torch.storage.UntypedStorage", "torch.UntypedStorage")
    if not untyped and not (isinstance(dtype, Name) and dtype.module == "torch" and dtype.name in STORAGES):
        raise ValueError(f"a storage is of type {dtype if isinstance(dtype, Name) else type(dtype).__name__}")
    dtype = None if untyped else DTYPES[STORAGES[dtype.name]]
    itemsize, start = 1 if dtype is None else dtype.itemsize, 0
    if view and view[0] is not None:
        # The key of a view is not a storage of the file: its elements are those of the root storage.
        if type(view[0]) is not tuple or len(view[0]) != 3:
            raise ValueError("a view of a storage that is not three numbers")
        _, start, numel = view[0]
    start, numel = _integers((start, numel))
    sizes[_key(key)] = itemsize
    return _Storage(_key(key), dtype, start * itemsize, numel * itemsize)


def _unpickled(file: Any, sizes: dict[str, int]) -> Any:
    return inert_pickle.load(file, CALLS, functools.partial(_storage, sizes))


class _File(NamedTuple):
    """The content of the pickle, the number of bytes of each storage, and `read(key, start, length)`, which reads some of them."""

    content: Any
    size: Mapping[str, int]
    read: Callable[[str, int, int], bytes]


def _lazy(tensor: _Tensor, file: _File, path: pathlib.Path) -> Tensor:
    """The Tensor of `tensor`, after a check that it lies within its storage: otherwise a stride would read foreign memory."""
    storage, dtype = tensor.storage, tensor.dtype
    if dtype is None or len(tensor.size) != len(tensor.stride):
        raise ValueError("a tensor without a dtype or as many strides as dimensions")
    if storage.key not in file.size:
        raise ValueError(f"storage {storage.key} is missing")
    if storage.start + storage.length > file.size[storage.key]:
        raise ValueError(
            f"storage {storage.key} has {file.size[storage.key]} bytes, expected {storage.start + storage.length}: "
            "the file is cut short"
        )
    count = 0
    if math.prod(tensor.size):
        count = 1 + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride))
    elements = storage.length // dtype.itemsize
    if math.prod(tensor.size) > max(elements, MOST_REPEATED):
        raise ValueError(f"a tensor of size {tensor.size} repeats a storage of {elements} elements: no weights do")
    if tensor.offset + count > elements:
        raise ValueError(
            f"a tensor of size {tensor.size} reaches element {tensor.offset + count - 1} of a storage of {elements}"
        )

    def read() -> np.ndarray:
        start = storage.start + tensor.offset * dtype.itemsize
        with _faults_of(path):
            if not count:
                return np.empty(tensor.size, dtype)
            data = file.read(storage.key, start, count * dtype.itemsize)
            # numpy's as_strided does not accept ml_dtypes' float8_e5m2.
            return np.ndarray(tensor.size, dtype, data, 0, [step * dtype.itemsize for step in tensor.stride])

    return Tensor(tensor.size, dtype, read)


def _read_zip(path: pathlib.Path) -> _File:
    total = path.stat().st_size
    # The archive stays open for `read`: to parse the directory of a large archive for each tensor takes a minute.
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ValueError(
            f"an archive of torch.save that is cut short or damaged: of the {total} bytes that are here none is its directory, "
            "which stands at the end; fetch it again"
        ) from None
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.is_dir():
            continue
        # All members are in one folder, which has the name of the file that was saved.
        name = info.filename.partition("/")[2]
        # torch does not compress; an archive that expands to fill the memory would.
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"member {info.filename} is compressed, expected stored members as torch.save writes them")
        if name in members:
            raise ValueError(f"an archive with two members {name!r}: not as torch.save writes them")
        members[name] = info
    if "data.pkl" not in members:
        raise ValueError("a zip archive without data.pkl: not a file of torch.save")
    if "constants.pkl" in members:
        raise ValueError("an archive of TorchScript, which is a program; expected a state_dict, saved alone")
    if sum(info.file_size for info in members.values()) > total:
        raise ValueError(f"an archive whose members, together, are longer than its {total} bytes: they overlap")
    if members["data.pkl"].file_size > inert_pickle.LONGEST:
        raise ValueError(f"a pickle of {members['data.pkl'].file_size} bytes, at most {inert_pickle.LONGEST} are read")
    if "byteorder" in members and (
        members["byteorder"].file_size != 6 or archive.read(members["byteorder"]) != b"little"
    ):
        raise ValueError("written on a big-endian machine; only little-endian files are read")
    storages = {name.removeprefix("data/"): info for name, info in members.items() if name.startswith("data/")}

    def read(key: str, start: int, length: int) -> bytes:
        with archive.open(storages[key]) as member:
            # The checksum of a member is verified when it is read from the first byte to the last.
            if start:
                member.seek(start)
            return member.read(length)

    content = _unpickled(io.BytesIO(archive.read(members["data.pkl"])), {})
    return _File(content, {key: info.file_size for key, info in storages.items()}, read)


def _read_legacy(path: pathlib.Path) -> _File:
    """Reads five pickles (magic number, protocol, machine, object, keys of storages), then the length and elements of each storage."""
    begins, sizes, total, itemsizes = {}, {}, path.stat().st_size, {}
    with path.open("rb") as file:
        if _unpickled(file, {}) != LEGACY_MAGIC:
            raise ValueError("neither a zip archive nor torch's older container")
        _unpickled(file, {})
        machine = _unpickled(file, {})
        if type(machine) is not dict or machine.get("little_endian", True) is not True:
            raise ValueError("written on a big-endian machine; only little-endian files are read")
        content = _unpickled(file, itemsizes)
        keys = _unpickled(file, {})
        if type(keys) is not list:
            raise ValueError(f"the storages are listed in a {type(keys).__name__}, expected a list")
        for key in map(_key, keys):
            if key not in itemsizes or key in begins:
                raise ValueError(f"storage {key} is listed twice, or belongs to no tensor")
            length = int.from_bytes(file.read(8), "little") * itemsizes[key]
            begins[key], sizes[key] = file.tell(), length
            if begins[key] + length > total:
                raise ValueError(f"storage {key} ends at byte {begins[key] + length} of {total}: the file is cut short")
            file.seek(length, io.SEEK_CUR)

    def read(key: str, start: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(begins[key] + start)
            return file.read(length)

    return _File(content, sizes, read)


def _entries(content: Any) -> dict[str, Any]:
    """The items of a dict, or of an object that was one (Lightning's AttributeDict)."""
    return content.items if isinstance(content, Inert) else content if type(content) is dict else {}


def _tensors(content: Any) -> dict[str, _Tensor]:
    return {name: value for name, value in _entries(content).items() if isinstance(value, _Tensor)}


def _within(content: Any) -> dict[str, _Tensor]:
    """The tensors of a dict, or of the state_dict within it, which may be nested several times."""
    for _ in range(DEEPEST):
        if tensors := _tensors(content):
            return tensors
        content = _entries(content).get("state_dict")
    return {}


def _kind(content: Any) -> str:
    """A message that says what the file holds instead of tensors."""
    if isinstance(content, (Name, Inert)):
        name = str(content) if isinstance(content, Name) else content.maker
        return f"the pickle asks for {name}, expected a dict of tensors, such as model.state_dict()"
    return f"holds a {type(content).__name__.lstrip('_')}, expected a dict of tensors"


def _choose(content: Any, key: str | None, path: pathlib.Path) -> dict[str, _Tensor]:
    entries = _entries(content)
    if not entries:
        raise ValueError(_kind(content) if type(content) is not dict else "no tensors by name in it")
    if key is not None:
        if not _within(entries.get(key)):
            raise ValueError(f"no dict of tensors under {key!r}; the file has {listed(sorted(entries))}")
        return _within(entries[key])
    top = _tensors(entries)
    nested = {name: tensors for name, value in entries.items() if (tensors := _within(value))}
    # Beside the weights there may be other tensors: a loss, or the few options of an average in a dict.
    most = max(map(len, nested.values()), default=0)
    nested = {name: tensors for name, tensors in nested.items() if 2 * len(tensors) >= most}
    usual = [name for name in NESTED if name in nested]
    if top and (not usual or len(top) >= most):
        return top
    if len(nested) == 1 or "state_dict" in usual:
        return nested[usual[0] if usual else next(iter(nested))]
    if usual and len(usual) == len(nested):
        left = ", ".join(name for name in nested if name != usual[0])
        print(f"note: {path}: of its dicts of tensors {usual[0]!r} is read, {left} left aside", file=sys.stderr)
        return nested[usual[0]]
    modules = [v.maker for v in entries.values() if isinstance(v, Inert) and v.maker.startswith("torch.nn.")]
    if not nested and modules:
        raise ValueError(f"the pickle asks for {modules[0]}, expected a dict of tensors, such as model.state_dict()")
    raise ValueError(f"expected one dict of tensors, found {list(nested)[:20]} among the keys {sorted(entries)[:20]}")


@contextlib.contextmanager
def _faults_of(path: pathlib.Path) -> Iterator[None]:
    """Turn every failure into a ValueError that begins with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        # With a damaged pickle or archive, the standard library may raise nearly any exception.
        raise ValueError(f"{path}: damaged or not a file of torch.save ({type(error).__name__}: {error})") from error


def open_tensors(path: str | pathlib.Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save` by name, in the order of the file. A tensor is read from disk when its `read` is called.

    With `key` these are the tensors of the dict under that key. Otherwise they are those under 'state_dict' (in .ckpt files of
    Lightning and CompVis) or under another name in NESTED, an average of the weights first; a line on stderr says so where there are
    several. If there is no such name, they are the tensors at the top, else the only dict of tensors. Anything else (step counters,
    options, callbacks) is dropped. Arrays are read-only and have the dtype of the file; bfloat16 and float8 are those of ml_dtypes.

    Raises FileNotFoundError. Raises ValueError for a pickle that calls a function of Python or torch (naming it) or that is too large,
    for a file that is cut short or damaged, for a tensor outside of its storage, for a file of a whole module, and for a file with no
    dict of tensors or with several.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with _faults_of(path):
        with path.open("rb") as start:
            new = start.read(4) == b"PK\x03\x04"
        file = (_read_zip if new else _read_legacy)(path)
        tensors = {name: _lazy(tensor, file, path) for name, tensor in _choose(file.content, key, path).items()}
        if not tensors:
            raise ValueError("no tensors by name in it")
    return tensors


def load(path: str | pathlib.Path, key: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of `open_tensors` as read-only arrays by name. Raises as open_tensors does."""
    return {name: tensor.read() for name, tensor in open_tensors(path, key).items()}
