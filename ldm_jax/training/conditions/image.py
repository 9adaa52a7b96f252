"""A picture as a frozen image encoder sees it; the null is zeros (Ramesh et al. 2022, unCLIP, arXiv:2204.06125, section 2.1).

tokens    cond['text'] f32[B, S, D], which cross-attention reads: DINOv2's class token and patches; of a classifier the pixels of its
          last residual branch
pooled    cond['label'] f32[B, D], for a U-Net whose class_embed_type takes vectors: DINOv2's class token; a classifier's features
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.dinov2 import Dinov2
from ldm_jax.training import frozen_networks
from ldm_jax.training.conditioning import Condition
from ldm_jax.training.images import from_entry
from ldm_jax.training.task import Context
from ldm_jax.training.terms.alignment import MEAN, STD
from ldm_jax.training.terms.perceptual import activations
from ldm_jax.weights.tree_hash import tree_sha256

GIVES = {"tokens": "text", "pooled": "label"}
KINDS = ("classifier", "dinov2")

# (params, images f32[B, H, W, 3] in [-1, 1]) -> f32[B, S, D] or f32[B, D]
See = Callable[[Any, jax.Array], jax.Array]


def seen_by(network: Any, tokens: bool, size: int) -> See:
    """What a network gives of images: its tokens or its pooled features. `size`: pixels a side that DINOv2 is shown."""
    if isinstance(network, Dinov2):

        def see(params, x):
            x = jax.image.resize(x, (len(x), size, size, 3), "cubic")
            out = network.apply({"params": params}, ((x + 1) / 2 - MEAN) / STD)
            return out.last_hidden_state if tokens else out.pooled
    else:

        def see(params, x):
            if not tokens:
                return network.apply({"params": params}, x)[1]
            last = activations(network, params, x)[f"residual_{len(network.widths) - 1}_b_norm"]
            return last.reshape(len(x), -1, last.shape[-1])

    return see


def make(context: Context, *, name: str, gives: str = "tokens", size: int = 224) -> Condition:
    """config.condition.image: `name` is 'dinov2:DIR', a folder of save_pretrained, or 'classifier:DIR', a finished run.

    `gives`: 'tokens' or 'pooled'; `size`: pixels a side that DINOv2 is shown. Raises ValueError for other words, and where the folder
    or the run holds something else.
    """
    kind, _, where = name.partition(":")
    if kind not in KINDS or not where:
        raise ValueError(
            f"config.condition.image.name={name!r}; expected dinov2:DIR or classifier:DIR, a run of `ldm train`"
        )
    if gives not in GIVES:
        raise ValueError(f"config.condition.image.gives={gives!r}; expected one of {', '.join(GIVES)}")
    try:
        network, params = (context.load or frozen_networks.described)(name)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"config.condition.image.name={name!r}: {error}") from error
    if kind == "dinov2" and not isinstance(network, Dinov2):
        raise ValueError(f"config.condition.image.name={name!r} holds a {type(network).__name__}; expected Dinov2")
    see = seen_by(network, gives == "tokens", size)
    x = jax.ShapeDtypeStruct((1, *context.space.shape), jnp.float32)
    shape = jax.eval_shape(see, params, x).shape[1:]

    def read(frozen, batch, keys):
        del keys
        return see(frozen["image"], from_entry(batch["image"]))

    return Condition(
        "image",
        read,
        encode=lambda params, frozen, value: {GIVES[gives]: value},
        null=np.zeros(shape, np.float32),
        needs=("image",),
        takes=("image",),
        frozen=params,
        facts={"name": tree_sha256(params, described=False)} if context.load else {},
    )
