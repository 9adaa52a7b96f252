"""Files of weights: reads the tensors of a folder that `save_pretrained` wrote, one by one, and writes such a folder.

    safetensors   n u64 | header: JSON of n bytes, {name: {dtype, shape, data_offsets: [begin, end]}} | data        (little-endian)
    index         JSON, {weight_map: {name: file}}: for a network in several files (shards)

(github.com/huggingface/safetensors, 'Format'.) Tensors are read with plain reads. The safetensors library maps the whole file into
memory instead. Each page that was read then counts as memory of the process, which is twice the weights at the end of a loading.
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
# The names of files of weights in each library; the last is transformers' name of a pickle.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
STEM = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# Where there is no plain file, the first of these variants is read.
VARIANTS = ("fp16", "bf16")
# The reference implementation refuses a longer header.
LONGEST_HEADER = 100_000_000
# An array of numpy has at most so many dimensions.
MOST_DIMENSIONS = 64
# The first bytes of files that are no files of weights, whatever their name is, and what to say of them.
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
# Wrappers of a whole network (torch's DistributedDataParallel, torch.compile) put these prefixes before the name of each tensor.
WRAPPERS = ("module.", "_orig_mod.")
# No network computes in 8 bits here. float16 holds all of these numbers, so a cast to it changes none.
EIGHT_BITS = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError where the file is missing or holds something else."""
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
    """The entry of a tensor in the header: dtype, shape, begin, end. ValueError, KeyError or TypeError for anything else."""
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str or type(shape) is not list or len(shape) > MOST_DIMENSIONS:
        raise TypeError("a tensor without a dtype, or a shape that is no list of numbers")
    if any(type(n) is not int or abs(n) >= 1 << 63 for n in (*shape, begin, end)):
        raise TypeError("a shape or an offset that is no whole number")
    return kind, tuple(shape), begin, end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:200]!r} is listed twice")
    return content


def _header(text: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name -> (dtype, shape, begin, end). ValueError, KeyError, TypeError or AttributeError where `text` is not a header."""
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    about = header.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in about.values()):
        raise TypeError("__metadata__ holds something other than texts")
    for name in header:
        name.encode()  # raises for half a character (a lone surrogate)
    return {name: _entry(entry) for name, entry in header.items()}


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors file.

    Raises ValueError for a file that is cut short or damaged, for an unknown dtype, and for what the reference reader refuses too: a
    tensor that is listed twice, tensors that overlap, bytes that belong to no tensor.
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
    """Names without the prefix of a wrapper, and 8-bit floating-point numbers as float16; a line on stderr says so."""
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    narrow = {name: tensor for name, tensor in tensors.items() if tensor.dtype in EIGHT_BITS}
    if narrow:
        kinds = " and ".join(sorted({tensor.dtype.name for tensor in narrow.values()}))
        print(f"note: {path}: {len(narrow)} tensors of {kinds} are cast to float16", file=sys.stderr)
    return tensors | {name: _cast(tensor) for name, tensor in narrow.items()}


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file: .safetensors, or a pickle of torch, which is not executed. The content decides which, not the name.

    Raises ValueError for any other file. The message says what the file is where that can be seen: a pointer of Git LFS, a page of
    HTML, an archive.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path}: an empty file (0 bytes), cut short; fetch it again")
    for mark, what in FOREIGN:
        # The first 8 bytes of a .safetensors are the length of its header, and no header is as long as these marks would say.
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
    """The tensors that an index lists, each from its shard. ValueError for a shard or a tensor that is missing."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{path}: expected a weight_map that gives each tensor's file")
    # An index must not name a file outside of its folder.
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
    """The possible names of one file of weights, and of the index of several."""
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
    """Whether `folder` holds a file of weights."""
    return _found(folder, None) is not None


def find(folder: pathlib.Path, variant: str | None = None) -> pathlib.Path:
    """The file of weights in `folder`, or the index of its shards.

    The plain file is preferred to the variants in VARIANTS, and .safetensors to .bin. With `variant` only that variant is considered.
    Raises ValueError, listing the files of the folder, where there is none.
    """
    file = _found(folder, variant)
    if file is not None:
        return file
    there = listed(sorted(path.name for path in folder.iterdir()))
    kind = "" if variant is None else f" of variant {variant!r}"
    expected = " or ".join(f"{stem}{'' if variant is None else '.' + variant}.safetensors" for stem in STEMS[:2])
    raise ValueError(f"{folder}: no file of weights{kind}, expected {expected}; it holds {there or 'nothing'}")


def open_tensors(path: str | pathlib.Path, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a folder of `save_pretrained`, or of one file, by torch's names. A tensor is read when its `read` is called.

    Raises ValueError for a folder without weights, a shard that is missing, a file that is cut short or damaged, and a pickle that
    calls code.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = find(path, variant)
    return open_index(path) if path.suffix.lower() == ".json" else open_file(path)


# --- writing ---------------------------------------------------------------------------------------------------------------


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one .safetensors file. Tensors are read and written one by one."""
    # With the widest dtype first, each tensor begins at a multiple of the size of its numbers.
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
    """`tensors` in order, divided into files of at most `largest` bytes; only a single tensor may be larger."""
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
    """Write config.json and the weights, named `stem`, in files of at most `largest` bytes each.

    The files are written into a hidden folder beside `folder`, which is then renamed, so that an error leaves the earlier save as it
    was. If the process is killed between the two renames, `folder` is missing, and the old and the new one, both complete, lie beside
    it under the hidden names .NAME.xxxxxxxx. If it is killed earlier, the old folder and an incomplete hidden one remain. Raises
    ValueError where `folder` holds anything but config.json and weights of that name, which would be lost.
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
        # mkdtemp makes a folder that only its owner can read; a folder of weights has the usual permissions.
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
