"""UNet2DConditionModel and UNet2DModel in diffusers' files <-> models/unet.py, with one table for both.

The two classes share the names of options, but not their defaults. Where an option has another meaning in each class, or only one class
has it, our module has a further option (see its docstring):

    ours                                 UNet2DConditionModel                   UNet2DModel
    time_embedding_type 'fourier'        'fourier'                              cannot
    time_embedding_type 'fourier_log'    cannot                                 'fourier'
    mid_block_layers (UNetMidBlock2D)    0                                      1
    downsample_type, upsample_type       'conv'                                 the option
    null_class                           counted in num_class_embeds            counted in num_class_embeds

`zero_init` keeps its default: it concerns the initialization only.
"""

from collections.abc import Mapping
from typing import Any

from ldm_jax.models.unet import UNet
from ldm_jax.models.unet_options import crosses
from ldm_jax.weights.autoencoder_kl import ATTENTION, RESNET
from ldm_jax.weights.format import Format, options
from ldm_jax.weights.kinds import CONV2D, DENSE, EMBEDDING, NORM, PIXEL
from ldm_jax.weights.layout import Row, under

# Option -> default, as UNet2DConditionModel has them.
SHARED = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
}
CONDITION_ALONE = {
    "only_cross_attention": False,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "class_embeddings_concat": False,
}
PLAIN_ALONE = {
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
    "add_attention": True,
}
CONDITION = SHARED | CONDITION_ALONE
# Options without a meaning for a network without text.
ATTENDING_TEXT = (
    "only_cross_attention",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "use_linear_projection",
    "projection_class_embeddings_input_dim",
    "addition_time_embed_dim",
)
PLAIN = (
    SHARED
    | {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        "block_out_channels": (224, 448, 672, 896),
    }
    | PLAIN_ALONE
)
CONDITION_FIXED = {
    "center_input_sample": (False,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
    "addition_embed_type": (None, "text_time"),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional", "fourier"),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
}
PLAIN_FIXED = {
    "center_input_sample": (False,),
    "mid_block_type": (None, "UNetMidBlock2D"),
    "class_embed_type": (None, "timestep", "identity"),
    "time_embedding_type": ("positional", "fourier"),
}
# upcast_attention: our softmax is always computed in f32. mid_block_only_cross_attention and addition_embed_type_num_heads are options
# of a mid block and an embedding that are refused.
CONDITION_UNUSED = (
    "sample_size",
    "upcast_attention",
    "mid_block_only_cross_attention",
    "addition_embed_type_num_heads",
)
PLAIN_UNUSED = ("sample_size", "num_train_timesteps")

TIMESTEP_MLP = tuple(Row(name, name, DENSE) for name in ("cond_proj", "linear_1", "linear_2"))


def transformer(module: UNet) -> tuple[Row, ...]:
    """The rows of a SpatialTransformer."""
    projection = DENSE if module.use_linear_projection else PIXEL
    block = (
        *(Row(name, name, NORM) for name in ("norm1", "norm2", "norm3")),
        *(Row(f"{a}/to_{n}", f"{a}.to_{n}", DENSE) for a in ("attn1", "attn2") for n in "qkv"),
        *(Row(f"{a}/to_out", f"{a}.to_out.0", DENSE) for a in ("attn1", "attn2")),
        Row("ff_in", "ff.net.0.proj", DENSE),
        Row("ff_out", "ff.net.2", DENSE),
    )
    return (
        Row("norm", "norm", NORM),
        Row("proj_in", "proj_in", projection),
        *under("transformer_blocks_{k}", "transformer_blocks.{k}", block),
        # With scan_layers, where there is more than one block.
        *under("transformer_blocks", "transformer_blocks.{*}", block),
        Row("proj_out", "proj_out", projection),
    )


def level(ours: str, theirs: str, module: UNet) -> tuple[Row, ...]:
    """The rows of one level of the way down or up, or of the middle."""
    rows = [
        *under("resnets_{j}", "resnets.{j}", RESNET),
        *under("attentions_{j}", "attentions.{j}", (*ATTENTION, *transformer(module))),
        # Of NCSN++.
        *under("resnet_down", "resnet_down", RESNET),
        *under("resnet_up", "resnet_up", RESNET),
        Row("skip_norm", "skip_norm", NORM),
        Row("skip_conv", "skip_conv", CONV2D),
    ]
    for name in ("downsamplers", "upsamplers"):
        rows += under(f"{name}_0", f"{name}.0", RESNET)
        # Early DDPM files hold each resampling convolution twice, under two names.
        rows.append(Row(f"{name}_0/conv", f"{name}.0.conv", CONV2D, old=(f"{name}.0.Conv2d_0",)))
    return under(ours, theirs, rows)


def table(module: UNet) -> tuple[Row, ...]:
    """The rows of any UNet."""
    return (
        Row("conv_in", "conv_in", CONV2D),
        Row("time_proj", "time_proj.weight", old=("time_proj.W",)),
        *(
            row
            for name in ("time_embedding", "class_embedding", "add_embedding")
            for row in under(name, name, TIMESTEP_MLP)
        ),
        Row("class_embedding", "class_embedding", EMBEDDING),
        Row("class_embedding", "class_embedding", DENSE),
        Row("encoder_hid_proj", "encoder_hid_proj", DENSE),
        *level("down_blocks_{i}", "down_blocks.{i}", module),
        *level("mid_block", "mid_block", module),
        *level("up_blocks_{i}", "up_blocks.{i}", module),
        Row("conv_norm_out", "conv_norm_out", NORM),
        Row("conv_out", "conv_out", CONV2D),
    )


def _one_width(name: str, option: str, value: Any) -> Any:
    """The number in a list with one number for each level; ValueError where they differ."""
    if not isinstance(value, tuple):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{name}: {option} is {value}, expected one number for all levels")
    return value[0]


def _without(name: str, values: Mapping[str, Any], word: str) -> None:
    """Raise ValueError for a block type that the class cannot run: one whose name contains `word`."""
    for option in ("down_block_types", "up_block_types"):
        for block in values[option]:
            if word in block:
                raise ValueError(f"{name}: {option} contains {block!r}, which that class cannot run")


def _heads_in_order(name: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError for AttnUpBlock2D with heads that differ by level: the class reads them in the order of the way down there."""
    heads = values["attention_head_dim"]
    if isinstance(heads, tuple) and heads != heads[::-1] and "AttnUpBlock2D" in values["up_block_types"]:
        raise ValueError(f"{name}: attention_head_dim is {heads}, expected one number with AttnUpBlock2D")


def condition_module(config: Mapping[str, Any]) -> UNet:
    """The config.json of a UNet2DConditionModel -> our module."""
    name = "UNet2DConditionModel"
    values = options(name, config, CONDITION, fixed=CONDITION_FIXED, unused=CONDITION_UNUSED)
    values["cross_attention_dim"] = _one_width(name, "cross_attention_dim", values["cross_attention_dim"])
    _without(name, values, "Skip")
    _heads_in_order(name, values)
    depths = values["transformer_layers_per_block"]
    if isinstance(depths, tuple) and not all(isinstance(depth, int) for depth in depths):
        raise ValueError(f"{name}: transformer_layers_per_block is {depths}, expected one number for each level")
    if values["encoder_hid_dim"] is None and config.get("encoder_hid_dim_type") is not None:
        raise ValueError(f"{name}: encoder_hid_dim is None, expected a number with encoder_hid_dim_type")
    middle = {"mid_block_layers": 0} if values["mid_block_type"] == "UNetMidBlock2D" else {}
    return UNet(**values, **middle)


def plain_module(config: Mapping[str, Any]) -> UNet:
    """The config.json of a UNet2DModel -> our module."""
    values = options("UNet2DModel", config, PLAIN, fixed=PLAIN_FIXED, unused=PLAIN_UNUSED)
    _without("UNet2DModel", values, "Cross")
    if values["time_embedding_type"] == "fourier":
        values["time_embedding_type"] = "fourier_log"
    return UNet(**values)


def _same(module: UNet, allowed: Mapping[str, tuple], name: str) -> None:
    for option, values in allowed.items():
        if getattr(module, option) not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(
                f"UNet: {option} is {getattr(module, option)!r}, {name} has no such option: expected {expected}"
            )


def _options_of(module: UNet, names: Mapping[str, Any]) -> dict[str, Any]:
    config = {option: getattr(module, option) for option in names}
    if module.null_class:
        config["num_class_embeds"] += 1
    return config


def condition_config(module: UNet) -> dict[str, Any]:
    """Our module -> the options of a UNet2DConditionModel; ValueError naming one that it cannot express."""
    name = "UNet2DConditionModel"
    fixed = {"downsample_type": ("conv",), "upsample_type": ("conv",), "time_embedding_type": ("positional", "fourier")}
    if module.mid_block_type == "UNetMidBlock2D":
        fixed["mid_block_layers"] = (0,)
    _same(module, fixed, name)
    config = _options_of(module, CONDITION)
    _without(name, config, "Skip")
    _heads_in_order(name, config)
    if not crosses(module):
        config["cross_attention_dim"] = config["cross_attention_dim"] or CONDITION["cross_attention_dim"]
    return config


def plain_config(module: UNet) -> dict[str, Any]:
    """Our module -> the options of a UNet2DModel; ValueError naming one that it cannot express."""
    fixed = {option: (CONDITION[option],) for option in CONDITION_ALONE if option not in ATTENDING_TEXT}
    fixed |= {option: PLAIN_FIXED[option] for option in ("class_embed_type", "mid_block_type")}
    fixed["mid_block_layers"] = (1,)
    fixed["time_embedding_type"] = ("positional", "fourier_log")
    _same(module, fixed, "UNet2DModel")
    config = _options_of(module, PLAIN)
    channels = (module.in_channels, module.out_channels)
    if channels != (3, 3) and any("Skip" in block for block in (*module.down_block_types, *module.up_block_types)):
        raise ValueError(f"UNet: in and out channels are {channels}, expected 3 and 3 with UNet2DModel's Skip blocks")
    if config["time_embedding_type"] == "fourier_log":
        config["time_embedding_type"] = "fourier"
    return config


def conditioned(module: UNet) -> bool:
    """Whether a module is written as a UNet2DConditionModel; otherwise UNet2DModel computes what it does."""
    return (
        crosses(module)
        or module.encoder_hid_dim is not None
        or module.addition_embed_type is not None
        or module.class_embed_type in ("projection", "simple_projection")
        or module.class_embeddings_concat
        or module.time_embedding_type == "fourier"
        or (module.mid_block_type == "UNetMidBlock2D" and module.mid_block_layers == 0)
        or module.time_cond_proj_dim is not None
        or module.conv_in_kernel != 3
        or module.conv_out_kernel != 3
        or not isinstance(module.layers_per_block, int)
        or not isinstance(module.attention_head_dim, (int, type(None)))
    )


CONDITIONED = Format("UNet2DConditionModel", "diffusers", UNet, condition_module, condition_config, table, conditioned)
UNCONDITIONED = Format(
    "UNet2DModel", "diffusers", UNet, plain_module, plain_config, table, lambda module: not conditioned(module)
)
