"""What the options of a U-Net mean: the types of blocks, options with one value for each level, and the entries of `cond`.

Each function takes a module with the options of models/unet.UNet.
"""

from typing import Any

# block type -> (attention, resampling). 'option' stands for downsample_type or upsample_type, 'skip' for a level of ncsnpp.py.
DOWN = {
    "DownBlock2D": ("none", "conv"),
    "ResnetDownsampleBlock2D": ("none", "resnet"),
    "AttnDownBlock2D": ("self", "option"),
    "CrossAttnDownBlock2D": ("cross", "conv"),
    "SkipDownBlock2D": ("none", "skip"),
    "AttnSkipDownBlock2D": ("self", "skip"),
}
UP = {
    "UpBlock2D": ("none", "conv"),
    "ResnetUpsampleBlock2D": ("none", "resnet"),
    "AttnUpBlock2D": ("self", "option"),
    "CrossAttnUpBlock2D": ("cross", "conv"),
    "SkipUpBlock2D": ("none", "skip"),
    "AttnSkipUpBlock2D": ("self", "skip"),
}
MID = {"UNetMidBlock2D": "self", "UNetMidBlock2DCrossAttn": "cross"}


def per_level(module: Any, name: str) -> tuple:
    """The option `name` as one value for each level; ValueError for a list of another length."""
    value, levels = getattr(module, name), len(module.block_out_channels)
    if not isinstance(value, (tuple, list)):
        return (value,) * levels
    if len(value) != levels:
        raise ValueError(f"{name} has {len(value)} entries: expected {levels}, one for each block_out_channels")
    return tuple(value)


def check(module: Any) -> None:
    """Raise ValueError for an option with an unknown value, and for options that exclude one another. It names the option."""
    for name, allowed in (("down_block_types", DOWN), ("up_block_types", UP)):
        if isinstance(getattr(module, name), str):
            raise ValueError(f"{name} is {getattr(module, name)!r}: expected a tuple of block types")
        for block in per_level(module, name):
            if block not in allowed:
                raise ValueError(f"{name} contains {block!r}: expected one of {', '.join(allowed)}")
    if module.mid_block_type is not None and module.mid_block_type not in MID:
        raise ValueError(f"mid_block_type is {module.mid_block_type!r}: expected None or one of {', '.join(MID)}")
    for name, allowed in (
        ("act_fn", ("silu", "swish")),
        ("downsample_type", ("conv", "resnet")),
        ("upsample_type", ("conv", "resnet")),
        ("time_embedding_type", ("positional", "fourier", "fourier_log")),
        ("class_embed_type", (None, "timestep", "identity", "projection", "simple_projection")),
        ("addition_embed_type", (None, "text_time")),
    ):
        if getattr(module, name) not in allowed:
            raise ValueError(f"{name} is {getattr(module, name)!r}: expected one of {allowed}")
    skip = [resample == "skip" for _, resample in (DOWN[block] for block in module.down_block_types)]
    skip_up = [resample == "skip" for _, resample in (UP[block] for block in module.up_block_types)]
    if skip != sorted(skip, reverse=True) or skip_up != sorted(skip_up):
        raise ValueError(
            "Skip blocks carry the image from the first level down and the output up to it: expected none after another "
            f"kind of block in down_block_types {module.down_block_types} or before one in up_block_types {module.up_block_types}"
        )
    if module.norm_num_groups is None and not all(skip + skip_up):
        raise ValueError("norm_num_groups is None: expected a number, unless all blocks are Skip blocks")
    for width in module.block_out_channels:
        if module.norm_num_groups is not None and width % module.norm_num_groups:
            raise ValueError(f"norm_num_groups {module.norm_num_groups} does not divide block_out_channels {width}")
    if module.null_class and (module.num_class_embeds is None or module.class_embed_type is not None):
        raise ValueError("null_class needs num_class_embeds and no class_embed_type: only a class table has a null row")


def crosses(module: Any) -> bool:
    """Whether the network attends to text: whether one of its blocks is CrossAttn*."""
    blocks = (*module.down_block_types, *module.up_block_types, module.mid_block_type or "")
    return any("Cross" in block for block in blocks)


def cross_attentions(module: Any) -> tuple[str, ...]:
    """The paths of the blocks that attend to text: first those of the way down, then of the middle, then of the way up."""
    levels = len(module.block_out_channels)
    layers, depths = per_level(module, "layers_per_block"), per_level(module, "transformer_layers_per_block")
    up_depths = tuple(module.reverse_transformer_layers_per_block or depths[::-1])
    blocks = [
        (f"down_blocks_{i}", DOWN[name][0], layers[i], depths[i]) for i, name in enumerate(module.down_block_types)
    ]
    blocks.append(("mid_block", MID.get(module.mid_block_type), 1, depths[-1]))
    blocks += [
        (f"up_blocks_{i}", UP[name][0], layers[levels - 1 - i] + 1, up_depths[i])
        for i, name in enumerate(module.up_block_types)
    ]
    return tuple(
        f"{block}/attentions_{j}/transformer_blocks_{k}"
        for block, attention, count, depth in blocks
        if attention == "cross"
        for j in range(count)
        for k in range(depth)
    )


def needs(module: Any) -> tuple[str, ...]:
    """The entries that `cond` must have."""
    return (
        *(("text",) if crosses(module) else ()),
        *(("label",) if module.class_embed_type is not None or module.num_class_embeds is not None else ()),
        *(("time_ids", "pooled") if module.addition_embed_type == "text_time" else ()),
    )
