"""Tensors out of torch's own files (.pth, .pt, .ckpt, .bin) without torch and without executing what is in them.

`torch.save` writes a pickle, and a pickle is a program: unpickling an untrusted one runs whatever it names. The reader
here resolves the handful of names that describe tensors (the rebuild calls, storage classes, dtypes, OrderedDict) to
inert stand-ins of its own; any other name ends the reading with a ValueError that says which. Both containers are read:
the zip archive of torch >= 1.6 and the stream of pickles and raw storages before it.
"""

import collections
import contextlib
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ldm_jax.weights.layout import Tensor

# torch/serialization.py: the first pickle of a file in the old container.
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


class _Dtype(NamedTuple):
    """A dtype, or the type of a storage; None is a storage of bare bytes."""

    dtype: np.dtype | None


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype | None
    start: int  # in bytes: an old file's storage may be a window of another
    length: int  # in bytes


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _integers(values: Any) -> tuple[int, ...]:
    if not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"sizes, strides and offsets must be integers >= 0, met {values!r}")
    return tuple(values)


def _names() -> dict[tuple[str, str], Any]:
    """The names that a file may mention. Made anew for each file, so that nothing a file does to them outlives it."""

    def tensor(storage, offset, size, stride, *_):
        return _Tensor(storage, storage.dtype, *_integers((offset,)), _integers(size), _integers(stride))

    def tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
        return tensor(storage, offset, size, stride)._replace(dtype=dtype.dtype)

    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch", "Size"): lambda size: tuple(size),
        ("torch", "device"): lambda *place: ":".join(map(str, place)),
        ("torch.storage", "UntypedStorage"): _Dtype(None),
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor_v3"): tensor_of_dtype,
        ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    }
    names |= {("torch", name): _Dtype(dtype) for name, dtype in DTYPES.items()}
    names |= {("torch", name): _Dtype(DTYPES[dtype]) for name, dtype in STORAGES.items()}
    return names


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO):
        # Protocol-2 pickles of Python 2 hold byte strings; latin1 maps each byte to one character.
        super().__init__(file, encoding="latin1")
        self.names = _names()
        self.itemsize: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise ValueError(
                f"the pickle asks for {module}.{name}, which is not part of a tensor and is not executed; "
                "save the state_dict alone, or as safetensors"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage":
            raise ValueError(f"the pickle refers to a {kind!r}, expected a storage: it holds code and not tensors")
        itemsize = 1 if dtype.dtype is None else dtype.dtype.itemsize
        start = 0
        if view and view[0] is not None:
            # The view's own key names nothing in the file: its elements are the root's.
            _, start, numel = view[0]
        start, numel = _integers((start, numel))
        self.itemsize[str(key)] = itemsize
        return _Storage(str(key), dtype.dtype, start * itemsize, numel * itemsize)


class _File(NamedTuple):
    """What the pickle describes, the bytes that each storage has, and how to read some of them: (key, start, length)."""

    content: Any
    size: Mapping[str, int]
    read: Callable[[str, int, int], bytes]


def _lazy(tensor: _Tensor, file: _File, path: pathlib.Path) -> Tensor:
    """`tensor` with its bounds checked: a stride past the end would read foreign memory."""
    storage, dtype = tensor.storage, tensor.dtype
    if not isinstance(storage, _Storage) or dtype is None or len(tensor.size) != len(tensor.stride):
        raise ValueError("a tensor without a storage, a dtype or as many strides as dimensions")
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
    if tensor.offset + count > elements:
        raise ValueError(
            f"a tensor of size {tensor.size} reaches element {tensor.offset + count - 1} of a storage of {elements}"
        )

    def read() -> np.ndarray:
        if not count:
            return np.empty(tensor.size, dtype)
        start = storage.start + tensor.offset * dtype.itemsize
        with _faults_of(path):
            flat = np.frombuffer(file.read(storage.key, start, count * dtype.itemsize), dtype)
        strides = [step * dtype.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(flat, tensor.size, strides, writeable=False)

    return Tensor(tensor.size, dtype, read)


def _read_zip(path: pathlib.Path) -> _File:
    # Left open for `read`: parsing the directory of a large archive again for every tensor would take a minute.
    archive = zipfile.ZipFile(path)
    members = {}
    for info in archive.infolist():
        # The folder on top is named after the file that was saved; torch never compresses, and a bomb would.
        members[info.filename.partition("/")[2]] = info
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"member {info.filename} is compressed, expected stored members as torch.save writes them")
    if "data.pkl" not in members:
        raise ValueError("a zip archive without data.pkl: not a file of torch.save")
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise ValueError("written on a big-endian machine; only little-endian files are read")
    storages = {name.removeprefix("data/"): info for name, info in members.items() if name.startswith("data/")}

    def read(key: str, start: int, length: int) -> bytes:
        with archive.open(storages[key]) as member:
            # A member that is read from its first byte to its last has its checksum verified.
            if start:
                member.seek(start)
            return member.read(length)

    content = _Unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
    return _File(content, {key: info.file_size for key, info in storages.items()}, read)


def _read_legacy(path: pathlib.Path) -> _File:
    """Five pickles (magic, protocol, machine, object, storage keys), then per storage its length and its elements."""
    begins, sizes, total = {}, {}, path.stat().st_size
    with path.open("rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC:
            raise ValueError("neither a zip archive nor torch's older container")
        _Unpickler(file).load()
        machine = _Unpickler(file).load()
        if not machine.get("little_endian", True):
            raise ValueError("written on a big-endian machine; only little-endian files are read")
        unpickler = _Unpickler(file)
        content = unpickler.load()
        for key in map(str, _Unpickler(file).load()):
            length = int.from_bytes(file.read(8), "little") * unpickler.itemsize[key]
            begins[key], sizes[key] = file.tell(), length
            if begins[key] + length > total:
                raise ValueError(f"storage {key} ends at byte {begins[key] + length} of {total}: the file is cut short")
            file.seek(length, io.SEEK_CUR)

    def read(key: str, start: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(begins[key] + start)
            return file.read(length)

    return _File(content, sizes, read)


def _tensors(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def _choose(content: Any, key: str | None) -> dict[str, _Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__.lstrip('_')}, expected a dict of tensors")
    if key is not None:
        if not _tensors(content.get(key)):
            raise ValueError(f"no dict of tensors under {key!r}; the file has {sorted(map(str, content))}")
        return _tensors(content[key])
    if isinstance(content.get("state_dict"), Mapping):
        return _tensors(content["state_dict"])
    if _tensors(content):
        return _tensors(content)
    nested = [name for name, value in content.items() if _tensors(value)]
    if len(nested) != 1:
        raise ValueError(
            f"expected one dict of tensors, found {nested} among the keys {sorted(map(str, content))[:20]}"
        )
    return _tensors(content[nested[0]])


@contextlib.contextmanager
def _faults_of(path: pathlib.Path) -> Iterator[None]:
    """Every failure as a ValueError that begins with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        # A damaged pickle or archive can fail anywhere in the standard library, with nearly any exception.
        raise ValueError(f"{path}: damaged or not a file of torch.save ({type(error).__name__}: {error})") from error


def open_tensors(path: str | pathlib.Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save` by name, in the file's order, each read from disk when asked for.

    What is returned is the dict under `key`; with no key the one under 'state_dict' if there is one (Lightning's and
    CompVis's .ckpt), else the top dict's own tensors, else its only dict of tensors. Entries that are not tensors (step
    counters, options) are dropped. Arrays are read-only and of the file's dtype, bfloat16 and float8 as ml_dtypes.

    Raises FileNotFoundError, and ValueError for a pickle that asks for any code (naming it), a truncated or damaged
    file, a tensor outside its storage, or a file in which no dict of tensors, or more than one, is found.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with _faults_of(path):
        with path.open("rb") as start:
            new = start.read(4) == b"PK\x03\x04"
        file = (_read_zip if new else _read_legacy)(path)
        tensors = {name: _lazy(tensor, file, path) for name, tensor in _choose(file.content, key).items()}
        if not tensors:
            raise ValueError("no tensors by name in it")
    return tensors


def load(path: str | pathlib.Path, key: str | None = None) -> dict[str, np.ndarray]:
    """`open_tensors`, read: read-only arrays by name. Raises what open_tensors raises."""
    return {name: tensor.read() for name, tensor in open_tensors(path, key).items()}
