"""Whole models in one file, as the latent-diffusion code names tensors <-> a network at a time, as diffusers and transformers do.

    model.diffusion_model.*            U-Net: input_blocks, middle_block, output_blocks are lists where diffusers has levels
    first_stage_model.*                autoencoder: decoder.up counts from the finest level, diffusers' up_blocks from the coarsest
    cond_stage_model.transformer.*     CLIP-L (SD 1; SDXL: conditioner.embedders.0.transformer), in transformers' names
    cond_stage_model.model.*           open_clip's (SD 2; SDXL: conditioner.embedders.1.model, its refiner: .0.model)

With L resnets a level, the lists of the U-Net hold, for level i of the way down and of the way up,

    input_blocks.n     n = 0: conv_in;  n = 1 + (L + 1) i + j: resnet j (.0), its attention (.1); j = L: halving convolution (.0.op)
    output_blocks.n    n = (L + 1) i + j, j <= L: resnet (.0), attention (.1); j = L: then the doubling convolution (.2, or .1)

Sources: openaimodel.py and model.py of Rombach et al. 2022 (CompVis latent-diffusion), Podell et al. 2023 (Stability
generative-models), open_clip's transformer.py. Tables of `Pair`s serve both directions; a tensor is not read when it is renamed.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.weights.layout import Tensor, listed
from ldm_jax.weights.leftovers import SD2_LAYERS, UNUSED, left_out, renamed


class Pair(NamedTuple):
    """One line of a table: a module (its weight and its bias), or a whole tensor, under both names.

    layout   same        one array under two names
             pixel       a linear map of pixels: weight[O, I, 1, 1] in the single file, weight[O, I] in the folder
             transposed  [I, O] in the single file, [O, I] in the folder
             joined      one tensor in the single file, one after the other along axis 0: several in the folder
    """

    ldm: str
    hf: str | tuple[str, ...]
    layout: str = "same"

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the folder, of which only a joined tensor has several."""
        return (self.hf,) if isinstance(self.hf, str) else self.hf


def under(ldm: str, hf: str, pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """`pairs` one level down: the prefixes, with a dot, put before every name."""
    return tuple(Pair(f"{ldm}.{pair.ldm}", tuple(f"{hf}.{name}" for name in pair.names), pair.layout) for pair in pairs)


def _alike(*names: str) -> tuple[Pair, ...]:
    return tuple(Pair(name, name) for name in names)


# ---- U-Net ----

UNET_RESNET = (
    Pair("in_layers.0", "norm1"),
    Pair("in_layers.2", "conv1"),
    Pair("emb_layers.1", "time_emb_proj"),
    Pair("out_layers.0", "norm2"),
    Pair("out_layers.3", "conv2"),
    Pair("skip_connection", "conv_shortcut"),
)
TRANSFORMER_BLOCK = _alike(
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")),
)
CROSS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


def transformer(depth: int) -> tuple[Pair, ...]:
    """A SpatialTransformer of `depth` blocks, whose names the two libraries share."""
    blocks = (under(f"transformer_blocks.{k}", f"transformer_blocks.{k}", TRANSFORMER_BLOCK) for k in range(depth))
    return (*_alike("norm", "proj_in", "proj_out"), *(pair for block in blocks for pair in block))


def unet(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The U-Net of a config of UNet2DConditionModel, without the prefix model.diffusion_model.

    Raises ValueError for a block that this layout does not have, and for a depth given layer by layer.
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
        *under("middle_block.0", "mid_block.resnets.0", UNET_RESNET),
        *under("middle_block.1", "mid_block.attentions.0", transformer(depth[-1])),
        *under("middle_block.2", "mid_block.resnets.1", UNET_RESNET),
    ]
    if config.get("addition_embed_type") == "text_time":
        pairs += under("label_emb.0", "add_embedding", (Pair("0", "linear_1"), Pair("2", "linear_2")))
    n = 1
    for i, name in enumerate(down):
        for j in range(layers[i]):
            pairs += under(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", UNET_RESNET)
            if CROSS[name]:
                pairs += under(f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}", transformer(depth[i]))
            n += 1
        if i < len(down) - 1:
            pairs.append(Pair(f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
            n += 1
    n = 0
    for i, name in enumerate(up):
        for j in range(layers[-1 - i] + 1):
            pairs += under(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", UNET_RESNET)
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


# ---- autoencoder ----

VAE_RESNET = (*_alike("norm1", "conv1", "norm2", "conv2"), Pair("nin_shortcut", "conv_shortcut"))
VAE_MIDDLE = (
    *under("block_1", "resnets.0", VAE_RESNET),
    *under(
        "attn_1",
        "attentions.0",
        (
            Pair("norm", "group_norm"),
            Pair("q", "to_q", "pixel"),
            Pair("k", "to_k", "pixel"),
            Pair("v", "to_v", "pixel"),
            Pair("proj_out", "to_out.0", "pixel"),
        ),
    ),
    *under("block_2", "resnets.1", VAE_RESNET),
)


def vae(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The autoencoder of a config of AutoencoderKL, without the prefix first_stage_model."""
    levels, layers = len(config.get("block_out_channels", (64,))), config.get("layers_per_block", 1)
    pairs = [*_alike("quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        ends = (*_alike("conv_in", "conv_out"), Pair("norm_out", "conv_norm_out"))
        pairs += under(half, half, (*ends, *under("mid", "mid_block", VAE_MIDDLE)))
    for i in range(levels):
        ldm, hf = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        for j in range(layers):
            pairs += under(f"{ldm}.block.{j}", f"{hf}.resnets.{j}", VAE_RESNET)
        pairs.append(Pair(f"{ldm}.downsample.conv", f"{hf}.downsamplers.0.conv"))
        ldm, hf = f"decoder.up.{levels - 1 - i}", f"decoder.up_blocks.{i}"
        for j in range(layers + 1):
            pairs += under(f"{ldm}.block.{j}", f"{hf}.resnets.{j}", VAE_RESNET)
        pairs.append(Pair(f"{ldm}.upsample.conv", f"{hf}.upsamplers.0.conv"))
    return tuple(pairs)


# ---- text encoders ----

CLIP_LAYER = _alike(
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)
OPEN_CLIP_LAYER = (
    Pair("ln_1", "layer_norm1"),
    *(
        Pair(f"attn.in_proj_{part}", tuple(f"self_attn.{n}_proj.{part}" for n in "qkv"), "joined")
        for part in ("weight", "bias")
    ),
    Pair("attn.out_proj", "self_attn.out_proj"),
    Pair("ln_2", "layer_norm2"),
    Pair("mlp.c_fc", "mlp.fc1"),
    Pair("mlp.c_proj", "mlp.fc2"),
)


def clip(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """CLIP-L of a config of CLIPTextModel, below text_model in both."""
    pairs = [
        Pair(name, f"text_model.{name}")
        for name in ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm")
    ]
    for i in range(config.get("num_hidden_layers", 12)):
        pairs += under(f"encoder.layers.{i}", f"text_model.encoder.layers.{i}", CLIP_LAYER)
    return tuple(pairs)


def open_clip_states(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """open_clip's text tower, of a config of CLIPTextModel: SD 2 makes no use of its projection."""
    pairs = [
        Pair("token_embedding", "text_model.embeddings.token_embedding"),
        Pair("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Pair("ln_final", "text_model.final_layer_norm"),
    ]
    for i in range(config.get("num_hidden_layers", 12)):
        pairs += under(f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}", OPEN_CLIP_LAYER)
    return tuple(pairs)


def open_clip(config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """open_clip's text tower with its projection, of a config of CLIPTextModelWithProjection."""
    return (*open_clip_states(config), Pair("text_projection", "text_projection.weight", "transposed"))


# ---- what a file may hold ----


class Part(NamedTuple):
    """A network in the file: prefixes of its names (the first is the one written), a tensor it always has, its table."""

    prefixes: tuple[str, ...]
    mark: str
    table: Callable[[Mapping[str, Any]], tuple[Pair, ...]]


def _clip(prefix: str) -> Part:
    # Early conversions of SD 1 lack text_model.
    return Part((f"{prefix}text_model.", prefix), "embeddings.token_embedding.weight", clip)


def _open_clip(prefix: str, table: Callable = open_clip) -> Part:
    return Part((prefix,), "token_embedding.weight", table)


class Family(NamedTuple):
    """What the kinds of one release share.

    context   width of the text's states, by which a file is recognised
    heads     in every attention of the U-Net; None: one for 64 channels
    size      of its images, in pixels
    scaling   of the latents: the autoencoders of SD and SDXL do not differ in shape
    """

    context: int | None
    heads: int | None
    size: int
    scaling: float
    encoders: dict[str, Part]


class Kind(NamedTuple):
    """One kind of file: its family, the channels that its U-Net reads, its published scheduler and prediction type."""

    family: str
    channels: int
    scheduler: dict[str, Any]
    prediction: str = "epsilon"


# The others than the first: a file with this network alone, bare or within a program's own.
NETWORKS = {
    "unet": Part(("model.diffusion_model.", "diffusion_model.", "", "model.", "ema."), "input_blocks.0.0.weight", unet),
    "vae": Part(("first_stage_model.", "", "model.", "ema.", "vae."), "decoder.conv_in.weight", vae),
}
SDXL_ENCODERS = {
    "text_encoder": _clip("conditioner.embedders.0.transformer."),
    "text_encoder_2": _open_clip("conditioner.embedders.1.model."),
}
FAMILIES = {
    "sd1": Family(768, 8, 512, 0.18215, {"text_encoder": _clip("cond_stage_model.transformer.")}),
    "sd2": Family(1024, None, 512, 0.18215, {"text_encoder": _open_clip("cond_stage_model.model.", open_clip_states)}),
    "sdxl": Family(2048, None, 1024, 0.13025, SDXL_ENCODERS),
    "sdxl_refiner": Family(1280, None, 1024, 0.13025, {"text_encoder_2": _open_clip("conditioner.embedders.0.model.")}),
    "vae": Family(None, None, 512, 0.18215, {}),
}
PNDM = {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
DDIM = {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
EULER_ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "linspace"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
KINDS = {
    "sd1": Kind("sd1", 4, PNDM),
    "sd1_inpaint": Kind("sd1", 9, DDIM),
    "sd1_pix2pix": Kind("sd1", 8, EULER_ANCESTRAL),
    # The base model of 512 pixels predicts eps, the one of 768 v, and the files do not say: v is diffusers' choice too.
    "sd2": Kind("sd2", 4, DDIM, "v_prediction"),
    "sd2_inpaint": Kind("sd2", 9, DDIM),
    "sd2_depth": Kind("sd2", 5, DDIM),
    "sdxl": Kind("sdxl", 4, EULER),
    "sdxl_inpaint": Kind("sdxl", 9, EULER),
    "sdxl_pix2pix": Kind("sdxl", 8, EULER),
    "sdxl_refiner": Kind("sdxl_refiner", 4, EULER),
    "vae": Kind("vae", 0, {}),  # an autoencoder alone
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# ---- what the shapes tell ----

Shapes = Mapping[str, tuple[int, ...]]


def _prefix(part: Part, names: Collection[str]) -> str | None:
    """The prefix that the network has among these names; None: it is not there."""
    return next((prefix for prefix in part.prefixes if prefix + part.mark in names), None)


def _below(prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name[len(prefix) :]: value for name, value in names.items() if name.startswith(prefix)}


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"single file: no tensor {name}, by which the network is measured")
    return tuple(shapes[name])


def _size(shapes: Shapes, name: str, axis: int) -> int:
    shape = _shape(shapes, name)
    if len(shape) <= axis:
        raise ValueError(f"single file: {name} is {list(shape)}, expected at least {axis + 1} dimensions")
    return shape[axis]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many entries the list `prefix` has."""
    return len({name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)})


def identify(shapes: Shapes) -> str:
    """The kind (of KINDS) of the file whose tensors have these names and shapes.

    Raises ValueError listing the first names if they are neither a U-Net's nor an autoencoder's of this layout, and for a
    U-Net that no kind has.
    """
    prefix = _prefix(NETWORKS["unet"], shapes)
    if prefix is None:
        if _prefix(NETWORKS["vae"], shapes) is not None:
            return "vae"
        marks = " or ".join(part.prefixes[0] + part.mark for part in NETWORKS.values())
        raise ValueError(f"single file: no {marks} among its {len(shapes)} tensors: {listed(shapes)}")
    channels = _size(shapes, prefix + NETWORKS["unet"].mark, 1)
    context = next((_size(shapes, name, 1) for name in shapes if name.endswith("attn2.to_k.weight")), None)
    for name, kind in KINDS.items():
        if (FAMILIES[kind.family].context, kind.channels) == (context, channels):
            return name
    known = (f"{FAMILIES[k.family].context} and {k.channels} ({name})" for name, k in KINDS.items() if k.channels)
    raise ValueError(
        f"single file: the U-Net attends to {context} channels of text and reads {channels} of the latent, expected one of "
        + ", ".join(known)
    )


def _unet_config(shapes: Shapes, family: str, size: int) -> dict[str, Any]:
    levels: list[list[tuple[int, int]]] = [[]]  # (channels, depth of the transformer) of each resnet of each level
    for n in range(1, _count(shapes, "input_blocks.")):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
        else:
            channels = _size(shapes, f"input_blocks.{n}.0.out_layers.3.weight", 0)
            levels[-1].append((channels, _count(shapes, f"input_blocks.{n}.1.transformer_blocks.")))
    middle = _count(shapes, "middle_block.1.transformer_blocks.")
    regular = all(len(set(level)) == 1 and len(level) == len(levels[0]) for level in levels)
    if not regular or not middle or levels[-1][0][1] not in (0, middle):
        raise ValueError(
            f"single file: the resnets of the U-Net's levels have (channels, transformer depth) {levels}, its middle depth "
            f"{middle}; expected as many alike in every level, and the middle as deep as the lowest level"
        )
    channels, depths = zip(*(level[0] for level in levels))
    # A level without attention has a depth all the same, and the middle that of the lowest level.
    nominal = (*(d or 1 for d in depths[:-1]), middle)
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size // 8,
        "in_channels": _size(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": _size(shapes, "out.2.weight", 0),
        "block_out_channels": list(channels),
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        "cross_attention_dim": _size(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        # By this name diffusers means the number of heads.
        "attention_head_dim": FAMILIES[family].heads or [max(1, c // 64) for c in channels],
        "use_linear_projection": len(_shape(shapes, "middle_block.1.proj_in.weight")) == 2,
        "transformer_layers_per_block": middle if {*depths, middle} <= {0, middle} else list(nominal),
    }
    if family in ("sdxl", "sdxl_refiner"):
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": _size(shapes, "label_emb.0.0.weight", 1),
        }
    return config


def _vae_config(shapes: Shapes, family: str, size: int) -> dict[str, Any]:
    levels, layers = _count(shapes, "encoder.down."), _count(shapes, "encoder.down.0.block.")
    last = (f"encoder.down.{i}.block.{layers - 1}.conv2.weight" for i in range(levels))
    config = {
        "_class_name": "AutoencoderKL",
        "sample_size": size,
        "in_channels": _size(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _size(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _size(shapes, "decoder.conv_in.weight", 1),
        "block_out_channels": [_size(shapes, name, 0) for name in last],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }
    return config | ({"scaling_factor": FAMILIES[family].scaling} if config["latent_channels"] == 4 else {})


def _text_config(shapes: Shapes, family: str, table: Callable) -> dict[str, Any]:
    tokens, positions, layers, first = (
        ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.", "mlp.fc1")
        if table is clip
        else ("token_embedding.weight", "positional_embedding", "transformer.resblocks.", "mlp.c_fc")
    )
    vocabulary, width = (_size(shapes, tokens, axis) for axis in (0, 1))
    depth = _count(shapes, layers)
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "max_position_embeddings": _size(shapes, positions, 0),
        "hidden_size": width,
        "intermediate_size": _size(shapes, f"{layers}0.{first}.weight", 0),
        "num_hidden_layers": min(depth, SD2_LAYERS) if family == "sd2" else depth,
        "num_attention_heads": max(1, width // 64),
        "hidden_act": "quick_gelu" if table is clip else "gelu",
        # As published; an end of 2 stands for the largest token, which the end is.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    if table is not open_clip:
        return config
    projection = _size(shapes, "text_projection", 1)
    return config | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": projection}


def configs(
    shapes: Shapes,
    kind: str | None = None,
    *,
    prediction: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """component -> the config.json that its published folder has, for each of unet, vae, text_encoder(_2) in the file, and scheduler.

    kind        of KINDS; None: by `identify`. For an autoencoder alone it tells whose scale its latents have (SD's unless said)
    prediction  'epsilon', 'v_prediction', 'sample': which a file does not tell, except by the marks v_pred and ztsnr of some
                SDXL models; None: as published for the kind, of the two SD 2 the v-predicting one of 768 pixels
    options     component -> options that shapes do not tell either (heads, groups of norms, scaling_factor), over the published

    Raises ValueError as `identify`; for an unknown kind, prediction or component in `options`; for a U-Net whose input is not
    the kind's; for levels that diffusers has no config for; and for latents of other than 4 channels without a scaling_factor.
    """
    kind = identify(shapes) if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"single file: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"single file: prediction is {prediction!r}, expected one of {', '.join(PREDICTIONS)}")
    family, channels, published, usual = KINDS[kind]
    prediction = prediction or ("v_prediction" if "v_pred" in shapes else usual)
    size = 768 if (kind, prediction) == ("sd2", "v_prediction") else FAMILIES[family].size
    found: dict[str, dict[str, Any]] = {}
    for component, part in parts(kind).items():
        prefix = _prefix(part, shapes)
        if prefix is None:
            continue
        own = _below(prefix, shapes)
        if component == "unet":
            found[component] = _unet_config(own, family, size)
        elif component == "vae":
            found[component] = _vae_config(own, family, size)
        else:
            found[component] = _text_config(own, family, part.table)
    if not found:
        raise ValueError(f"single file: no network of a {kind} among its {len(shapes)} tensors: {listed(shapes)}")
    if "unet" in found and found["unet"]["in_channels"] != channels:
        raise ValueError(
            f"single file: the U-Net reads {found['unet']['in_channels']} channels, that of a {kind} reads {channels}"
        )
    if "unet" in found:
        found["scheduler"] = published | BETAS | {"steps_offset": 1, "prediction_type": prediction}
        if "ztsnr" in shapes:
            found["scheduler"]["rescale_betas_zero_snr"] = True
    for component, changes in (options or {}).items():
        if component not in found:
            raise ValueError(f"single file: options for {component!r}, expected one of {', '.join(found)}")
        found[component] |= changes
    if "vae" in found and "scaling_factor" not in found["vae"]:
        raise ValueError(
            f"single file: no scale is known for latents of {found['vae']['latent_channels']} channels, expected "
            "options={'vae': {'scaling_factor': ...}}"
        )
    return found


def parts(kind: str) -> dict[str, Part]:
    """component -> where it lies in a file of this kind."""
    return NETWORKS | FAMILIES[KINDS[kind].family].encoders


# ---- tensors ----


def _to_hf(pair: Pair, name: str, tensor: Tensor) -> list[Tensor]:
    """One tensor of the single file -> the tensors of the folder that `pair` makes of it."""
    shape, dtype, read = tensor
    if pair.layout == "joined":
        length, rest = divmod(shape[0] if shape else 1, len(pair.names))
        if rest:
            raise ValueError(
                f"single file: {name} is {list(shape)}, expected {len(pair.names)} tensors one after the other"
            )
        return [
            # A copy, or the joined tensor stays in memory for each of its thirds.
            Tensor((length, *shape[1:]), dtype, lambda k=k: read()[k * length : (k + 1) * length].copy())
            for k in range(len(pair.names))
        ]
    if pair.layout == "transposed":
        return [Tensor(shape[::-1], dtype, lambda: np.ascontiguousarray(read().T))]
    if pair.layout == "pixel" and all(n == 1 for n in shape[2:]):
        return [Tensor(shape[:2], dtype, lambda: read().reshape(shape[:2]))]
    return [tensor]


def _to_ldm(pair: Pair, tensors: list[Tensor]) -> Tensor:
    """The inverse of _to_hf."""
    shape, dtype, read = tensors[0]
    if pair.layout == "joined":
        length = sum(tensor.shape[0] for tensor in tensors)
        return Tensor((length, *shape[1:]), dtype, lambda: np.concatenate([tensor.read() for tensor in tensors]))
    if pair.layout == "transposed":
        return Tensor(shape[::-1], dtype, lambda: np.ascontiguousarray(read().T))
    if pair.layout == "pixel" and len(shape) == 2:
        return Tensor((*shape, 1, 1), dtype, lambda: read().reshape(*shape, 1, 1))
    return tensors[0]


def _find(rows: Mapping[str, Pair], name: str) -> tuple[Pair | None, str]:
    """The row that `name` belongs to, and what is left of the name: '.weight' or '.bias' of a module, '' of a tensor."""
    module, dot, last = name.rpartition(".")
    if name not in rows and last in ("weight", "bias"):
        return rows.get(module), dot + last
    return rows.get(name), ""


def split(
    state: Mapping[str, Tensor],
    kind: str | None = None,
    *,
    prediction: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """The tensors of a single file -> component: (its config.json, its tensors as a Hugging Face folder names them).

    Components are those of `configs`, whose arguments these are; the scheduler has no tensors. None is read: a tensor that
    differs in layout is made when it is read. What is missing is left for `layout.read` to say; what no network reads (LEFT_OUT)
    is left out, and a line on stderr says so.
    Raises ValueError as `configs`, and listing the first ten tensors that belong to no network of the kind.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    kind = identify(shapes) if kind is None else kind
    found = configs(shapes, kind, prediction=prediction, options=options)
    components: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    used: set[str] = set()
    for component, config in found.items():
        tensors: dict[str, Tensor] = {}
        components[component] = (config, tensors)
        if component == "scheduler":
            continue
        part = parts(kind)[component]
        prefix = _prefix(part, state) or ""
        rows = {pair.ldm: pair for pair in part.table(config)}
        for name, tensor in _below(prefix, state).items():
            pair, rest = _find(rows, renamed(name))
            if pair is None:
                continue
            used.add(prefix + name)
            made = _to_hf(pair, prefix + name, tensor)
            for hf, value in zip(pair.names, made, strict=True):
                if hf + rest in tensors:
                    raise ValueError(f"single file: {prefix + name} and another name for it are both in the file")
                tensors[hf + rest] = value
    left = [name for name in state if name not in used]
    if foreign := [name for name in left if not UNUSED.fullmatch(name)]:
        raise ValueError(f"single file: {len(foreign)} tensors are of no network of a {kind}: {listed(foreign)}")
    if said := left_out(left):
        print(f"note: single file: no network reads {said}: left out", file=sys.stderr)
    return components


def join(components: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]], kind: str) -> dict[str, Tensor]:
    """The inverse of `split`: component -> (config.json, tensors as a folder names them) to the tensors of a single file.

    Text encoders' names may lack text_model., as transformers 5 writes them. A scheduler has no place in the file, nor has what
    no network needs (UNUSED). An autoencoder alone (kind 'vae') is written without a prefix. Tensors are made when read.

    Raises ValueError for a component that the kind does not have, listing the first ten tensors that its network does not
    have, and for one of several to be joined that is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"single file: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    state: dict[str, Tensor] = {}
    for component, (config, tensors) in components.items():
        if component == "scheduler":
            continue
        if component not in parts(kind):
            raise ValueError(f"single file: a {kind} has no {component}, expected {', '.join(parts(kind))}")
        part = parts(kind)[component]
        if component not in NETWORKS:
            whole = ("text_model.", "text_projection.")
            tensors = {n if n.startswith(whole) else f"text_model.{n}": tensor for n, tensor in tensors.items()}
        table = part.table(config)
        rows = {name: pair for pair in table for name in pair.names}
        prefix = "" if kind == "vae" else part.prefixes[0]
        left = []
        for name in tensors:
            pair, rest = _find(rows, name)
            if pair is None:
                if not UNUSED.fullmatch(name):
                    left.append(name)
                continue
            names = [hf + rest for hf in pair.names]
            if missing := [hf for hf in names if hf not in tensors]:
                raise ValueError(f"single file: {component} lacks {', '.join(missing)}, which is joined with {name}")
            state[prefix + pair.ldm + rest] = _to_ldm(pair, [tensors[hf] for hf in names])
        if left:
            raise ValueError(f"single file: {len(left)} tensors are not of {component}: {listed(left)}")
    return state
