"""A published text encoder and its tokenizer, from a folder: CLIP's, of save_pretrained or of a whole pipeline.

FOLDER/text_encoder and FOLDER/tokenizer where it is a pipeline's; else both lie in FOLDER itself. The tokenizer is that of data/, as
text encoders that are trained here have one.
"""

import functools
import pathlib
from typing import Any

import numpy as np

from ldm_jax import models, weights
from ldm_jax.data import Tokenizer, archive
from ldm_jax.models.clip import CLIP, CLIPText
from ldm_jax.weights import files, hub
from ldm_jax.weights import tokenizer as tokenizers


def place(where: str) -> pathlib.Path:
    """The folder that `where` names: as it stands, below $LDM_DATA, or of hub:OWNER/NAME. FileNotFoundError where there is none."""
    return hub.resolve(where) if where.startswith(hub.PREFIX) else archive.resolve(where)


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / name if (folder / name).is_dir() else folder


def _text_of(network: Any, folder: pathlib.Path) -> CLIPText:
    network = network.text if isinstance(network, CLIP) else network
    if not isinstance(network, CLIPText):
        raise ValueError(f"{folder} holds a {type(network).__name__}; expected a text encoder of CLIP")
    return network


def described(where: str) -> CLIPText:
    """The network in a folder, by its config.json; its weights are not read. ValueError for a network of another kind."""
    folder = _inside(place(where), "text_encoder")
    return _text_of(weights.module_of(files.read_json(folder / "config.json"))[1], folder)


def shapes(where: str) -> tuple[CLIPText, Any]:
    """(network, its parameters as shapes)."""
    network = described(where)
    return network, models.shapes(network, (network.max_position_embeddings,))["params"]


def load(where: str) -> tuple[CLIPText, Any]:
    """(network, its parameters). ValueError for a network of another kind, and for files that are missing or do not fit it."""
    folder = _inside(place(where), "text_encoder")
    network, params = weights.load(folder)
    return _text_of(network, folder), params["text"] if isinstance(network, CLIP) else params


@functools.lru_cache(maxsize=8)
def tokenizer(where: str) -> Tokenizer:
    """The tokenizer of the network in a folder, padded as it was trained with. ValueError as weights.tokenizer.load."""
    network, folder = described(where), place(where)
    read = tokenizers.load(
        _inside(folder, "tokenizer"), vocab_size=network.vocab_size, padding=tokenizers.PADDING.get(network.hidden_act)
    )
    length = min(read.model_max_length, network.max_position_embeddings)

    def encode(text: str) -> np.ndarray:
        return np.asarray(read(text, padding="max_length", max_length=length, truncation=True)["input_ids"], np.int32)

    def fits(text: str) -> bool:
        return len(read(text, verbose=False)["input_ids"]) <= length

    return Tokenizer(len(read), length, encode, read.pad_token_id, fits)
