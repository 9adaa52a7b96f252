"""Files of weights: what a folder that `save_pretrained` wrote holds, tensor by tensor, and how such a folder is written.

    safetensors   n u64 | header: JSON of n bytes, {name: {dtype, shape, data_offsets: [begin, end]}} | data        (little-endian)
    index         JSON, {weight_map: {name: file}}: a network in several files (shards)

(github.com/huggingface/safetensors, 'Format'.) Tensors are read one by one with plain reads. The library maps the whole file
instead, and every page once touched counts as this process's memory: twice the weights by the end of a loading.
"""

import functools
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ldm_jax.weights import torch_pickle
from ldm_jax.weights.layout import Tensor, listed

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# How each library calls its file of weights; the last is transformers' name for a pickle.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
STEM = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# Taken where there is no plain file, in this order.
VARIANTS = ("fp16", "bf16")
# What the reference implementation takes for a header that nobody wrote in earnest.
LONGEST_HEADER = 100_000_000
# numpy has no more dimensions.
MOST_DIMENSIONS = 64
# What a file begins with that is no file of weights, however it is called.
FOREIGN = (
    (b"version https://git-lfs", "a pointer of Git LFS, expected the file that it stands for (git lfs pull)"),
    (b"<", "a page of HTML or XML, such as a server answers with in place of a file; fetch it again"),
    (b"\x1f\x8b", "compressed with gzip, expected the file itself; unpack it first (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd, expected the file itself; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz, expected the file itself; unpack it first"),
    (b"BZh", "compressed with bzip2, expected the file itself; unpack it first"),
    (b"7z\xbc\xaf", "an archive of 7-Zip, expected the file itself; unpack it first"),
    (b"Rar!", "an archive of RAR, expected the file itself; unpack it first"),
    (b"GGUF", "of the format GGUF, expected .safetensors or a file of torch.save"),
    (b"\x89HDF", "of the format HDF5, expected .safetensors or a file of torch.save"),
    (b"\x93NUMPY", "an array of numpy, expected .safetensors or a file of torch.save"),
)
# Wrappers of a whole network (torch's DistributedDataParallel, torch.compile), which put their name before each tensor's.
WRAPPERS = ("module.", "_orig_mod.")
# Eight bits hold less than float16 does, so that the cast changes no number. No network computes in them here.
EIGHT_BITS = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object. ValueError where the file is missing or not one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _read_at(path: pathlib.Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    length = math.prod(shape) * dtype.itemsize
    data = np.fromfile(path, np.uint8, length, offset=start)
    if data.size < length:
        raise ValueError(f"{path}: cut short: {data.size} of {length} bytes of a tensor are there")
    return data.view(dtype).reshape(shape)


def _entry(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's line of the header: dtype, shape, begin, end. ValueError, KeyError or TypeError for anything else."""
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str or type(shape) is not list or len(shape) > MOST_DIMENSIONS:
        raise TypeError("a tensor without a dtype, or a shape that is no list of numbers")
    if any(type(n) is not int or abs(n) >= 1 << 63 for n in (*shape, begin, end)):
        raise TypeError("a shape or an offset that is no whole number")
    return kind, tuple(shape), begin, end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, every key of which is written once."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:200]!r} is listed twice")
    return content


def _header(text: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name -> dtype, shape, begin, end. ValueError, KeyError, TypeError or AttributeError for what is no header."""
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    about = header.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in about.values()):
        raise TypeError("__metadata__ holds something other than texts")
    for name in header:
        name.encode()  # a name of half a character (a lone surrogate) is none
    return {name: _entry(entry) for name, entry in header.items()}


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors file.

    ValueError for one that is cut short, damaged, of an unknown dtype, or that the reference reader refuses: a tensor listed twice,
    tensors that overlap, bytes that belong to none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size or length > LONGEST_HEADER:
            raise ValueError(
                f"{path}: not a .safetensors file or cut short: a header of {length} bytes in a file of {size}"
            )
        try:
            entries = _header(file.read(length))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a .safetensors file: its header does not read ({error})") from None
    for name, (kind, shape, begin, end) in entries.items():
        if kind not in DTYPES:
            raise ValueError(f"{path}: {name} is of dtype {kind}, expected one of {', '.join(DTYPES)}")
        if min((0, *shape)) < 0 or begin < 0 or end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise ValueError(f"{path}: {name}, {kind} {list(shape)}, lies at bytes {begin} to {end}: damaged")
        if 8 + length + end > size:
            raise ValueError(f"{path}: cut short: {name} ends at byte {8 + length + end} of a file of {size}")
    reached, before = 0, "the header"
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            what = "overlap" if begin < reached else f"leave {begin - reached} bytes between them"
            raise ValueError(f"{path}: damaged: {before} and {name} {what}")
        reached, before = end, name
    if 8 + length + reached != size:
        raise ValueError(f"{path}: damaged: {size - 8 - length - reached} bytes at its end belong to no tensor")
    tensors = {}
    for name, (kind, shape, begin, _) in entries.items():
        read = functools.partial(_read_at, path, 8 + length + begin, shape, DTYPES[kind])
        tensors[name] = Tensor(shape, DTYPES[kind], read)
    return tensors


def _cast(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape, np.dtype(np.float16), lambda: tensor.read().astype(np.float16))


def _usable(path: pathlib.Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without a wrapper's, and 8-bit floating-point numbers as float16, which a line on stderr says."""
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    narrow = {name: tensor for name, tensor in tensors.items() if tensor.dtype in EIGHT_BITS}
    if narrow:
        kinds = " and ".join(sorted({tensor.dtype.name for tensor in narrow.values()}))
        print(f"note: {path}: {len(narrow)} tensors of {kinds} are cast to float16", file=sys.stderr)
    return tensors | {name: _cast(tensor) for name, tensor in narrow.items()}


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file, .safetensors or a pickle of torch's (which is not executed). Its content decides which, not its name.

    Raises ValueError for what is neither, saying what it is where that is plain: a pointer of Git LFS, a page of HTML, an archive.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path}: an empty file (0 bytes), cut short; fetch it again")
    for mark, what in FOREIGN:
        # The length of a header takes the first 8 bytes of a .safetensors: one of so many bytes there is not.
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(mark) and start[8:9] != b"{":
            raise ValueError(f"{path}: {what}")
    suffix = path.suffix.lower()
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER:
        return _usable(path, open_safetensors(path))
    if start.startswith((b"PK\x03\x04", b"\x80")) or suffix in PICKLES:
        return _usable(path, torch_pickle.open_tensors(path))
    if suffix == ".safetensors":
        return _usable(path, open_safetensors(path))
    raise ValueError(f"{path}: expected a file that ends in .safetensors or {', '.join(PICKLES)}")


def open_index(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors that an index names, each out of the shard that it names. ValueError for a shard or a tensor that is not there."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{path}: expected a weight_map that gives each tensor's file")
    # An index may not point out of its folder.
    there = {entry.name for entry in path.parent.iterdir()}
    shards: dict[str, dict[str, Tensor]] = {}
    for shard in sorted(set(where.values())):
        if shard not in there:
            raise ValueError(f"{path}: names the shard {shard!r}, which is not in {path.parent}")
        shards[shard] = open_file(path.parent / shard)
    for name, shard in where.items():
        if name not in shards[shard]:
            raise ValueError(f"{path.parent / shard}: lacks {name}, which {path.name} puts there")
    return {name: shards[shard][name] for name, shard in where.items()}


def _candidates(stem: str, suffix: str, variant: str | None) -> tuple[str, ...]:
    """How one file of weights, or the index of several, may be called."""
    if variant is None:
        return f"{stem}{suffix}", f"{stem}{suffix}.index.json"
    return f"{stem}.{variant}{suffix}", f"{stem}{suffix}.index.{variant}.json", f"{stem}.{variant}{suffix}.index.json"


def _found(folder: pathlib.Path, variant: str | None) -> pathlib.Path | None:
    for kind in (None, *VARIANTS) if variant is None else (variant,):
        for suffix in (".safetensors", ".bin"):
            for stem in STEMS:
                for name in _candidates(stem, suffix, kind):
                    if (folder / name).is_file():
                        return folder / name
    return None


def holds_weights(folder: pathlib.Path) -> bool:
    """Whether `find` finds something in `folder`."""
    return _found(folder, None) is not None


def find(folder: pathlib.Path, variant: str | None = None) -> pathlib.Path:
    """The file of weights in `folder`, or the index of its shards.

    The plain one before a variant of VARIANTS, .safetensors before .bin; with `variant` that one alone. ValueError listing the
    folder where there is none.
    """
    file = _found(folder, variant)
    if file is not None:
        return file
    there = listed(sorted(path.name for path in folder.iterdir()))
    kind = "" if variant is None else f" of variant {variant!r}"
    expected = " or ".join(f"{stem}{'' if variant is None else '.' + variant}.safetensors" for stem in STEMS[:2])
    raise ValueError(f"{folder}: no file of weights{kind}, expected {expected}; it holds {there or 'nothing'}")


def open_tensors(path: str | pathlib.Path, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a folder of `save_pretrained`, or of one file, by torch's names; each is read when asked for.

    Raises ValueError for a folder without weights, a shard that is missing, a file that is cut short or damaged, and a pickle
    that asks for code.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = find(path, variant)
    return open_index(path) if path.suffix.lower() == ".json" else open_file(path)


# --- writing ---------------------------------------------------------------------------------------------------------------


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """One .safetensors file, the tensors read and written one by one."""
    # The widest dtype first keeps every tensor aligned to its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype, _ = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name].read()).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def shards(tensors: Mapping[str, Tensor], largest: int) -> list[dict[str, Tensor]]:
    """`tensors` in order, cut where a file would exceed `largest` bytes (a single tensor may)."""
    parts: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if held + size > largest and parts[-1]:
            parts.append({})
            held = 0
        parts[-1][name] = tensor
        held += size
    return parts


def _write_weights(folder: pathlib.Path, stem: str, tensors: Mapping[str, Tensor], largest: int) -> None:
    parts = shards(tensors, largest)
    if len(parts) == 1:
        write_safetensors(folder / f"{stem}.safetensors", parts[0])
        return
    where = {}
    for k, part in enumerate(parts, 1):
        name = f"{stem}-{k:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / name, part)
        where |= dict.fromkeys(part, name)
    total = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_folder(
    folder: pathlib.Path, config: Mapping[str, Any], stem: str, tensors: Mapping[str, Tensor], largest: int
) -> None:
    """config.json and the weights, called `stem`, in files of at most `largest` bytes.

    Written beside the folder and then renamed, so an error leaves what was there before. A process killed at that moment, between
    two renames, leaves no `folder`: the old and the new one, both whole, lie beside it under hidden names, .NAME.xxxxxxxx; killed
    earlier, it leaves the old one and an unfinished hidden one. ValueError where `folder` holds anything but config.json and
    weights of that name: it would be lost.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder")
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_dir() or not (path.name == "config.json" or path.name.startswith((f"{stem}.", f"{stem}-"))):
            raise ValueError(f"{folder}: holds {path.name}; expected a folder that is new, empty or an earlier save")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # mkdtemp keeps others out; a folder of weights is as public as any other.
        new.chmod(0o755)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_weights(new, stem, tensors, largest)
        if folder.exists():
            old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            folder.replace(old)
            try:
                new.replace(folder)
            except BaseException:
                old.replace(folder)
                raise
            shutil.rmtree(old)
        else:
            new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
