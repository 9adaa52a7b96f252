"""A published model from one form into another, tensor by tensor: a pipeline's folder, a network's folder, a file in the LDM layout.

    model = read(path)          cast(model, "float16")          write_folder(path, model)   or   write_file(path, model)

Nothing is held but the tensor that is being written. What belongs to a class in weights.FORMATS has been read once through its table
by then, so that a tensor that is missing, left over or damaged is met before anything is written.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ldm_jax import weights
from ldm_jax.pipelines import components
from ldm_jax.weights import files, single_file
from ldm_jax.weights import tokenizer as tokenizers
from ldm_jax.weights.layout import FLOATS, Tensor, narrowed

Network = tuple[dict[str, Any], Mapping[str, Tensor]]

LARGEST_SHARD = 5_000_000_000
# Where a network that stands alone goes in the LDM layout.
PLACES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}


class Published(NamedTuple):
    """A model whose tensors have not been read.

    index      model_index.json; None for one network, which is then called ''
    networks   component -> (config.json, tensors by torch's names)
    beside     component -> file name -> the file that is copied, or the JSON that is written
    """

    index: dict[str, Any] | None
    networks: dict[str, Network]
    beside: dict[str, dict[str, pathlib.Path | dict[str, Any]]]


def _checked(where: str, network: Network) -> Network:
    """The same network, after all of it has been read once, if it is of a class that we have."""
    config, tensors = network
    if weights.class_named(config) in weights.FORMATS:
        try:
            weights.from_tensors(weights.module_of(config)[1], tensors, place=lambda path, value: None)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return network


def read_network(folder: pathlib.Path) -> Network:
    """A folder that `save_pretrained` wrote. Raises ValueError as weights.load."""
    return _checked(str(folder), (files.read_json(folder / "config.json"), files.open_tensors(folder)))


def read_folder(path: pathlib.Path) -> Published:
    """A pipeline's folder; a part without weights is copied as it is. ValueError for one that is listed and not there."""
    index = files.read_json(path / "model_index.json")
    networks, beside = {}, {}
    for name in components.listed(index):
        folder = path / name
        # A bare name: an index may not point out of its folder.
        bare = pathlib.PurePath(name).name == name != ".."
        if name in components.UNUSED and bare and not (folder.is_dir() and files.holds_weights(folder)):
            index = index | {name: [None, None]}  # fetched without its weights, which no picture depends on
            continue
        if not bare or not folder.is_dir():
            raise ValueError(f"{path}: model_index.json lists {name!r}, and there is no such folder")
        if (folder / "config.json").is_file():
            networks[name] = read_network(folder)
        else:
            beside[name] = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    return Published(index, networks, beside)


def _index(kind: str, networks: Mapping[str, Network], schedule: Mapping[str, Any]) -> dict[str, Any]:
    """model_index.json of a single file: every part that the pipeline's class asks for, [null, null] where there is none."""
    index: dict[str, Any] = {
        "_class_name": components.name_of(kind),
        "_diffusers_version": weights.VERSION["diffusers"],
    }
    names = [pair for pair in components.TEXT if kind.startswith("sdxl") or pair[1] in networks]
    for words, network in names:
        there = network in networks
        index[words] = ["transformers", "CLIPTokenizer"] if there else [None, None]
        index[network] = ["transformers", weights.class_named(networks[network][0])] if there else [None, None]
    index |= {name: ["diffusers", weights.class_named(networks[name][0])] for name in ("unet", "vae")}
    index["scheduler"] = ["diffusers", schedule["_class_name"]]
    if kind.endswith("depth"):
        # The file's own network of depth is not one of transformers'.
        return index | {"depth_estimator": [None, None], "feature_extractor": [None, None]}
    if kind.startswith("sdxl"):
        return index | components.options_of(kind)
    return index | {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def read_file(
    path: pathlib.Path,
    tokenizer: str | pathlib.Path | None = None,
    prediction: str | None = None,
    scaling_factor: float | None = None,
) -> Published:
    """One file in the LDM layout, .safetensors or a pickle of torch's: a whole pipeline, or the one network that it holds.

    tokenizer: a folder, of a tokenizer or of a pipeline that has it; None: the model cannot be written as a folder. prediction: as
    in single_file.configs. scaling_factor: of an autoencoder, which a file does not say. Raises ValueError for a network that is
    missing, left over or damaged, and for another tokenizer.
    """
    state = files.open_tensors(path)
    try:
        kind = single_file.identify({name: tensor.shape for name, tensor in state.items()})
        options = None if scaling_factor is None else {"vae": {"scaling_factor": scaling_factor}}
        parts = single_file.split(state, kind, prediction=prediction, options=options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    networks = {name: _checked(f"{path}: {name}", network) for name, network in parts.items() if name != "scheduler"}
    if len(networks) == 1:
        return Published(None, {"": next(iter(networks.values()))}, {})
    if missing := [name for name in single_file.parts(kind) if name not in networks]:
        raise ValueError(f"{path}: a {kind} without {missing[0]}; the file holds {', '.join(networks)}")
    schedule = parts["scheduler"][0] | {"_diffusers_version": weights.VERSION["diffusers"]}
    beside: dict[str, dict] = {"scheduler": {"scheduler_config.json": schedule}}
    for words, network in components.TEXT:
        if network not in networks or tokenizer is None:
            continue
        folder, config = components.tokenizer_folder(tokenizer, words), networks[network][0]
        tokenizers.load(folder, vocab_size=config["vocab_size"])
        padding = tokenizers.PADDING[config["hidden_act"]]
        beside[words] = dict(tokenizers.files_of(folder, padding, config["max_position_embeddings"]))
    return Published(_index(kind, networks, schedule), networks, beside)


def read(
    path: pathlib.Path,
    tokenizer: str | pathlib.Path | None = None,
    prediction: str | None = None,
    scaling_factor: float | None = None,
) -> Published:
    """A pipeline's folder, a network's folder or a single file; the other arguments are what a file lacks (read_file).

    Raises ValueError for anything else, and for whatever is missing, damaged or unknown in it.
    """
    if path.is_file():
        return read_file(path, tokenizer, prediction, scaling_factor)
    lacking = {"tokenizer": tokenizer, "prediction": prediction, "scaling_factor": scaling_factor}
    for name, value in lacking.items():
        if value is not None:
            raise ValueError(f"{name} is for single files; {path} is a folder, which has its own")
    if (path / "model_index.json").is_file():
        return read_folder(path)
    if (path / "config.json").is_file():
        return Published(None, {"": read_network(path)}, {})
    raise ValueError(
        f"{path}: expected a run of `ldm train`, a pipeline's folder (model_index.json), a network's (config.json), or a file of "
        "weights"
    )


# --- dtypes ----------------------------------------------------------------------------------------------------------------


def _cast(name: str, tensor: Tensor, dtype: np.dtype) -> Tensor:
    if tensor.dtype.name not in FLOATS:
        return tensor
    return Tensor(tensor.shape, dtype, lambda: narrowed(name, tensor.read(), dtype))


def cast(model: Published, dtype: str) -> Published:
    """The same model with its floating tensors in 'float32', 'bfloat16' or 'float16', cast as they are read."""
    target, networks = np.dtype(dtype), {}
    for component, (config, tensors) in model.networks.items():
        # transformers reads its own dtype off the config.
        said = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
        networks[component] = (
            config | said,
            {name: _cast(name, tensor, target) for name, tensor in tensors.items()},
        )
    return model._replace(networks=networks)


# --- writing ---------------------------------------------------------------------------------------------------------------


def write_folder(path: pathlib.Path, model: Published) -> None:
    """The folder that diffusers' `from_pretrained` reads, of a pipeline or of one network; `path` must be new.

    ValueError for a part that the index lists and the model lacks: the tokenizer of a single file.
    """
    for name in components.listed(model.index or {}):
        if name not in model.networks and name not in model.beside:
            raise ValueError(f"a single file has no {name}; give the folder of one (CLIP's vocabulary)")
    for component, (config, tensors) in model.networks.items():
        stem = files.STEM["transformers" if "architectures" in config else "diffusers"]
        files.write_folder(path / component, config, stem, tensors, LARGEST_SHARD)
    for component, held in model.beside.items():
        (path / component).mkdir(parents=True)
        for name, content in held.items():
            if isinstance(content, pathlib.Path):
                shutil.copyfile(content, path / component / name)
            else:
                (path / component / name).write_text(json.dumps(content, indent=2) + "\n")
    if model.index is not None:
        (path / "model_index.json").write_text(json.dumps(model.index, indent=2) + "\n")


def _kind(networks: Mapping[str, Network]) -> str:
    """The kind in single_file.KINDS of these components. ValueError where the layout has none."""
    if (kind := single_file.kind_of({component: config for component, (config, _) in networks.items()})) is not None:
        return kind
    if "unet" not in networks:
        raise ValueError(f"the LDM layout has a U-Net or an autoencoder; this holds {', '.join(networks) or 'neither'}")
    name, unet = weights.module_of(networks["unet"][0])
    raise ValueError(
        f"the LDM layout has no place for this U-Net: a {name} that attends to {unet.cross_attention_dim} channels of text and "
        f"reads {unet.in_channels}"
    )


# Of a module: CLIP's tokenizer ends every prompt with the largest token, so both ways to say which one find it.
UNSAID = ("eos_token_id", "parent", "name")
SCALE = ("scaling_factor", "shift_factor")


def _same(a: Any, b: Any) -> bool:
    """Whether two options are one: one number for all levels may be written once or level by level."""
    if isinstance(a, tuple) != isinstance(b, tuple):
        return all(x == (b if isinstance(a, tuple) else a) for x in (a if isinstance(a, tuple) else b))
    return a == b


def _differs(ours: nn.Module, read: nn.Module, unsaid: tuple[str, ...]) -> str | None:
    """The first option that a reader of the single file would take for another."""
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(read, field.name)
        if field.name not in unsaid and not isinstance(a, nn.Module) and not _same(a, b):
            return f"{field.name} is {a!r}, and a reader takes {b!r}"
    return None


def write_file(path: pathlib.Path, model: Published) -> dict[str, Any]:
    """One .safetensors file in the LDM layout; the result is the scheduler's config that a reader will take, {} for one network.

    Tokenizers and the scheduler have no place in it, nor has what pipelines.components.UNUSED names. Raises ValueError for a
    network that the layout does not have, and for an option that it cannot say and a reader would take for another.
    """
    networks = {name: network for name, network in model.networks.items() if name not in components.UNUSED}
    if model.index is None:
        name = weights.class_named(networks[""][0])
        if name not in PLACES:
            raise ValueError(f"the LDM layout has no place for a {name}, expected {' or '.join(PLACES)}")
        networks = {PLACES[name]: networks[""]}
    kind = _kind(networks)
    state = single_file.join(networks, kind)
    parts = single_file.split(state, kind)
    for component, (config, _) in networks.items():
        unsaid = UNSAID + (SCALE if kind == "vae" else ())
        modules = (weights.module_of(c)[1] for c in (config, parts[component][0]))
        if wrong := _differs(*modules, unsaid):
            raise ValueError(f"the LDM layout cannot say it: {component}'s {wrong}")
    files.write_safetensors(path, state)
    return parts["scheduler"][0] if model.index is not None else {}
