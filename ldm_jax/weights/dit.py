"""DiTTransformer2DModel and PixArtTransformer2DModel in diffusers' files <-> models/dit.py.

In diffusers each block of a DiT has an embedder of the time and the label. Published files hold the same numbers in all of them,
because there was one embedder in training. PixArt's embedders of the resolution and the aspect ratio (in the 1024 px networks) are
not supported.
"""

from collections.abc import Mapping
from typing import Any

from ldm_jax.models.dit import DiT
from ldm_jax.weights.format import Format, options
from ldm_jax.weights.kinds import DENSE, patch
from ldm_jax.weights.layout import Row, under

SHARED = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "dropout": 0.0,
    "patch_size": 2,
}
DIT_OPTIONS = SHARED | {
    "out_channels": None,
    "sample_size": 32,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
PIXART_OPTIONS = SHARED | {
    "out_channels": 8,
    "sample_size": 128,
    "cross_attention_dim": 1152,
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
FIXED = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
}
# Options of Transformer2DModel, which both classes once were.
EARLY_FIXED = {"num_vector_embeds": (None,), "only_cross_attention": (False,), "double_self_attention": (False,)}
DIT_FIXED = FIXED | EARLY_FIXED | {"norm_type": ("ada_norm_zero",), "cross_attention_dim": (None,)}
PIXART_FIXED = (
    FIXED | EARLY_FIXED | {"norm_type": ("ada_norm_single",), "norm_eps": (1e-6,), "attention_type": ("default",)}
)
# upcast_attention: our softmax is always computed in f32. use_linear_projection is an option of Transformer2DModel for images that are
# not divided into patches.
UNUSED = ("norm_num_groups", "upcast_attention", "use_linear_projection")

MLP = (Row("linear_1", "linear_1", DENSE), Row("linear_2", "linear_2", DENSE))
BLOCK = (
    Row("attention/qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), DENSE),
    Row("attention/out", "attn1.to_out.0", DENSE),
    Row("mlp/linear_1", "ff.net.0.proj", DENSE),
    Row("mlp/linear_2", "ff.net.2", DENSE),
)
DIT_BLOCK = (*BLOCK, Row("adaln", "norm1.linear", DENSE))
PIXART_BLOCK = (
    *BLOCK,
    Row("adaln_table", "scale_shift_table"),
    Row("cross/q", "attn2.to_q", DENSE),
    Row("cross/kv", ("attn2.to_k", "attn2.to_v"), DENSE),
    Row("cross/out", "attn2.to_out.0", DENSE),
)


def embedders(name: str, depth: int) -> tuple[str, tuple[str, ...]]:
    """The torch names of one layer of DiT's embedders: (that of the first block, those of all others)."""
    first, *others = (f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(depth))
    return first, tuple(others)


def table(module: DiT) -> tuple[Row, ...]:
    """The rows of a DiTTransformer2DModel where adaln is 'block', and of a PixArtTransformer2DModel where it is 'single'."""
    blocks = ("blocks", "transformer_blocks.{*}") if module.scan_layers else ("blocks_{i}", "transformer_blocks.{i}")
    shared = (
        Row("patch", "pos_embed.proj", patch(module.patch_size)),
        # A constant that some versions store.
        Row(None, "pos_embed.pos_embed"),
    )
    if module.adaln == "single":
        return (
            *shared,
            *under("time", "adaln_single.emb.timestep_embedder", MLP),
            *under("text", "caption_projection", MLP),
            Row("adaln", "adaln_single.linear", DENSE),
            *under(*blocks, PIXART_BLOCK),
            Row("final_table", "scale_shift_table"),
            Row("final", "proj_out", DENSE),
        )
    time = [embedders(f"timestep_embedder.{layer}", module.depth) for layer in ("linear_1", "linear_2")]
    label, labels = embedders("class_embedder.embedding_table.weight", module.depth)
    return (
        *shared,
        *(Row(f"time/linear_{k}", first, DENSE, copies) for k, (first, copies) in enumerate(time, 1)),
        Row("label", label, copies=labels),
        *under(*blocks, DIT_BLOCK),
        Row("final_adaln", "proj_out_1", DENSE),
        Row("final", "proj_out_2", DENSE),
    )


def _module(values: Mapping[str, Any], **more: Any) -> DiT:
    return DiT(
        patch_size=values["patch_size"],
        hidden_size=values["num_attention_heads"] * values["attention_head_dim"],
        depth=values["num_layers"],
        num_heads=values["num_attention_heads"],
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        dropout=values["dropout"],
        pos_base=float(values["sample_size"] // values["patch_size"]),
        **more,
    )


def dit_module(config: Mapping[str, Any]) -> DiT:
    """The config.json of a DiTTransformer2DModel -> our module."""
    values = options("DiTTransformer2DModel", config, DIT_OPTIONS, fixed=DIT_FIXED, unused=UNUSED)
    return _module(values, num_classes=values["num_embeds_ada_norm"], time_shift=1.0, mlp_norm_eps=values["norm_eps"])


def pixart_module(config: Mapping[str, Any]) -> DiT:
    """The config.json of a PixArtTransformer2DModel -> our module."""
    name = "PixArtTransformer2DModel"
    values = options(name, config, PIXART_OPTIONS, fixed=PIXART_FIXED, unused=(*UNUSED, "num_embeds_ada_norm"))
    conditions = values["use_additional_conditions"]
    # In diffusers None means True where sample_size is 128.
    if conditions or (conditions is None and values["sample_size"] == 128):
        raise ValueError(
            f"{name}: use_additional_conditions is {conditions} at sample_size {values['sample_size']}, expected False"
        )
    width = values["num_attention_heads"] * values["attention_head_dim"]
    if values["cross_attention_dim"] != width:
        raise ValueError(f"{name}: cross_attention_dim is {values['cross_attention_dim']}, expected {width}")
    if values["caption_channels"] is None:
        raise ValueError(f"{name}: caption_channels is None, expected the width of the text states")
    scale = values["interpolation_scale"]
    return _module(
        values,
        adaln="single",
        text_dim=values["caption_channels"],
        text_pooled=False,
        pos_scale=float(max(values["sample_size"] // 64, 1) if scale is None else scale),
    )


def _config(module: DiT, fixed: Mapping[str, Any], name: str) -> dict[str, Any]:
    fixed = {
        "mlp_ratio": 4.0,
        "qk_norm": False,
        "cross_norm": False,
        "pos_embed": "sincos",
        "rope_theta": 0.0,
        "norm_eps": 1e-6,
        **fixed,
    }
    for option, value in fixed.items():
        if getattr(module, option) != value:
            raise ValueError(f"DiT: {option} is {getattr(module, option)!r}, {name} has {value!r} alone")
    if module.pos_base <= 0 or module.pos_base % 1:
        raise ValueError(
            f"DiT: pos_base is {module.pos_base}, {name} needs the patches a side that it was trained with: "
            "module.copy(pos_base=...)"
        )
    return {
        "num_attention_heads": module.num_heads,
        "attention_head_dim": module.hidden_size // module.num_heads,
        "in_channels": module.in_channels,
        "out_channels": module.out_channels or module.in_channels,
        "num_layers": module.depth,
        "dropout": module.dropout,
        "patch_size": module.patch_size,
        "sample_size": int(module.pos_base) * module.patch_size,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
    }


def dit_config(module: DiT) -> dict[str, Any]:
    """Our module -> the options of a DiTTransformer2DModel; ValueError naming one that it cannot express."""
    fixed = {"adaln": "block", "text_dim": 0, "time_shift": 1.0, "pos_scale": 1.0}
    return _config(module, fixed, "DiTTransformer2DModel") | {
        "num_embeds_ada_norm": module.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_eps": module.mlp_norm_eps,
    }


def pixart_config(module: DiT) -> dict[str, Any]:
    """Our module -> the options of a PixArtTransformer2DModel; ValueError naming one that it cannot express."""
    fixed = {"adaln": "single", "num_classes": 0, "time_shift": 0.0, "text_pooled": False, "mlp_norm_eps": 1e-6}
    return _config(module, fixed, "PixArtTransformer2DModel") | {
        "cross_attention_dim": module.hidden_size,
        "caption_channels": module.text_dim,
        "interpolation_scale": module.pos_scale,
        "use_additional_conditions": False,
        "norm_type": "ada_norm_single",
        "norm_eps": 1e-6,
    }


def early_module(config: Mapping[str, Any]) -> DiT:
    """The config.json of a Transformer2DModel, the name of both classes in early versions of diffusers -> our module."""
    by_norm = {"ada_norm_zero": dit_module, "ada_norm_single": pixart_module}
    norm = config.get("norm_type")
    if norm not in by_norm:
        raise ValueError(f"Transformer2DModel: norm_type is {norm!r}, expected {' or '.join(map(repr, by_norm))}")
    return by_norm[norm](config)


def early_config(module: DiT) -> dict[str, Any]:
    """Our module -> the options of the class that it is written as today."""
    return dit_config(module) if module.adaln == "block" else pixart_config(module)


DIT = Format(
    "DiTTransformer2DModel",
    "diffusers",
    DiT,
    dit_module,
    dit_config,
    table,
    lambda module: module.adaln == "block",
)
PIXART = Format(
    "PixArtTransformer2DModel",
    "diffusers",
    DiT,
    pixart_module,
    pixart_config,
    table,
    lambda module: module.adaln != "block",
)
# This class is read, and never written.
EARLY = Format("Transformer2DModel", "diffusers", DiT, early_module, early_config, table, lambda module: False)
