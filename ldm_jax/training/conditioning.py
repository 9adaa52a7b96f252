"""What a denoiser is told: class labels and captions, and their absence.

Classifier-free guidance (Ho & Salimans 2021, alg. 1) trains one network on both: with probability `drop` a row is told nothing,
which is the null class (index num_classes) and the empty caption.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Conditioning(NamedTuple):
    """`num_classes` 0: no labels. `text`: the text encoder (a linen module) or None; `null_tokens` i32[L]: the empty caption."""

    num_classes: int = 0
    text: Any = None
    null_tokens: np.ndarray | None = None


def init(conditioning: Conditioning, key: jax.Array) -> dict[str, Any]:
    """Parameters of the networks that conditioning itself needs: {} or {'text': ...}."""
    if conditioning.text is None:
        return {}
    return {"text": conditioning.text.init(key, jnp.asarray(conditioning.null_tokens)[None])["params"]}


def condition(
    conditioning: Conditioning, params: dict[str, Any], batch: dict[str, jax.Array], drop: jax.Array | None = None
) -> dict[str, jax.Array]:
    """`cond` of the denoiser from 'label' i32[B] and 'tokens' i32[B, L]; rows where `drop` bool[B] is true are told nothing."""
    cond = {}
    if conditioning.num_classes:
        label = batch["label"]
        cond["label"] = label if drop is None else jnp.where(drop, conditioning.num_classes, label)
    if conditioning.text is not None:
        tokens = batch["tokens"]
        if drop is not None:
            tokens = jnp.where(drop[:, None], jnp.asarray(conditioning.null_tokens), tokens)
        cond |= conditioning.text.apply({"params": params["text"]}, tokens)
    return cond


def conditional(conditioning: Conditioning) -> bool:
    """Whether the network is told anything: classes or captions."""
    return bool(conditioning.num_classes) or conditioning.text is not None


def nothing(conditioning: Conditioning, params: dict[str, Any], rows: int) -> dict[str, jax.Array]:
    """The unconditional `cond` for `rows` rows."""
    batch = {"label": jnp.zeros(rows, jnp.int32)}
    if conditioning.text is not None:
        batch["tokens"] = jnp.zeros((rows, len(conditioning.null_tokens)), jnp.int32)
    return condition(conditioning, params, batch, jnp.ones(rows, bool))
