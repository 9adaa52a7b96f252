"""Conditions of a denoiser, one file each: make(context, **block) -> Condition. CONDITIONS lists them, by their name in configs.

    c.condition = {"label": {"drop": 0.1}, "masked_image": {"drop": 0.0}}       True is {}, False is none

A new condition is a file and a line here. The order of the table is that in which entries of several conditions are joined: a new
line comes last.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ldm_jax.config import config_keys
from ldm_jax.training.conditioning import Condition, Conditioning
from ldm_jax.training.conditions import image, label, low_resolution, masked_image, published_text, text
from ldm_jax.training.task import Context

CONDITIONS: dict[str, Callable[..., Condition]] = {
    "label": label.make,
    "text": text.make,
    "published_text": published_text.make,
    "image": image.make,
    "masked_image": masked_image.make,
    "low_resolution": low_resolution.make,
}


def with_drop(condition: Condition, *, drop: float | None = None) -> Condition:
    """The condition with the key that every block of config.condition may have: the probability of a row to be dropped by itself."""
    return condition._replace(drop=drop)


def maker(name: str) -> Callable[..., Condition]:
    """CONDITIONS[name]. Raises ValueError, with the nearest name, for one that is not there."""
    if name not in CONDITIONS:
        raise ValueError(f"config.condition.{name} is unknown{config_keys.near(name, CONDITIONS)}")
    return CONDITIONS[name]


def make(context: Context, blocks: Mapping[str, Mapping[str, Any]]) -> Conditioning:
    """The conditions of config.condition, {name: block}. Raises ValueError that names the key that does not fit."""
    made = []
    for name in blocks:
        maker(name)
    for name, condition in CONDITIONS.items():
        if name in blocks:
            options = dict(blocks[name])
            drop = options.pop("drop", None)
            try:
                made.append(with_drop(condition(context, **options), drop=drop)._replace(name=name))
            except TypeError as error:
                raise ValueError(f"config.condition.{name}: {error}") from error
    classes = any("labels" in condition.takes for condition in made)
    return Conditioning(tuple(made), context.num_classes if classes else 0)
