"""The autoencoder of the latent-diffusion code: decoder.up counts from the finest level, diffusers' up_blocks from the coarsest.

Source: model.py of Rombach et al. 2022 (CompVis latent-diffusion).
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from ldm_jax.weights.single_file.family import Part
from ldm_jax.weights.single_file.measure import Shapes, count, size
from ldm_jax.weights.single_file.pairs import PIXEL, Pair, alike, under

RESNET = (*alike("norm1", "conv1", "norm2", "conv2"), Pair("nin_shortcut", "conv_shortcut"))
MIDDLE = (
    *under("block_1", "resnets.0", RESNET),
    *under(
        "attn_1",
        "attentions.0",
        (
            Pair("norm", "group_norm"),
            Pair("q", "to_q", PIXEL),
            Pair("k", "to_k", PIXEL),
            Pair("v", "to_v", PIXEL),
            Pair("proj_out", "to_out.0", PIXEL),
        ),
    ),
    *under("block_2", "resnets.1", RESNET),
)


def table(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The pairs of the autoencoder with this config of AutoencoderKL, without the prefix first_stage_model."""
    levels, layers = len(config.get("block_out_channels", (64,))), config.get("layers_per_block", 1)
    pairs = [*alike("quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        ends = (*alike("conv_in", "conv_out"), Pair("norm_out", "conv_norm_out"))
        pairs += under(half, half, (*ends, *under("mid", "mid_block", MIDDLE)))
    for i in range(levels):
        ldm, hf = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        for j in range(layers):
            pairs += under(f"{ldm}.block.{j}", f"{hf}.resnets.{j}", RESNET)
        pairs.append(Pair(f"{ldm}.downsample.conv", f"{hf}.downsamplers.0.conv"))
        ldm, hf = f"decoder.up.{levels - 1 - i}", f"decoder.up_blocks.{i}"
        for j in range(layers + 1):
            pairs += under(f"{ldm}.block.{j}", f"{hf}.resnets.{j}", RESNET)
        pairs.append(Pair(f"{ldm}.upsample.conv", f"{hf}.upsamplers.0.conv"))
    return tuple(pairs)


def config(shapes: Shapes, pixels: int, scaling: float) -> dict[str, Any]:
    """The config.json of the autoencoder of these shapes, whose images have `pixels` a side.

    `scaling` is the scaling_factor of latents of 4 channels: the autoencoders of SD and SDXL do not differ in shape.
    """
    levels, layers = count(shapes, "encoder.down."), count(shapes, "encoder.down.0.block.")
    last = (f"encoder.down.{i}.block.{layers - 1}.conv2.weight" for i in range(levels))
    options = {
        "_class_name": "AutoencoderKL",
        "sample_size": pixels,
        "in_channels": size(shapes, "encoder.conv_in.weight", 1),
        "out_channels": size(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": size(shapes, "decoder.conv_in.weight", 1),
        "block_out_channels": [size(shapes, name, 0) for name in last],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }
    return options | ({"scaling_factor": scaling} if options["latent_channels"] == 4 else {})


# Other names of the layers of the autoencoder's attention: for a while diffusers' script wrote these into single files, and older
# folders have them.
OLD_ATTENTION = re.compile(
    r"((?:en|de)coder\.mid\.attn_1\.)(group_norm|to_q|to_k|to_v|to_out\.0|query|key|value|proj_attn)(?=\.(?:weight|bias)$)"
)
OLD_NAMES = {
    "group_norm": "norm",
    **{f"to_{name}": name for name in "qkv"},
    **{name: name[0] for name in ("query", "key", "value")},
    **dict.fromkeys(("to_out.0", "proj_attn"), "proj_out"),
}


def renamed(name: str) -> str:
    """The name of a tensor of the autoencoder in the LDM layout, for any spelling of its attention."""
    return OLD_ATTENTION.sub(lambda match: match[1] + OLD_NAMES[match[2]], name)


# The first prefix is that of a whole model. The others are those of files with this network only: none, or one of another program.
PREFIXES = ("first_stage_model.", "", "model.", "ema.", "vae.")
MARK = "decoder.conv_in.weight"


def part(scaling: float, prefixes: tuple[str, ...] = PREFIXES) -> Part:
    """The autoencoder of a family, whose latents of 4 channels have the scale `scaling`."""
    return Part(prefixes, MARK, table, functools.partial(config, scaling=scaling), spelt=renamed)
