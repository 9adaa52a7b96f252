"""A published class of network: the meaning of its config.json, and the names of its tensors.

    Format(name, library, network, module, config, table),   where module(config(m)) computes what m computes

An option that is not supported raises an error that names it. Otherwise a network that ignores an option would load without an error,
and compute something else.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from ldm_jax import models
from ldm_jax.weights.layout import Row


class Format(NamedTuple):
    """One published class.

    name     of the class: `_class_name` in diffusers' config.json, one of `architectures` in transformers'
    library  'diffusers' or 'transformers', which decides the names of its files
    network  our linen class that computes it
    module   config.json -> our module; ValueError naming an option that is unknown or unsupported, with its value
    config   our module -> the options to write, without the class name; ValueError for what the class cannot express
    table    our module -> the rows of its tensors
    written  whether a module of the type `network` is written as this class: several classes may share one network
    """

    name: str
    library: str
    network: type
    module: Callable[[Mapping[str, Any]], nn.Module]
    config: Callable[[nn.Module], dict[str, Any]]
    table: Callable[[nn.Module], tuple[Row, ...]]
    written: Callable[[Any], bool] = lambda module: True

    def shapes(self, module: nn.Module) -> Any:
        """The parameters of `module`, as jax.ShapeDtypeStruct."""
        return models.shapes(module)["params"]


# diffusers' EMAModel writes the state of a moving average into the config.json of the network that it averages.
LEFTOVERS = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
# Options that are whole numbers (or lists of them, one for each level), with the range that a published network can have. More than a
# million channels are a mistake or an attack: they would take all memory before any tensor of the file is read.
DEPTH, WIDTH, SIDE = (0, 1000), (1, 1 << 20), (1, 1 << 16)
RANGES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        (
            *("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
            *("num_hidden_layers", "num_layers", "num_encoder_blocks", "num_decoder_blocks"),
        ),
        DEPTH,
    ),
    **dict.fromkeys(
        (
            *("in_channels", "out_channels", "latent_channels", "num_channels", "block_out_channels"),
            *("encoder_block_out_channels", "decoder_block_out_channels", "norm_num_groups", "attn_norm_num_groups"),
            *(
                "attention_head_dim",
                "num_attention_heads",
                "cross_attention_dim",
                "encoder_hid_dim",
                "caption_channels",
            ),
            *("time_embedding_dim", "time_cond_proj_dim", "addition_time_embed_dim", "num_class_embeds"),
            *("projection_class_embeddings_input_dim", "num_vq_embeddings", "vq_embed_dim", "num_embeds_ada_norm"),
            *("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "projection_dim"),
        ),
        WIDTH,
    ),
    **dict.fromkeys(("sample_size", "image_size", "patch_size", "conv_in_kernel", "conv_out_kernel"), SIDE),
    "downsample_padding": (0, 16),
    "num_register_tokens": (0, 1 << 16),
    # Options of schedulers.
    "num_train_timesteps": (1, 1_000_000),
    "steps_offset": (0, 1_000_000),
    "correct_steps": (0, 1000),
}
MOST_LEVELS, LONGEST_SHOWN = 16, 200
# Options that are long lists.
LISTS = ("trained_betas",)


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from flat(part)
    else:
        yield value


def shown(value: Any) -> str:
    """`value` as Python writes it, shortened where an option of a file is a very long list."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def _within(name: str, key: str, value: Any, default: Any) -> None:
    """Raise ValueError for a number out of range, for NaN (which Python reads from JSON), and for a list that is too long."""
    if isinstance(value, tuple) and len(value) > MOST_LEVELS and key not in LISTS:
        raise ValueError(f"{name}: {key} has {len(value)} entries, expected at most {MOST_LEVELS}")
    if key in RANGES:
        low, high = RANGES[key]
        for number in flat(value):
            if number is not None and not (type(number) is int and low <= number <= high):
                raise ValueError(f"{name}: {key} is {shown(number)}, expected a whole number from {low} to {high}")
    elif isinstance(value, float) and not math.isfinite(value) and value != default:
        raise ValueError(f"{name}: {key} is {value}, expected a finite number")
    elif key == "scaling_factor" and not (isinstance(value, (int, float)) and value > 0):
        raise ValueError(f"{name}: {key} is {shown(value)}, expected a number > 0")
    elif isinstance(default, bool) and not all(part is None or type(part) is bool for part in flat(value)):
        raise ValueError(f"{name}: {key} is {shown(value)}, expected true or false")
    elif isinstance(default, float) and not (value is None or isinstance(value, (int, float))):
        raise ValueError(f"{name}: {key} is {shown(value)}, expected a number")


def options(
    name: str,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    fixed: Mapping[str, tuple] = {},
    unused: Collection[str] = (),
) -> dict[str, Any]:
    """The options that `defaults` names, from the config.json of the class `name`; lists become tuples.

    defaults  option -> its published default
    fixed     option -> the values for which the class computes what our module computes
    unused    options that change no number

    Keys that begin with '_' and the state of a moving average (LEFTOVERS) are skipped. Raises ValueError for a value that is not in
    `fixed`, for a number that is out of its range (RANGES) or not finite, and for any other key.
    """
    for key, value in config.items():
        if key in fixed and tuples(value) not in fixed[key]:
            expected = " or ".join(repr(v) for v in fixed[key])
            raise ValueError(f"{name}: {key} is {shown(value)}, expected {expected}")
        if not (key.startswith("_") or key in defaults or key in fixed or key in unused or key in LEFTOVERS):
            raise ValueError(f"{name}: option {key} (here {shown(value)}) is unknown")
    taken = {key: tuples(config.get(key, default)) for key, default in defaults.items()}
    for key, value in taken.items():
        _within(name, key, value, defaults[key])
    return taken
