"""The keys of a config: which there are, of what type and in what range.

A block whose keys stand in configs/base.py is held against it; one that is handed to a constructor against the constructor's
signature. The range of a number is looked up by its key, so that it is said once however many constructors have it.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

# Blocks of which base.py knows the name alone: the rest are arguments of the constructor that the name stands for.
OPEN = ("task", "model", "data", "process", "tokenizer", "optimizer")
# Blocks of base.py that may hold other arguments of one constructor besides; `condition` holds a block a condition.
EXTENSIBLE = ("text", "condition")

Range = tuple[float, float]
# The greatest values are bounds on what is a slip of the keyboard, and would take minutes or all memory to be refused later.
COUNT: Range = (1, 2**16)  # of channels, heads, groups
LAYERS: Range = (1, 1000)
AMOUNT: Range = (0, 1e30)
POSITIVE: Range = (1e-30, 1e30)
SHARE: Range = (0, 1)
DECAY: Range = (0, math.nextafter(1.0, 0.0))  # below 1
IMAGES: Range = (0, 10**15)
ANY: Range = (-1e30, 1e30)

# Of the blocks in base.py by their dotted key, of constructors' arguments by their own.
RANGES: dict[str, Range] = {
    "seed": (0, 2**64 - 1),
    "input.resolution": (1, 2**12),
    "input.shape": COUNT,
    "input.num_threads": (0, 1024),
    "input.prefetch": (0, 2**16),
    "sampler.steps": (1, 10**5),
    "sampler.t_lo": SHARE,
    "sampler.t_hi": SHARE,
    "sampler.rescale": SHARE,
    "sampler.batch_size": (1, 2**20),
    "ema.ramp": AMOUNT,
    "ema.half_lives": (1, 10**15),
    "train.images": (1, 10**15),
    "train.batch_size": (1, 2**20),
    "train.accumulate": (1, 2**20),
    "train.log_every": (1, 10**15),
    "train.validate_every": IMAGES,
    "train.validate_images": IMAGES,  # 0: all
    "train.pictures_every": IMAGES,
    "train.pictures": (1, 2**12),
    "train.checkpoint_every": IMAGES,
    "train.keep": (1, 10**9),
    "train.keep_every": IMAGES,
    "mesh.data": (-1, 2**20),
    "mesh.fsdp": (-1, 2**20),
    "mesh.tensor": (-1, 2**20),
    "mesh.min_size": (0, 2**40),
    # networks
    "depth": LAYERS,
    "layers_per_block": LAYERS,
    "mid_block_layers": (0, 1000),
    "transformer_layers_per_block": (0, 1000),
    "reverse_transformer_layers_per_block": (0, 1000),
    "num_encoder_blocks": (0, 1000),
    "num_decoder_blocks": (0, 1000),
    "num_classes": (0, 2**24),
    "num_class_embeds": (1, 2**24),
    "num_vq_embeddings": (1, 2**24),
    "levels": (2, 2**16),
    "text_dim": (0, 2**16),
    "downsample_padding": (0, 1),
    "mlp_ratio": (POSITIVE[0], 1024),
    "dropout": DECAY,
    "embed_std": AMOUNT,
    "rope_theta": AMOUNT,
    "pos_base": AMOUNT,
    "pos_scale": POSITIVE,
    "norm_eps": AMOUNT,
    "mlp_norm_eps": AMOUNT,
    "length": (3, 2**16),
    # data
    "size": (1, 2**31 - 1),
    "resolution": (1, 2**12),
    "objects": (1, 3),
    "val_from_train": (0, 2**40),
    "val_per_class": (0, 2**40),
    # optimizers
    "learning_rate": AMOUNT,
    "adam_learning_rate_ratio": AMOUNT,
    "warmup_images": IMAGES,
    "decay_images": IMAGES,
    "final": AMOUNT,
    "clip_norm": AMOUNT,
    "b1": DECAY,
    "b2": DECAY,
    "beta": DECAY,
    "momentum": DECAY,
    "eps": AMOUNT,
    "weight_decay": AMOUNT,
    # tasks
    "drop": DECAY,
    "label_smoothing": SHARE,
    # conditions
    "factor": (2, 64),
    "least": SHARE,
    "most": SHARE,
    "boxes": SHARE,
    "everything": SHARE,
    "shift": AMOUNT,
    "cutout": AMOUNT,
    "vlb_weight": AMOUNT,
    "kl_weight": AMOUNT,
    "kl_warmup_images": IMAGES,
    "commitment": AMOUNT,
    "codebook_decay": DECAY,
    "revive_after": IMAGES,
    "equivariance": AMOUNT,
    "weight": AMOUNT,
    "start_images": IMAGES,
    "r1": AMOUNT,
    "lecam": AMOUNT,
}


def near(name: str, names: Iterable[str]) -> str:
    """'; did you mean X?' with the nearest of the names, or all of them where none is near."""
    names = list(names)
    close = difflib.get_close_matches(str(name), names, 1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(names)}" if names else "; there is none"


def shown(value: Any) -> str:
    """A value as it stands in a message: on one line, and not without end."""
    text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


# --- against configs/base.py ---------------------------------------------------------------------------------------------


def check_names(config: ConfigDict, base: ConfigDict) -> None:
    """Raise ValueError for a key that base.py does not have, with the nearest one, and for a block that is none."""
    for name, value in config.items():
        if name not in base:
            raise ValueError(f"config.{name} is unknown{near(name, base)}")
        if not isinstance(base[name], ConfigDict):
            continue
        if not isinstance(value, ConfigDict):
            raise ValueError(f"config.{name}={shown(value)}; expected a block, such as {shown(base[name])}")
        if name in OPEN or name in EXTENSIBLE:
            continue
        for key, leaf in value.items():
            if key not in base[name]:
                raise ValueError(f"config.{name}.{key} is unknown{near(key, base[name])}")
            if isinstance(base[name][key], ConfigDict) and not isinstance(leaf, ConfigDict):
                raise ValueError(f"config.{name}.{key}={shown(leaf)}; expected a block of options, {{}} for none")


def complete(config: Any, base: ConfigDict) -> None:
    """Give a config (a ConfigDict or a dict of dicts), in place, the default of each key of base.py that it lacks.

    A block that a file replaces whole, and a run that was started before there was such a key, mean the default.
    """
    with config.unlocked() if isinstance(config, ConfigDict) else contextlib.nullcontext():
        for name, default in base.items():
            if name not in config:
                config[name] = _copy(default, config)
            elif isinstance(default, ConfigDict) and name not in OPEN and hasattr(config[name], "items"):
                for key, value in default.items():
                    if key not in config[name]:
                        config[name][key] = _copy(value, config)


def check_values(config: ConfigDict, base: ConfigDict) -> None:
    """Raise ValueError for a value of another type than that in base.py, or out of RANGES; every key is there (`complete`)."""
    for name, default in base.items():
        if name not in config:
            raise ValueError(f"config.{name} is missing; expected something like {default!r}")
        if not isinstance(default, ConfigDict):
            _check_leaf(name, config[name], default)
            continue
        if name in OPEN:
            if "name" not in config[name]:
                raise ValueError(f"config.{name}.name is missing; expected a name, such as {default.name!r}")
            check_value(f"config.{name}.name", config[name].name, str)
            continue
        if name in EXTENSIBLE:
            continue
        for key, value in default.items():
            if key not in config[name]:
                raise ValueError(f"config.{name}.{key} is missing; its default is {value!r}")
            if not isinstance(value, ConfigDict):
                _check_leaf(f"{name}.{key}", config[name][key], value)
    half_lives = config.ema.half_lives
    if len({int(h) for h in half_lives}) < len(half_lives):
        raise ValueError(f"config.ema.half_lives={tuple(half_lives)!r}; expected no half-life twice, in whole images")


def _check_leaf(key: str, value: Any, default: Any) -> None:
    hint = {"ema.half_lives": tuple[float, ...], "input.shape": tuple[int, ...]}.get(key, type(default))
    check_value(f"config.{key}", value, hint, RANGES.get(key))


def _copy(value: Any, like: Any) -> Any:
    if not isinstance(value, ConfigDict):
        return value
    return value.copy_and_resolve_references() if isinstance(like, ConfigDict) else value.to_dict()


# --- against a constructor -----------------------------------------------------------------------------------------------


class Argument(NamedTuple):
    """An argument of a constructor. default: inspect.Parameter.empty where it has none; limits: the range of its numbers."""

    hint: Any
    default: Any = inspect.Parameter.empty
    limits: Range | None = None


def arguments(makers: Callable | Sequence[Callable], excluded: Iterable[str] = ()) -> dict[str, Argument]:
    """The arguments of a constructor, or of several that share a block, by name, without the `excluded` ones."""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for maker in makers if isinstance(makers, Sequence) else (makers,):
        parameters |= inspect.signature(maker).parameters
        hints |= typing.get_type_hints(maker.func if isinstance(maker, functools.partial) else maker)
    without = {*excluded, *(("parent", "name") if isinstance(makers, type) else ())}  # fields of every linen module
    is_network = isinstance(makers, type) and hasattr(makers, "apply")
    result = {}
    for key, parameter in parameters.items():
        if key in without or parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            continue
        default = parameter.default
        hint = hints.get(key, Any if default in (None, inspect.Parameter.empty) else type(default))
        limits = RANGES.get(key, COUNT if is_network and _whole(hint) else None)
        result[key] = Argument(hint, default, limits)
    return result


def check_call(
    block: str,
    makers: Callable | Sequence[Callable],
    options: Mapping[str, Any],
    excluded: Iterable[str] = (),
    others: Iterable[str] = (),
) -> None:
    """Raise ValueError unless the options are arguments of `makers` (or of one of several), of the type and in the range expected.

    `block`: what the options are called, such as 'config.model'; `excluded`: arguments that do not come from the block; `others`: keys
    that the block may have too and that are checked elsewhere, so that a wrong name gets its nearest neighbour.
    """
    takes = arguments(makers, excluded)
    for key, value in options.items():
        if key not in takes:
            raise ValueError(f"{block}.{key} is unknown{near(key, [*takes, *others])}")
        check_value(f"{block}.{key}", value, takes[key].hint, takes[key].limits)
    for key, argument in takes.items():
        if argument.default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"{block}.{key} is missing; expected {describe(argument.hint)}")


def check_value(key: str, value: Any, hint: Any, limits: Range | None = None) -> None:
    """Raise ValueError, naming the key, unless the value is of the type that the hint names, and its numbers within limits."""
    if not fits(value, hint):
        raise ValueError(f"{key}={shown(value)}; expected {describe(hint)}")
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if number != number or abs(number) == math.inf:
            raise ValueError(f"{key}={shown(value)}; expected a finite number")
        least, greatest = limits or ANY
        if number < least:
            raise ValueError(
                f"{key}={shown(value)}; expected " + ("above 0" if least == POSITIVE[0] else f"at least {least}")
            )
        if number > greatest:
            raise ValueError(
                f"{key}={shown(value)}; expected " + ("below 1" if greatest == DECAY[1] else f"at most {greatest}")
            )


def parse(text: str, hint: Any) -> Any:
    """The value that `text` writes in Python, as the hint's type where it can be; a `text` that is no Python is a string.

    Does not raise: whether the value is of the hint's type, `check_value` says.
    """
    if hint is str:
        return text
    word = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        value = ast.literal_eval(word)
    except (SyntaxError, ValueError):
        return text
    value = tuple(value) if isinstance(value, list) else value
    if not fits(value, hint):
        return text if fits(text, hint) else value
    if isinstance(value, int) and not isinstance(value, bool) and fits(0.5, hint) and not _whole(hint):
        return float(value)
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type hint's type. A list is as good as a tuple, an int as a float; a bool is no number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if tuple in (hint, origin):
        if not isinstance(value, list | tuple):
            return False
        if not inner or inner[-1] is Ellipsis:
            return not inner or all(fits(each, inner[0]) for each in value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if hint is dict or origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if hint is np.ndarray:
        return isinstance(value, list | tuple | np.ndarray)
    if hint is Any or not isinstance(hint, type):
        return True  # a function: the constructor says
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """A type hint in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(word for each in inner if (word := describe(each)) != "a value"))
    if tuple in (hint, origin) and inner:
        many = inner[-1] is Ellipsis
        each = describe(inner[0]).removeprefix("an ").removeprefix("a ")
        return f"a tuple of {each}s" if many else f"a tuple of {len(inner)} {each}s"
    plain = {float: "a number", int: "a whole number", bool: "True or False", str: "a string", tuple: "a tuple"}
    plain |= {dict: "a block", type(None): "None", np.ndarray: "an array"}
    return plain.get(origin or hint, "a block" if Mapping in (hint, origin) else "a value")


def _whole(hint: Any) -> bool:
    """Whether a hint is of whole numbers: int, with or without None, or a tuple of them."""
    inner = typing.get_args(hint)
    return hint is int or any(_whole(each) for each in inner)
