"""The text encoders beside a latent-diffusion U-Net.

CLIP-L     has the names of transformers, below another prefix                         (SD 1, SDXL)
open_clip  has the names of open_clip's transformer.py, where q, k and v are joined    (SD 2 without its projection; SDXL with it)
"""

import functools
from collections.abc import Mapping
from typing import Any

from ldm_jax.weights.single_file.family import Part
from ldm_jax.weights.single_file.leftovers import SD2_LAYERS
from ldm_jax.weights.single_file.measure import Shapes, count, size
from ldm_jax.weights.single_file.pairs import JOINED, TRANSPOSED, Pair, alike, under

CLIP_LAYER = alike(
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)
OPEN_CLIP_LAYER = (
    Pair("ln_1", "layer_norm1"),
    *(
        Pair(f"attn.in_proj_{part}", tuple(f"self_attn.{n}_proj.{part}" for n in "qkv"), JOINED)
        for part in ("weight", "bias")
    ),
    Pair("attn.out_proj", "self_attn.out_proj"),
    Pair("ln_2", "layer_norm2"),
    Pair("mlp.c_fc", "mlp.fc1"),
    Pair("mlp.c_proj", "mlp.fc2"),
)


def clip(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The pairs of CLIP-L with this config of CLIPTextModel, below text_model on both sides."""
    pairs = [
        Pair(name, f"text_model.{name}")
        for name in ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm")
    ]
    for i in range(config.get("num_hidden_layers", 12)):
        pairs += under(f"encoder.layers.{i}", f"text_model.encoder.layers.{i}", CLIP_LAYER)
    return tuple(pairs)


def open_clip_states(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The pairs of open_clip's text tower with this config of CLIPTextModel. SD 2 does not use its projection."""
    pairs = [
        Pair("token_embedding", "text_model.embeddings.token_embedding"),
        Pair("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Pair("ln_final", "text_model.final_layer_norm"),
    ]
    for i in range(config.get("num_hidden_layers", 12)):
        pairs += under(f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}", OPEN_CLIP_LAYER)
    return tuple(pairs)


def open_clip(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The pairs of open_clip's text tower and its projection, with this config of CLIPTextModelWithProjection."""
    return (*open_clip_states(config), Pair("text_projection", "text_projection.weight", TRANSPOSED))


# The published values. An end token of 2 stands for the largest token, which the end token is.
TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def _tower(shapes: Shapes, tokens: str, positions: str, layers: str, first: str, act: str) -> dict[str, Any]:
    """The config.json of the tower of a text encoder, from the shapes of the tensors with these names."""
    width = size(shapes, tokens, 1)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": size(shapes, tokens, 0),
        "max_position_embeddings": size(shapes, positions, 0),
        "hidden_size": width,
        "intermediate_size": size(shapes, f"{layers}0.{first}.weight", 0),
        "num_hidden_layers": count(shapes, layers),
        "num_attention_heads": max(1, width // 64),
        "hidden_act": act,
        **TOKENS,
    }


def clip_config(shapes: Shapes, pixels: int) -> dict[str, Any]:
    """The config.json of CLIP-L."""
    names = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.", "mlp.fc1")
    return _tower(shapes, *names, "quick_gelu")


def open_clip_config(shapes: Shapes, pixels: int, projected: bool) -> dict[str, Any]:
    """The config.json of open_clip's text tower."""
    names = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.", "mlp.c_fc")
    options = _tower(shapes, *names, "gelu")
    if not projected:
        return options | {"num_hidden_layers": min(options["num_hidden_layers"], SD2_LAYERS)}
    projection = size(shapes, "text_projection", 1)
    return options | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": projection}


def _whole(name: str) -> str:
    """A name of the folder, with the prefix text_model. that transformers 5 does not write for CLIPTextModel."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def clip_part(prefix: str) -> Part:
    """CLIP-L below `prefix`, with text_model. or without it, as in early conversions of SD 1."""
    mark = "embeddings.token_embedding.weight"
    return Part((f"{prefix}text_model.", prefix), mark, clip, clip_config, filed=_whole)


def open_clip_part(prefix: str, projected: bool = True) -> Part:
    """open_clip's text tower below `prefix`."""
    measure = functools.partial(open_clip_config, projected=projected)
    return Part(
        (prefix,), "token_embedding.weight", open_clip if projected else open_clip_states, measure, filed=_whole
    )
