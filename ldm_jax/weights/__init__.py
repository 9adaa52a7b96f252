"""Checkpoints of other libraries <-> our modules and trees of parameters.

    module, params = load("stable-diffusion-v1-5", "unet")        save("my-unet", module, params)

Each published class of network is one Format (format.py), with a table of names made of Rows (layout.py). files.py reads and writes
folders and files.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ldm_jax import startup
from ldm_jax.kernels.dense import compute_dtype
from ldm_jax.weights import autoencoder_kl, autoencoder_tiny, clip, dinov2, dit, files, hub, layout, unet, vq
from ldm_jax.weights.format import Format, flat

# The classes of published networks that are read and written, one line each. The name is `_class_name` of a config.json of diffusers,
# the first of `architectures` in one of transformers.
FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        autoencoder_kl.KL,
        autoencoder_tiny.TINY,
        clip.FULL,
        clip.TEXT,
        clip.TEXT_PROJECTION,
        clip.VISION,
        clip.VISION_PROJECTION,
        dit.DIT,
        dinov2.PLAIN,
        dinov2.REGISTERS,
        dit.PIXART,
        dit.EARLY,
        unet.CONDITIONED,
        unet.UNCONDITIONED,
        vq.VQ,
    )
}
Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
Place = Callable[[str, np.ndarray], Any]
# The versions whose form of files is written. Both libraries also read files of older versions.
VERSION = {"diffusers": "0.42.1", "transformers": "5.23.0"}
# Keys of a config.json that name its class, beside those that begin with '_'. They follow from the module, so they are not facts.
IDENTITY = ("architectures", "model_type")


def class_of(module: nn.Module) -> str:
    """The name of the published class that computes what `module` computes. ValueError where no class in FORMATS has such a module."""
    forms = [form for form in FORMATS.values() if form.network is type(module)]
    if not forms:
        types = dict.fromkeys(form.network.__name__ for form in FORMATS.values())
        raise ValueError(f"{type(module).__name__}: expected a module of type {', '.join(types)}")
    return next(form.name for form in forms if form.written(module))


def _check_places(shardings: Shardings | None, place: Place | None) -> None:
    if shardings is not None and place is not None:
        raise ValueError("shardings and place are both given, expected one of them to say where a leaf goes")


# Fields of our modules that are a number of blocks; for a module with levels, of blocks in each level.
DEPTHS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers", "depth")


def _check_depth(name: str, module: nn.Module, count: int) -> None:
    """Raise ValueError for a network of more blocks than the file has tensors (`count`): to trace ten thousand takes minutes."""
    blocks = len(getattr(module, "block_out_channels", None) or (0,))
    said = {field: getattr(module, field) for field in DEPTHS if getattr(module, field, None)}
    for value in said.values():
        blocks *= max(1, *(n for n in flat(value) if isinstance(n, int)))
    if blocks > max(count, 64):
        options = ", ".join(f"{field} {value}" for field, value in said.items())
        raise ValueError(f"{name}: a network of {options} has more than {blocks} tensors, the file has {count}")
    for field in dataclasses.fields(module):
        if field.name != "parent" and isinstance(part := getattr(module, field.name), nn.Module):
            _check_depth(name, part, count)


def _parameters(name: str, module: nn.Module) -> Any:
    """The tree of shapes of a module's parameters. ValueError where its options make no network: flax then raises any exception."""
    try:
        return FORMATS[name].shapes(module)
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: its options make no network ({reason})") from error


def from_tensors(
    module: nn.Module,
    tensors: Mapping[str, layout.Tensor],
    dtype: Any = None,
    shardings: Shardings | None = None,
    *,
    place: Place | None = None,
) -> dict:
    """Tensors by torch's names -> the parameters that `module.apply({'params': params}, ...)` takes. Tensors are read one by one.

    dtype, shardings and place are as in `load`. Raises ValueError listing tensors that are missing, that belong to no parameter, or
    that have another shape or dtype; for a number that dtype cannot hold; for a network with more blocks than there are tensors; and
    where both shardings and place are passed.
    """
    _check_places(shardings, place)
    name = class_of(module)
    form = FORMATS[name]
    _check_depth(name, module, len(tensors))
    if shardings is not None:
        place = lambda path, value: jax.device_put(value, shardings(path, value.shape))  # noqa: E731
    placing = {} if place is None else {"place": place}
    return layout.read(form.table(module), _parameters(name, module), tensors, dtype=dtype, **placing)


def from_state(module: nn.Module, state: Mapping[str, np.ndarray], dtype: Any = None) -> dict:
    """`from_tensors` for a state dict of torch, as numpy arrays."""
    return from_tensors(module, layout.tensors(state), dtype)


def to_state(module: nn.Module, params: Any) -> dict[str, np.ndarray]:
    """The inverse of from_state: a state dict with torch's names, in the dtypes of the parameters."""
    return layout.write(FORMATS[class_of(module)].table(module), params)


def _shapes(tree: Any) -> set[tuple[str, tuple[int, ...]]]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(leaf.shape)) for path, leaf in flat}


def class_named(config: Mapping[str, Any]) -> str | None:
    """The class that a config.json names: diffusers' `_class_name`, else the first of transformers' `architectures`."""
    names = config.get("architectures")
    name = config.get("_class_name") or (names[0] if isinstance(names, list) and names else None)
    return name if isinstance(name, str) else None


def module_of(config: Mapping[str, Any]) -> tuple[str, nn.Module]:
    """A config.json -> (the class that it names, our module). ValueError for a class or an option that is not supported."""
    name = class_named(config)
    if name not in FORMATS:
        raise ValueError(f"the class of network is {name!r}; there are {', '.join(FORMATS)}")
    try:
        return name, FORMATS[name].module(config)
    except ValueError:
        raise
    except Exception as error:  # an option of another type than published: it shows as nearly any exception
        raise ValueError(
            f"{name}: an option is of another type than expected ({type(error).__name__}: {error})"
        ) from error


def computing_in(module: nn.Module, dtype: str) -> nn.Module:
    """`module` with `dtype` ('float32', 'bfloat16' or 'float16') as its compute dtype, and that of the modules in its fields."""
    compute_dtype(dtype)
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name != "parent"}
    changed = {name: computing_in(value, dtype) for name, value in fields.items() if isinstance(value, nn.Module)}
    return module.copy(**changed, **({"dtype": dtype} if "dtype" in fields else {}))


def load(
    path: str | pathlib.Path,
    subfolder: str | None = None,
    dtype: str | None = None,
    shardings: Shardings | None = None,
    *,
    place: Place | None = None,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Any]:
    """A folder that `save_pretrained` wrote, or a file of weights with its config.json beside it -> (module, params).

    path       of the folder or file; or 'hub:OWNER/NAME', which is fetched (hub.py)
    subfolder  of `path`, for one network of a pipeline
    dtype      'float32', 'bfloat16' or 'float16': parameters are cast to it while they are read, and the module computes in it.
               None: parameters have the dtype of the file, and the module computes in float32
    shardings  (path 'down_blocks_0/.../kernel', shape) -> the sharding of that leaf
    place      (path, array) -> the leaf; instead of `shardings`, for example to keep the leaf in the host's memory
    variant    'fp16', 'non_ema', ...: read only weights of this variant (files.find)
    options    fields of our module that no config.json has: scan_layers, remat, ...

    The leaves are placed one by one. Beside the result the memory holds the leaf that is being filled and one tensor of the file, or
    two where the file has copies (layout.read). Raises ValueError for a whole pipeline (naming its subfolders), for an unknown
    network or option, for weights that are missing, damaged or of another network, for a number that dtype cannot hold (float16 ends
    at 65504), and where both shardings and place are passed.
    """
    startup.start()
    _check_places(shardings, place)
    path = hub.resolve(path) if subfolder is None else hub.resolve(path) / subfolder
    if not path.exists():
        raise ValueError(f"{path}: no such folder or file")
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file() and (folder / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
        raise ValueError(f"{folder}: a whole pipeline, expected one of its networks: subfolder={', '.join(parts)}")
    config = files.read_json(folder / "config.json")
    try:
        module = module_of(config)[1].copy(**(options or {}))
        if dtype is not None:
            module = computing_in(module, dtype)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    tensors = files.open_tensors(path, variant)
    try:
        return module, from_tensors(module, tensors, dtype, shardings, place=place)
    except ValueError as error:
        # The message for a file that proves damaged while it is read already begins with its path.
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def save(
    path: str | pathlib.Path,
    module: nn.Module,
    params: Any,
    max_shard_size: int = 5_000_000_000,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `from_pretrained` of diffusers or transformers reads to the same numbers, in the dtypes of the parameters.

    max_shard_size is in bytes. `facts` are published options that change no number and that our module does not have, such as
    sample_size; it may be a whole config.json, whose name of a class is ignored (IDENTITY). An earlier save in `path` is replaced when
    the new one is complete. Raises ValueError for a network that no published class computes, for a fact that is unknown or that
    changes a number, and for a folder that holds anything else.
    """
    name = class_of(module)
    form = FORMATS[name]
    options = form.config(module)
    facts = {key: value for key, value in (facts or {}).items() if not (key.startswith("_") or key in IDENTITY)}
    complete = {**options, **facts}
    if form.config(form.module(complete)) != form.config(form.module(options)):
        raise ValueError(f"{name}: facts {facts} change what the network computes")
    if form.library == "diffusers":
        config = {"_class_name": name, "_diffusers_version": VERSION["diffusers"], **complete}
    else:
        dtypes = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        config = {"architectures": [name], **complete, "dtype": dtype, "transformers_version": VERSION["transformers"]}
    differ = sorted(_shapes(form.shapes(module)) ^ _shapes(params))
    if differ:
        raise ValueError(f"{name}: params are not this module's: {differ[0][0]} and {len(differ) - 1} more do not fit")
    tensors = layout.written(form.table(module), params)
    files.write_folder(pathlib.Path(path), config, files.STEM[form.library], tensors, max_shard_size)
