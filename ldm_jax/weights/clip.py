"""CLIPTextModel, CLIPVisionModel, both with projection, and CLIPModel in transformers' files <-> models/clip.py.

transformers 4 wrote the tensors of all classes under `text_model.` and `vision_model.`. transformers 5 writes the two classes without
projection without this prefix, and reads both spellings of all classes but CLIPModel. The tables here read both spellings too, and
write what transformers 5 writes.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ldm_jax.models.clip import ACTIVATIONS, CLIP, CLIPText, CLIPVision
from ldm_jax.weights.format import Format, options
from ldm_jax.weights.kinds import CONV2D, DENSE, EMBEDDING, NORM
from ldm_jax.weights.layout import Row, under

BLOCK = (
    Row("layer_norm1", "layer_norm1", NORM),
    *(Row(f"{name}_proj", f"self_attn.{name}_proj", DENSE) for name in ("q", "k", "v", "out")),
    Row("layer_norm2", "layer_norm2", NORM),
    Row("fc1", "mlp.fc1", DENSE),
    Row("fc2", "mlp.fc2", DENSE),
)
TEXT_ROWS = (
    Row("token_embedding", "embeddings.token_embedding", EMBEDDING),
    Row("position_embedding", "embeddings.position_embedding", EMBEDDING),
    *under("layers_{i}", "encoder.layers.{i}", BLOCK),
    Row("final_layer_norm", "final_layer_norm", NORM),
    # The numbers 0, 1, 2, ... in files from before transformers 4.31.
    Row(None, "embeddings.position_ids"),
)
VISION_ROWS = (
    Row("class_embedding", "embeddings.class_embedding"),
    Row("patch_embedding", "embeddings.patch_embedding", CONV2D),
    Row("position_embedding", "embeddings.position_embedding", EMBEDDING),
    Row("pre_layrnorm", "pre_layrnorm", NORM),
    *under("layers_{i}", "encoder.layers.{i}", BLOCK),
    Row("post_layernorm", "post_layernorm", NORM),
    Row(None, "embeddings.position_ids"),
)
TEXT_PROJECTION_ROW = Row("text_projection", "text_projection", DENSE)
VISION_PROJECTION_ROW = Row("visual_projection", "visual_projection", DENSE)
CLIP_ROWS = (
    *under("text", "text_model", TEXT_ROWS),
    *under("text", "", (TEXT_PROJECTION_ROW,)),
    *under("vision", "vision_model", VISION_ROWS),
    *under("vision", "", (VISION_PROJECTION_ROW,)),
    Row("logit_scale", "logit_scale"),
)

SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)
TEXT_OPTIONS = (*SHARED, "vocab_size", "max_position_embeddings", "eos_token_id")
VISION_OPTIONS = (*SHARED, "num_channels", "image_size", "patch_size")
FIXED = {"hidden_act": tuple(ACTIVATIONS), "pruned_heads": ({}, None)}
# Further keys that a config.json of transformers may have: names, and options of training and of text generation.
GENERAL = """
    add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_factor initializer_range is_decoder is_encoder_decoder label2id length_penalty
    max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
""".split()
TEXT_UNUSED = GENERAL
# An image has no end token, but old files of the vision tower hold that of the text.
VISION_UNUSED = (*GENERAL, "eos_token_id")


def spelt(theirs: str, other: str, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """`rows` under the prefix `theirs`. They are also read from under the prefix `other`."""
    both = zip(under("", theirs, rows), under("", other, rows))
    return tuple(
        row
        for written, read in both
        for row in ((written, read) if written.ours is None else (written._replace(old=(read.theirs,)),))
    )


def _number(name: str, values: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if not isinstance(values[key], int):
            raise ValueError(f"{name}: {key} is {values[key]!r}, expected one whole number")


def _tower(name: str, kind: type, names: tuple[str, ...], unused: tuple[str, ...], config, projected: bool):
    """The CLIPText or CLIPVision (`kind`) of a config.json. Unless `projected`, its projection_dim is None."""
    defaults = {key: getattr(kind, key) for key in names} | {"projection_dim": 512}
    values = options(name, config, defaults, fixed=FIXED, unused=unused)
    whole = [key for key in names if key not in ("hidden_act", "layer_norm_eps")]
    _number(name, values, *whole, *(("projection_dim",) if projected else ()))
    return kind(**values | ({} if projected else {"projection_dim": None}))


def _text(name: str, config: Mapping[str, Any], projected: bool) -> CLIPText:
    return _tower(name, CLIPText, TEXT_OPTIONS, TEXT_UNUSED, config, projected)


def _vision(name: str, config: Mapping[str, Any], projected: bool) -> CLIPVision:
    return _tower(name, CLIPVision, VISION_OPTIONS, VISION_UNUSED, config, projected)


def _clip(config: Mapping[str, Any]) -> CLIP:
    defaults = {
        "text_config": None,
        "vision_config": None,
        "text_config_dict": None,
        "vision_config_dict": None,
        "projection_dim": 512,
        "logit_scale_init_value": CLIP.logit_scale_init_value,
    }
    values = options("CLIPModel", config, defaults, fixed={"pruned_heads": FIXED["pruned_heads"]}, unused=GENERAL)
    _number("CLIPModel", values, "projection_dim")

    def part(key: str) -> Mapping[str, Any]:
        # In an old file *_config_dict, with defaults for what it does not name, has precedence over *_config.
        return config[f"{key}_dict"] if values[f"{key}_dict"] is not None else values[key] or {}

    return CLIP(
        _text("CLIPModel's text_config", part("text_config"), False).clone(projection_dim=values["projection_dim"]),
        _vision("CLIPModel's vision_config", part("vision_config"), False).clone(
            projection_dim=values["projection_dim"]
        ),
        values["logit_scale_init_value"],
    )


def _tower_config(module: CLIPText | CLIPVision) -> dict[str, Any]:
    text = isinstance(module, CLIPText)
    written = {key: getattr(module, key) for key in (TEXT_OPTIONS if text else VISION_OPTIONS)}
    written["model_type"] = "clip_text_model" if text else "clip_vision_model"
    return written if module.projection_dim is None else written | {"projection_dim": module.projection_dim}


def _clip_config(module: CLIP) -> dict[str, Any]:
    return {
        "model_type": "clip",
        "text_config": _tower_config(module.text),
        "vision_config": _tower_config(module.vision),
        "projection_dim": module.text.projection_dim,
        "logit_scale_init_value": module.logit_scale_init_value,
    }


def _tower_format(name: str, rows: Callable[[Any], tuple[Row, ...]]) -> Format:
    """The Format of one of the four classes of a single tower."""
    network, read = (CLIPText, _text) if "Text" in name else (CLIPVision, _vision)
    projected = name.endswith("WithProjection")
    return Format(
        name,
        "transformers",
        network,
        lambda config: read(name, config, projected),
        _tower_config,
        rows,
        lambda module: (module.projection_dim is not None) == projected,
    )


TEXT = _tower_format("CLIPTextModel", lambda module: spelt("", "text_model", TEXT_ROWS))
TEXT_PROJECTION = _tower_format(
    "CLIPTextModelWithProjection", lambda module: (*spelt("text_model", "", TEXT_ROWS), TEXT_PROJECTION_ROW)
)
VISION = _tower_format("CLIPVisionModel", lambda module: spelt("", "vision_model", VISION_ROWS))
VISION_PROJECTION = _tower_format(
    "CLIPVisionModelWithProjection", lambda module: (*spelt("vision_model", "", VISION_ROWS), VISION_PROJECTION_ROW)
)
FULL = Format("CLIPModel", "transformers", CLIP, _clip, _clip_config, lambda module: CLIP_ROWS)
