"""Published autoencoders, in any form: the folder of one, the folder of a pipeline, a file of one, a file of a whole model.

    z = (z_raw - shift) scale,    scale = scaling_factor, shift = shift_factor
                                  scale = scaling_factor / latents_std, shift = latents_mean     where the config has statistics

`find` reads config.json and the names and shapes of the tensors. The field `read` of its result reads the weights.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ldm_jax import weights
from ldm_jax.weights import files, hub, single_file
from ldm_jax.weights.layout import Tensor

CLASSES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
# The names of the autoencoder in pipelines.
PARTS = ("vae", "vqvae", "movq")
# The files of the autoencoder in a repository on the hub. The gigabytes of the other networks are not fetched.
FILES = (
    *("config.json", "model_index.json", "diffusion_pytorch_model*.safetensors*"),
    *(f"{part}/{file}" for part in PARTS for file in ("*.json", "*.safetensors")),
)


class Autoencoder(NamedTuple):
    """An autoencoder whose weights have not been read yet.

    path          of its folder or file
    config        its config.json, or the one that follows from a single file
    module        linen module, computing in float32
    scale, shift  f32[C]: z = (z_raw - shift) scale
    read          () -> its parameters as numpy arrays, in the dtypes of the file
    note          what was assumed because the files do not say it; '' for nothing
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    module: nn.Module
    scale: np.ndarray
    shift: np.ndarray
    read: Callable[[], Any]
    note: str = ""


def affine(config: Mapping[str, Any], module: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift), f32[] or f32[C]: z = (z_raw - shift) scale. They follow from the config.json, and the module for defaults."""
    scale, shift = np.float32(module.scaling_factor), np.float32(getattr(module, "shift_factor", None) or 0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return scale / np.asarray(std, np.float32), np.asarray(mean, np.float32)
    return scale, shift


def channels(module: nn.Module) -> int:
    """The number of channels of a latent."""
    return getattr(module, "vq_embed_dim", None) or module.latent_channels


def module_of(path: pathlib.Path, config: Mapping[str, Any]) -> nn.Module:
    """The module of the config.json of an autoencoder in `path`. ValueError for another network and for an unknown option."""
    name = weights.class_named(config)
    if name not in CLASSES:
        held = f"a network of the class {name}" if name else "no network that says its class"
        raise ValueError(f"{path} holds {held}; expected an autoencoder: {', '.join(CLASSES)}")
    try:
        module = weights.module_of(config)[1]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if (module.in_channels, module.out_channels) != (3, 3):
        raise ValueError(
            f"{path}: in_channels is {module.in_channels} and out_channels {module.out_channels}; expected 3 and 3, RGB"
        )
    return module


def described(
    path: pathlib.Path,
    config: Mapping[str, Any],
    read: Callable[[nn.Module], Any],
    whitening: tuple[np.ndarray, np.ndarray] | None = None,
    note: str = "",
) -> Autoencoder:
    """The Autoencoder of a config.json. `whitening` (scale, shift) replaces that of the config. ValueError for values that misfit."""
    module = module_of(path, config)
    try:
        scale, shift = (
            np.broadcast_to(np.asarray(value, np.float32), (channels(module),))
            for value in whitening or affine(config, module)
        )
    except (ValueError, TypeError):
        raise ValueError(
            f"{path}: latents_mean and latents_std do not fit {channels(module)} channels of latents"
        ) from None
    if not (np.isfinite(shift).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{path}: latents are scaled by {scale} and shifted by {shift}; expected scales above 0")
    return Autoencoder(path, config, module, scale, shift, lambda: read(module), note)


def _network(folder: pathlib.Path, weights_of: pathlib.Path) -> Autoencoder:
    """The autoencoder whose config.json is in `folder`. Its weights are in the path `weights_of`: the folder, or a file in it."""
    config = files.read_json(folder / "config.json")
    module_of(folder, config)  # raises for a U-Net before its weights are looked for
    return described(folder, config, _reader(weights_of, files.open_tensors(weights_of)))


def _reader(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> Callable[[nn.Module], Any]:
    def read(module: nn.Module) -> Any:
        try:
            return weights.from_tensors(module, tensors, place=lambda _, value: value)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None

    return read


def _in_folder(folder: pathlib.Path) -> Autoencoder:
    if (folder / "config.json").is_file():
        return _network(folder, folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no autoencoder; expected a config.json, or a pipeline's model_index.json")
    index = files.read_json(folder / "model_index.json")
    part = next((name for name in PARTS if index.get(name) and index[name][0] is not None), None)
    if part is None:
        raise ValueError(f"{folder}: no autoencoder; its model_index.json lists no {', '.join(PARTS)}")
    return _network(folder / part, folder / part)


def _in_file(path: pathlib.Path, scaling_factor: float | None) -> Autoencoder:
    state = files.open_tensors(path)
    try:
        kind = single_file.identify({name: tensor.shape for name, tensor in state.items()})
        options = None if scaling_factor is None else {"vae": {"scaling_factor": scaling_factor}}
        components = single_file.split(state, kind, options=options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if "vae" not in components:
        raise ValueError(f"{path}: no autoencoder; the file holds {', '.join(components)}")
    config, tensors = components["vae"]
    alone = kind == "vae" and scaling_factor is None
    note = f"scaling_factor {config['scaling_factor']} is assumed: an autoencoder's file does not say" if alone else ""
    return described(path, config, _reader(path, tensors), note=note)


def find(path: str | pathlib.Path, scaling_factor: float | None = None) -> Autoencoder:
    """The autoencoder in a folder of `save_pretrained` (of the autoencoder or of a pipeline), in a file, or at hub:OWNER/NAME.

    A file in the LDM layout holds an autoencoder or a whole model; `scaling_factor` replaces the one that is usual for its kind. A file
    with a config.json beside it is read like its folder. Raises ValueError for a path without an autoencoder (naming what is there),
    for a class or an option that is not supported, and for weights that are missing or damaged.
    """
    path = hub.resolve(path, FILES)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such folder or file")
    beside = path.parent / "config.json"
    if beside.is_file() and weights.class_named(files.read_json(beside)):
        return _network(path.parent, path)
    return _in_file(path, scaling_factor)
