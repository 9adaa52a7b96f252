"""AutoencoderKL in diffusers' files <-> models/autoencoder_kl.py. The other autoencoders share the rows and functions that fit them."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.weights.format import Format, options
from ldm_jax.weights.kinds import CONV2D, DENSE, NORM
from ldm_jax.weights.layout import Row, under

OPTIONS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Facts for pipelines: the size of a tile, statistics of the latents beside scaling_factor, whether to avoid float16.
UNUSED = ("sample_size", "latents_mean", "latents_std", "force_upcast")
RESNET = (
    Row("norm1", "norm1", NORM),
    Row("conv1", "conv1", CONV2D),
    Row("time_emb_proj", "time_emb_proj", DENSE),
    Row("norm2", "norm2", NORM),
    Row("conv2", "conv2", CONV2D),
    Row("conv_shortcut", "conv_shortcut", CONV2D),
)
# The old spellings are those of files from before diffusers 0.18.
ATTENTION = (
    Row("group_norm", "group_norm", NORM),
    Row("attn/to_q", "to_q", DENSE, old=("query",)),
    Row("attn/to_k", "to_k", DENSE, old=("key",)),
    Row("attn/to_v", "to_v", DENSE, old=("value",)),
    Row("attn/to_out", "to_out.0", DENSE, old=("proj_attn",)),
)


def block(ours: str, theirs: str) -> tuple[Row, ...]:
    """The rows of one level: res-blocks, attentions and a resampling convolution."""
    return (
        *under(f"{ours}/resnets_{{j}}", f"{theirs}.resnets.{{j}}", RESNET),
        *under(f"{ours}/attentions_{{j}}", f"{theirs}.attentions.{{j}}", ATTENTION),
        Row(f"{ours}/downsamplers_0/conv", f"{theirs}.downsamplers.0.conv", CONV2D),
        Row(f"{ours}/upsamplers_0/conv", f"{theirs}.upsamplers.0.conv", CONV2D),
    )


def half(name: str) -> tuple[Row, ...]:
    """The rows of the encoder or the decoder."""
    rows = (
        Row("conv_in", "conv_in", CONV2D),
        *block("down_blocks_{i}", "down_blocks.{i}"),
        *block("up_blocks_{i}", "up_blocks.{i}"),
        *block("mid_block", "mid_block"),
        Row("conv_norm_out", "conv_norm_out", NORM),
        Row("conv_out", "conv_out", CONV2D),
    )
    return under(name, name, rows)


def table(module: AutoencoderKL) -> tuple[Row, ...]:
    """The rows of any AutoencoderKL."""
    return (
        *half("encoder"),
        *half("decoder"),
        Row("quant_conv", "quant_conv", CONV2D),
        Row("post_quant_conv", "post_quant_conv", CONV2D),
    )


def module(config: Mapping[str, Any]) -> AutoencoderKL:
    """The config.json of an AutoencoderKL -> our module."""
    return AutoencoderKL(**options("AutoencoderKL", config, OPTIONS, unused=UNUSED))


def written(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """The options `names` of our module. Types of blocks that are None there become the plain ones."""
    levels = len(module.block_out_channels)
    plain = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    values = {option: getattr(module, option) for option in names}
    return values | {option: types for option, types in plain.items() if values[option] is None}


def config(module: AutoencoderKL) -> dict[str, Any]:
    """Our module -> the options of an AutoencoderKL."""
    return written(module, OPTIONS)


KL = Format("AutoencoderKL", "diffusers", AutoencoderKL, module, config, table)
