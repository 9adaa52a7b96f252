"""The U-Net of the latent-diffusion code: input_blocks, middle_block and output_blocks are lists where diffusers has levels.

With L resnets a level, the lists hold, for level i of the way down and of the way up,

    input_blocks.n     n = 0: conv_in;  n = 1 + (L + 1) i + j: resnet j (.0), its attention (.1); j = L: halving convolution (.0.op)
    output_blocks.n    n = (L + 1) i + j, j <= L: resnet (.0), attention (.1); j = L: then the doubling convolution (.2, or .1)

Source: openaimodel.py of Rombach et al. 2022 (CompVis latent-diffusion) and of Podell et al. 2023 (Stability generative-models).
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from ldm_jax.weights.single_file.family import Part
from ldm_jax.weights.single_file.measure import Shapes, count, shape_of, size
from ldm_jax.weights.single_file.pairs import Pair, alike, under

RESNET = (
    Pair("in_layers.0", "norm1"),
    Pair("in_layers.2", "conv1"),
    Pair("emb_layers.1", "time_emb_proj"),
    Pair("out_layers.0", "norm2"),
    Pair("out_layers.3", "conv2"),
    Pair("skip_connection", "conv_shortcut"),
)
TRANSFORMER_BLOCK = alike(
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")),
)
CROSS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


def transformer(depth: int) -> tuple[Pair, ...]:
    """The pairs of a SpatialTransformer of `depth` blocks, which have the same names on both sides."""
    blocks = (under(f"transformer_blocks.{k}", f"transformer_blocks.{k}", TRANSFORMER_BLOCK) for k in range(depth))
    return (*alike("norm", "proj_in", "proj_out"), *(pair for block in blocks for pair in block))


def table(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The pairs of the U-Net with this config of UNet2DConditionModel, without the prefix model.diffusion_model.

    Raises ValueError for a block that this layout does not have, and for depths that differ within a level.
    """
    down, up = (
        tuple(config.get(f"{path}_block_types", default))
        for path, default in (
            ("down", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)),
            ("up", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3),
        )
    )
    for name in (*down, *up):
        if name not in CROSS:
            raise ValueError(f"single file: the U-Net has a {name}, expected one of {', '.join(CROSS)}")
    layers = _per_level("layers_per_block", config.get("layers_per_block", 2), len(down))
    depth = _per_level("transformer_layers_per_block", config.get("transformer_layers_per_block", 1), len(down))

    pairs = [
        Pair("time_embed.0", "time_embedding.linear_1"),
        Pair("time_embed.2", "time_embedding.linear_2"),
        Pair("input_blocks.0.0", "conv_in"),
        Pair("out.0", "conv_norm_out"),
        Pair("out.2", "conv_out"),
        *under("middle_block.0", "mid_block.resnets.0", RESNET),
        *under("middle_block.1", "mid_block.attentions.0", transformer(depth[-1])),
        *under("middle_block.2", "mid_block.resnets.1", RESNET),
    ]
    if config.get("addition_embed_type") == "text_time":
        pairs += under("label_emb.0", "add_embedding", (Pair("0", "linear_1"), Pair("2", "linear_2")))
    n = 1
    for i, name in enumerate(down):
        for j in range(layers[i]):
            pairs += under(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", RESNET)
            if CROSS[name]:
                pairs += under(f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}", transformer(depth[i]))
            n += 1
        if i < len(down) - 1:
            pairs.append(Pair(f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
            n += 1
    n = 0
    for i, name in enumerate(up):
        for j in range(layers[-1 - i] + 1):
            pairs += under(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", RESNET)
            if CROSS[name]:
                pairs += under(f"output_blocks.{n}.1", f"up_blocks.{i}.attentions.{j}", transformer(depth[-1 - i]))
            n += 1
        if i < len(up) - 1:
            place = 2 if CROSS[name] else 1
            pairs.append(Pair(f"output_blocks.{n - 1}.{place}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
    return tuple(pairs)


def _per_level(option: str, value: int | Iterable[int], levels: int) -> tuple[int, ...]:
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels or not all(isinstance(v, int) for v in values):
        raise ValueError(f"single file: {option} is {value}, expected one number or one for each of {levels} levels")
    return values


def config(shapes: Shapes, pixels: int, heads: int | None = None, sizes: bool = False) -> dict[str, Any]:
    """The config.json of the U-Net of these shapes, whose images have `pixels` a side.

    heads  in every attention; None: one for 64 channels
    sizes  whether it takes pooled text and the sizes of the image (SDXL)

    Raises ValueError for levels that diffusers has no config for.
    """
    levels: list[list[tuple[int, int]]] = [[]]  # (channels, depth of the transformer) of each resnet of each level
    for n in range(1, count(shapes, "input_blocks.")):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
        else:
            channels = size(shapes, f"input_blocks.{n}.0.out_layers.3.weight", 0)
            levels[-1].append((channels, count(shapes, f"input_blocks.{n}.1.transformer_blocks.")))
    middle = count(shapes, "middle_block.1.transformer_blocks.")
    regular = all(len(set(level)) == 1 and len(level) == len(levels[0]) for level in levels)
    if not regular or not middle or levels[-1][0][1] not in (0, middle):
        raise ValueError(
            f"single file: the resnets of the U-Net's levels have (channels, transformer depth) {levels}, its middle depth "
            f"{middle}; expected as many alike in every level, and the middle as deep as the lowest level"
        )
    channels, depths = zip(*(level[0] for level in levels))
    # The config also has a depth for a level without attention. The middle has the depth of the lowest level.
    nominal = (*(d or 1 for d in depths[:-1]), middle)
    options = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": pixels // 8,
        "in_channels": size(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": size(shapes, "out.2.weight", 0),
        "block_out_channels": list(channels),
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        "cross_attention_dim": size(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        # In diffusers this is the number of heads, in spite of its name.
        "attention_head_dim": heads or [max(1, c // 64) for c in channels],
        "use_linear_projection": len(shape_of(shapes, "middle_block.1.proj_in.weight")) == 2,
        "transformer_layers_per_block": middle if {*depths, middle} <= {0, middle} else list(nominal),
    }
    if sizes:
        options |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": size(shapes, "label_emb.0.0.weight", 1),
        }
    return options


# The first prefix is that of a whole model. The others are those of files with this network only: none, or one of another program.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "", "model.", "ema.")
MARK = "input_blocks.0.0.weight"


def part(heads: int | None = None, sizes: bool = False) -> Part:
    """The U-Net of a family; the arguments are those of `config`."""
    return Part(PREFIXES, MARK, table, functools.partial(config, heads=heads, sizes=sizes))
