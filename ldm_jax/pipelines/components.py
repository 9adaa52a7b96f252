"""The parts of a published pipeline, as its model_index.json lists them.

A part is a module, its parameters, and the config.json it came with. With `offload` the parameters stay in the host's memory and
each part is brought to the device when its turn comes (text, denoiser, autoencoder): the device then holds one of them at a time.
"""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ldm_jax import schedules, weights
from ldm_jax.pipelines.kinds import PIPELINES, TEXT, name_of
from ldm_jax.weights import autoencoders, files, single_file
from ldm_jax.weights import tokenizer as tokenizers

# What a folder may hold and no picture depends on; the safety checker is a classifier of finished pictures.
UNUSED = ("safety_checker", "feature_extractor", "watermark", "depth_estimator")
DENOISERS, AUTOENCODERS = ("unet", "transformer"), autoencoders.PARTS


class Part(NamedTuple):
    """A network: module.apply({'params': params}, ...), and the config.json beside its weights."""

    module: nn.Module
    params: Any
    config: Mapping[str, Any]


class TextEncoder(NamedTuple):
    """A tokenizer of transformers' and the network that reads its tokens."""

    tokenizer: Any
    network: Part


class Parts(NamedTuple):
    """The parts that `load` has read: `name` of the pipeline's class, its networks, its schedule, and the options of model_index.json.

    offload  keep parameters in the host's memory; tile: encode and decode pictures in tiles of so many pixels
    """

    name: str
    denoiser: Part
    autoencoder: Part | None
    text: tuple[TextEncoder, ...]
    schedule: schedules.Schedule
    options: Mapping[str, Any]
    offload: bool = False
    tile: int | None = None


def schedule(path: pathlib.Path, name: str) -> schedules.Schedule:
    """The schedule in a file of the pipeline called `name`, corrected as diffusers corrects it, with a warning."""
    config = files.read_json(path)
    options = getattr(schedules.CLASSES.get(config.get("_class_name")), "options", {})
    for key, value in PIPELINES[name].corrections.items():
        if key in options and (met := config.get(key, options[key])) != value:
            warnings.warn(f"{path}: {key} is {met!r}; {value!r} is taken, as {name} needs", stacklevel=2)
            config[key] = value
    try:
        return schedules.load(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def part(path: pathlib.Path, name: str, dtype: str | None, offload: bool) -> Part:
    """The network in the folder path / name, computing in dtype (None: float32), its parameters held in it."""
    place = {"place": lambda _, value: value} if offload else {}
    module, params = weights.load(path, name, dtype, **place)
    return Part(module, params, files.read_json(path / name / "config.json"))


def listed(index: Mapping[str, Any]) -> list[str]:
    """The parts that a model_index.json has."""
    return [k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None]


def options_of(kind: str) -> dict[str, bool]:
    """The options that model_index.json has for a single file of this kind."""
    if kind == "sdxl_refiner":
        return {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    return {"force_zeros_for_empty_prompt": True} if kind.startswith("sdxl") else {}


def tokenizer_folder(path: str | pathlib.Path, words: str) -> pathlib.Path:
    """The folder of the tokenizer called `words`: inside `path` where that is a pipeline's folder, else `path` itself."""
    folder = pathlib.Path(path)
    return folder / words if (folder / words).is_dir() else folder


def load_file(
    path: pathlib.Path,
    tokenizer: str | pathlib.Path | None,
    dtype: str | None = None,
    *,
    offload: bool = False,
    kind: str | None = None,
    prediction: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Parts:
    """The parts in one file of the LDM layout (.safetensors, .ckpt); tokenizer: the folder of one, or of a pipeline that has it.

    Of the tokenizer's folder the vocabulary counts: the padding is that of the file's text encoder.
    kind, prediction and options: what the file cannot tell, see weights.single_file.configs. Raises ValueError as `load`.
    """
    state = files.open_tensors(path)
    try:
        kind = kind or single_file.identify({name: tensor.shape for name, tensor in state.items()})
        networks = single_file.split(state, kind, prediction=prediction, options=options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if missing := [name for name in ("unet", "vae", "scheduler") if name not in networks]:
        raise ValueError(f"{path}: a {kind} without {missing[0]}; the file holds {', '.join(networks)}")
    place = {"place": lambda _, value: value} if offload else {}

    def made(name: str) -> Part:
        config, tensors = networks[name]
        module = weights.module_of(config)[1]
        module = weights.computing_in(module, dtype) if dtype else module
        try:
            return Part(module, weights.from_tensors(module, tensors, dtype, **place), config)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None

    text = []
    for words, network in TEXT:
        if network in networks:
            if tokenizer is None:
                raise ValueError(f"{path}: a single file has no tokenizer; give the folder of one (CLIP's vocabulary)")
            encoder = made(network)
            folder, padding = tokenizer_folder(tokenizer, words), tokenizers.PADDING.get(encoder.module.hidden_act)
            words = tokenizers.load(folder, vocab_size=encoder.module.vocab_size, padding=padding)
            text.append(TextEncoder(words, encoder))
    name = name_of(kind)
    if name not in PIPELINES:
        raise ValueError(f"{path}: a {kind}: pipeline {name!r} is not known")
    steps = schedules.load(networks["scheduler"][0])
    return Parts(name, made("unet"), made("vae"), tuple(text), steps, options_of(kind), offload)


def load(path: str | pathlib.Path, dtype: str | None = None, *, offload: bool = False) -> Parts:
    """The parts in a pipeline's folder. Raises ValueError for a class of pipeline, a part or an option that is unknown."""
    path = pathlib.Path(path)
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path}: expected a pipeline's folder, with a model_index.json, or a single file")
    index = files.read_json(path / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{path}: pipeline {name!r} is not known; there are {', '.join(PIPELINES)}")
    parts = listed(index)
    supported = {*DENOISERS, *AUTOENCODERS, *(p for pair in TEXT for p in pair), "scheduler", *UNUSED}
    if unknown := sorted(set(parts) - supported):
        raise ValueError(f"{path}: {name} has a part {unknown[0]!r}, which is not supported")

    # Before the large files are read, so that a schedule that is not supported is said at once.
    steps = schedule(path / "scheduler" / "scheduler_config.json", name)

    def first(names: tuple[str, ...]) -> Part | None:
        name = next((n for n in names if n in parts), None)
        return None if name is None else part(path, name, dtype, offload)

    denoiser = first(DENOISERS)
    if denoiser is None:
        raise ValueError(f"{path}: model_index.json lists no {' or '.join(DENOISERS)}")
    text = []
    for words, network in TEXT:
        if network in parts:
            if words not in parts:
                raise ValueError(f"{path}: model_index.json lists {network!r} without {words!r}")
            encoder = part(path, network, dtype, offload)
            tokenizer = tokenizers.load(path, words, encoder.module.vocab_size)
            tokenizers.check_padding(path / words, tokenizer, tokenizers.PADDING.get(encoder.module.hidden_act))
            text.append(TextEncoder(tokenizer, encoder))
    if PIPELINES[name].text and not text:
        raise ValueError(f"{path}: model_index.json of {name} lists no text encoder")
    options = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)}
    return Parts(name, denoiser, first(AUTOENCODERS), tuple(text), steps, options, offload)


@contextlib.contextmanager
def on_device(params: Any, offload: bool) -> Iterator[Any]:
    """The parameters of one part on the device, for as long as the block lasts where they are offloaded."""
    if not offload:
        yield params
        return
    placed = jax.device_put(params)
    try:
        yield placed
    finally:
        # On CPU a device_put may be the host's own array: only what was copied may be given up.
        if jax.default_backend() != "cpu":
            jax.tree.map(lambda x: x.delete(), placed)
