"""A published autoencoder in the place of a first stage that was trained here: found, read, and named by its content.

`first_stage.workdir` names a folder of diffusers', a pipeline's folder, a file, hub:OWNER/NAME, or what `ldm convert --to=orbax` wrote.
Its latents are whitened by its own constants, z = (z_raw - shift) scale, which are those that published models were trained with.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ldm_jax import weights
from ldm_jax.data import archive
from ldm_jax.runs import checkpoint
from ldm_jax.training.first_stage import FirstStage, latent_shape
from ldm_jax.weights import autoencoders, files, hub
from ldm_jax.weights.tree_hash import tree_sha256

# What latents are made by; the rest of the parameters decodes them.
ENCODING = ("encoder", "quant_conv")
# The task in the config.json of what `ldm convert --to=orbax` wrote.
WEIGHTS = "weights"


def place(where: str | os.PathLike) -> pathlib.Path:
    """The folder or file that `where` names: as it stands, below $LDM_DATA, or of hub:OWNER/NAME, which is fetched.

    Raises FileNotFoundError, and ValueError for a name of the hub that cannot be fetched.
    """
    if str(where).startswith(hub.PREFIX):
        return hub.resolve(where, autoencoders.FILES)
    try:
        return archive.resolve(where).absolute()
    except FileNotFoundError as error:
        looked = str(error).partition(": ")[2]
        raise FileNotFoundError(f"{where}: no such run, folder or file of an autoencoder: {looked}") from None


def _config(path: pathlib.Path) -> Mapping[str, Any]:
    return files.read_json(path / "config.json") if (path / "config.json").is_file() else {}


def is_start(path: pathlib.Path) -> bool:
    """Whether `ldm convert --to=orbax` wrote it."""
    task = _config(path).get("task")
    return isinstance(task, Mapping) and task.get("name") == WEIGHTS


def is_published(path: pathlib.Path) -> bool:
    """Whether there is something at `path` that is not a run of `ldm train`: a file, or a folder of weights."""
    if path.is_file() or is_start(path):
        return True
    config = _config(path)
    return (bool(config) and "task" not in config) or (path / "model_index.json").is_file()


def find(path: pathlib.Path, measured: bool = False) -> autoencoders.Autoencoder:
    """The autoencoder at `path`, its weights not read. `measured`: its latents' scale is not asked for. Raises ValueError as
    weights.autoencoders.find."""
    if is_start(path):
        return _of_start(path)
    try:
        return autoencoders.find(path)
    except ValueError as error:
        if "no scale is known" not in str(error):
            raise
    if measured:
        return autoencoders.find(path, scaling_factor=1.0)
    raise ValueError(
        f"{path}: a file does not say how its latents are scaled; expected config.first_stage.whitening='measured', or the "
        "folder that `ldm convert FILE FOLDER --scaling-factor=F` writes"
    )


def networks(path: pathlib.Path) -> Mapping[str, Any]:
    """{name: config.json} of what `ldm convert --to=orbax` wrote. ValueError where an earlier version wrote it, which did not say."""
    config = _config(path)
    if "networks" not in config:
        raise ValueError(
            f"{path} does not say what network it holds: it was written by an earlier version; expected it converted anew from "
            f"{config.get('converted_from')}, or that itself"
        )
    return config["networks"]


def _of_start(path: pathlib.Path) -> autoencoders.Autoencoder:
    held = networks(path)
    if "autoencoder" not in held:
        raise ValueError(f"{path}: no autoencoder; it holds {', '.join(held) or 'no network of a published class'}")
    step = checkpoint.newest(path)
    if step is None:
        raise FileNotFoundError(f"{path} has no intact checkpoint")
    whitening = _config(path).get("whitening")
    if whitening is not None:
        whitening = 1 / np.asarray(whitening["std"], np.float32), np.asarray(whitening["mean"], np.float32)

    def read(module: nn.Module) -> Any:
        return checkpoint.restore_params(path, step)["autoencoder"]

    return autoencoders.described(path, held["autoencoder"], read, whitening)


def sha256(module: nn.Module, params: Mapping[str, Any]) -> str:
    """Names what `params`, networks of the `module`, compute, whatever file they came in."""
    options = weights.FORMATS[weights.class_of(module)].config(module)
    options = {name: value for name, value in options.items() if name not in ("scaling_factor", "shift_factor")}
    return tree_sha256(params, head=json.dumps(options, sort_keys=True))


def load(autoencoder: autoencoders.Autoencoder, resolution: int) -> FirstStage:
    """The first stage of images of `resolution` pixels a side, with its own constants; its parameters are numpy arrays.

    Its sha256 names the latents, by what encodes them; `decoder` the rest. Raises ValueError for weights that do not fit, and for a
    resolution that it cannot encode.
    """
    params = autoencoder.read()
    shape = latent_shape(autoencoder.module, (resolution, resolution, 3))
    parts = {True: {}, False: {}}
    for name, tree in params.items():
        parts[name in ENCODING][name] = tree
    names = [sha256(autoencoder.module, parts[encodes]) for encodes in (True, False)]
    return FirstStage(autoencoder.module, params, autoencoder.shift, 1 / autoencoder.scale, shape, *names, autoencoder)


def constants(autoencoder: autoencoders.Autoencoder) -> str:
    """How its latents are whitened, in words."""
    if np.ptp(autoencoder.scale) or np.ptp(autoencoder.shift):
        return "its latents' published statistics"
    return f"its scaling_factor {autoencoder.scale[0]:g}" + (
        f" and shift {autoencoder.shift[0]:g}" if autoencoder.shift[0] else ""
    )


def says(stage: FirstStage) -> bool:
    """Whether a published stage's config.json holds the constants by which its latents are whitened."""
    if stage.published is None:
        return False
    scale, shift = autoencoders.affine(stage.published.config, stage.network)
    return bool(np.all(stage.mean == shift) and np.all(stage.std == 1 / scale))


def is_plain(stage: FirstStage) -> bool:
    """Whether its scaling_factor alone whitens a published stage's latents: all that published pipelines of classes do to them."""
    return says(stage) and not np.any(stage.mean) and not np.ptp(stage.std)


def line(autoencoder: autoencoders.Autoencoder, measured: bool = False) -> str:
    """One line for whoever starts a run on it."""
    how = "measured statistics" if measured else constants(autoencoder)
    name, rest = type(autoencoder.module).__name__, f"; {autoencoder.note}" if autoencoder.note and not measured else ""
    return f"first stage: {autoencoder.path}, {name} of {autoencoders.channels(autoencoder.module)} channels, whitened by {how}{rest}"
