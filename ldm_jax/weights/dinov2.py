"""Dinov2Model and Dinov2WithRegistersModel in transformers' files <-> models/dinov2.py.

These are the names in files. transformers 5 changes them while it reads and writes, so a model in memory has other names.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ldm_jax.models.dinov2 import Dinov2
from ldm_jax.weights.clip import GENERAL
from ldm_jax.weights.format import Format, options
from ldm_jax.weights.kinds import CONV2D, DENSE, NORM
from ldm_jax.weights.layout import Row, under

BLOCK = (
    Row("norm1", "norm1", NORM),
    *(Row(f"{name[0]}_proj", f"attention.attention.{name}", DENSE) for name in ("query", "key", "value")),
    Row("o_proj", "attention.output.dense", DENSE),
    Row("layer_scale1", "layer_scale1.lambda1"),
    Row("norm2", "norm2", NORM),
    Row("fc1", "mlp.fc1", DENSE),
    Row("fc2", "mlp.fc2", DENSE),
    Row("weights_in", "mlp.weights_in", DENSE),
    Row("weights_out", "mlp.weights_out", DENSE),
    Row("layer_scale2", "layer_scale2.lambda1"),
)
ROWS = (
    *(
        Row(name, f"embeddings.{name}")
        for name in ("cls_token", "mask_token", "register_tokens", "position_embeddings")
    ),
    Row("patch_embedding", "embeddings.patch_embeddings.projection", CONV2D),
    *under("layers_{i}", "encoder.layer.{i}", BLOCK),
    Row("layernorm", "layernorm", NORM),
)
OPTIONS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "num_channels",
    "image_size",
    "patch_size",
    "qkv_bias",
    "use_swiglu_ffn",
    "layerscale_value",
    "layer_norm_eps",
)
# Options that only one of the classes has, or that have another default there.
OF_CLASS = {
    "Dinov2Model": {"use_mask_token": True},
    "Dinov2WithRegistersModel": {"num_register_tokens": 4, "patch_size": 16},
}
FIXED = {"hidden_act": ("gelu",), "pruned_heads": ({}, None)}
# Options of training, and of the same network as a backbone.
UNUSED = (
    *GENERAL,
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    *("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names"),
)


def _module(name: str, config: Mapping[str, Any]) -> Dinov2:
    defaults = {key: getattr(Dinov2, key) for key in OPTIONS} | OF_CLASS[name]
    values = options(name, config, defaults, fixed=FIXED, unused=UNUSED)
    for key, default in defaults.items():
        if isinstance(default, int) and not isinstance(values[key], int):
            raise ValueError(f"{name}: {key} is {values[key]!r}, expected one whole number")
    return Dinov2(**values)


def _with_registers(module: Dinov2) -> bool:
    """Whether the class is Dinov2WithRegistersModel. ValueError for an interpolate_offset, which no class of transformers has."""
    if module.interpolate_offset:
        raise ValueError(f"Dinov2: interpolate_offset is {module.interpolate_offset}; expected 0, as in transformers")
    return module.num_register_tokens is not None


def _config(name: str, model_type: str, module: Dinov2) -> dict[str, Any]:
    _with_registers(module)
    return {"model_type": model_type} | {
        key: getattr(module, key) for key in {**dict.fromkeys(OPTIONS), **OF_CLASS[name]}
    }


def _format(name: str, model_type: str, registers: bool) -> Format:
    return Format(
        name,
        "transformers",
        Dinov2,
        functools.partial(_module, name),
        functools.partial(_config, name, model_type),
        lambda module: ROWS,
        lambda module: _with_registers(module) == registers,
    )


PLAIN = _format("Dinov2Model", "dinov2", False)
REGISTERS = _format("Dinov2WithRegistersModel", "dinov2_with_registers", True)
