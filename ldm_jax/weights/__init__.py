"""Other people's checkpoints <-> our modules and parameter trees.

    module, params = load("stable-diffusion-v1-5", "unet")        save("my-unet", module, params)

A published class is one Format (format.py), whose table of names is made of Rows (layout.py); files.py knows folders and files.
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
# The versions whose files are written; both libraries read files of older versions.
VERSION = {"diffusers": "0.42.1", "transformers": "5.23.0"}
# With keys that begin with '_', what a config.json says of its class: the module's to say, and no fact.
IDENTITY = ("architectures", "model_type")


def class_of(module: nn.Module) -> str:
    """The published class that computes what `module` computes. ValueError for a module of a type that no class in FORMATS has."""
    forms = [form for form in FORMATS.values() if form.network is type(module)]
    if not forms:
        types = dict.fromkeys(form.network.__name__ for form in FORMATS.values())
        raise ValueError(f"{type(module).__name__}: expected a module of type {', '.join(types)}")
    return next(form.name for form in forms if form.written(module))


def _check_places(shardings: Shardings | None, place: Place | None) -> None:
    if shardings is not None and place is not None:
        raise ValueError("shardings and place are both given, expected one of them to say where a leaf goes")


# Fields of our modules that say how many blocks there are, in each level where a module has levels.
DEPTHS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers", "depth")


def _check_depth(name: str, module: nn.Module, count: int) -> None:
    """ValueError for a network of more blocks than the `count` tensors of the file: tracing ten thousand takes minutes."""
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
    """The tree of shapes of a module; ValueError where its options make no network, which shows as nearly any exception."""
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
    """Tensors by torch's names -> the parameters that `module.apply({'params': params}, ...)` takes, read one by one.

    dtype, shardings and place as in `load`. ValueError listing tensors that are missing, left over, of another shape or dtype; for
    a number that dtype cannot hold; for a network of more blocks than there are tensors; for both shardings and place.
    """
    _check_places(shardings, place)
    name = class_of(module)
    form = FORMATS[name]
    _check_depth(name, module, len(tensors))
    if shardings is not None:
        place = lambda path, value: jax.device_put(value, shardings(path, value.shape))  # noqa: E731
    how = {} if place is None else {"place": place}
    return layout.read(form.table(module), _parameters(name, module), tensors, dtype=dtype, **how)


def from_state(module: nn.Module, state: Mapping[str, np.ndarray], dtype: Any = None) -> dict:
    """`from_tensors` for torch's state dict as numpy arrays."""
    return from_tensors(module, layout.tensors(state), dtype)


def to_state(module: nn.Module, params: Any) -> dict[str, np.ndarray]:
    """The inverse of from_state: torch's names, in the parameters' dtypes."""
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
    """A config.json -> (the class it names, our module). ValueError for a class or an option that is not known."""
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
    """`module` with its field `dtype`, and that of the modules it is given, set to 'float32', 'bfloat16' or 'float16'."""
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

    path       also 'hub:OWNER/NAME', which is fetched (hub.py)
    dtype      'float32', 'bfloat16' or 'float16': cast while reading, and what the module computes in. None: parameters as
               in the file, computing in float32
    shardings  (path 'down_blocks_0/.../kernel', shape) -> where that leaf goes on a mesh
    place      (path, array) -> the leaf, in place of `shardings`: to keep it in the host's memory, say
    variant    'fp16', 'non_ema', ...: those weights alone (files.find)
    options    fields of our module that no config.json has: scan_layers, remat, ...

    The leaves go to their place one by one: besides the result there are the leaf that is being filled and one tensor of the file,
    or two where the file holds copies (layout.read). Raises ValueError for a whole pipeline (naming its subfolders), an unknown
    network or option, weights that are missing, damaged or not of that network, a number that dtype cannot hold (float16 ends at
    65504), and for both shardings and place.
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
        # A file that turns out damaged while it is read names itself.
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def save(
    path: str | pathlib.Path,
    module: nn.Module,
    params: Any,
    max_shard_size: int = 5_000_000_000,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """A folder that diffusers' or transformers' `from_pretrained` reads to the same numbers, in the parameters' dtypes.

    max_shard_size is in bytes. `facts` are published options that no number depends on and our module does not hold, such as
    sample_size; what a whole config.json says of its class is left out of them (IDENTITY). An earlier save in `path` is replaced
    once the new one is whole. Raises ValueError for a network that no published class computes, a fact that is unknown or is not
    one, and a folder that holds anything else.
    """
    name = class_of(module)
    form = FORMATS[name]
    options = form.config(module)
    facts = {key: value for key, value in (facts or {}).items() if not (key.startswith("_") or key in IDENTITY)}
    given = {**options, **facts}
    if form.config(form.module(given)) != form.config(form.module(options)):
        raise ValueError(f"{name}: facts {facts} change what the network computes")
    if form.library == "diffusers":
        config = {"_class_name": name, "_diffusers_version": VERSION["diffusers"], **given}
    else:
        dtypes = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        config = {"architectures": [name], **given, "dtype": dtype, "transformers_version": VERSION["transformers"]}
    differ = sorted(_shapes(form.shapes(module)) ^ _shapes(params))
    if differ:
        raise ValueError(f"{name}: params are not this module's: {differ[0][0]} and {len(differ) - 1} more do not fit")
    tensors = layout.written(form.table(module), params)
    files.write_folder(pathlib.Path(path), config, files.STEM[form.library], tensors, max_shard_size)
