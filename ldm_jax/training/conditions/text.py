"""A caption, read by the text encoder of config.text, which is trained with the denoiser; the null is the empty caption."""

import jax.numpy as jnp

from ldm_jax.training.conditioning import Condition
from ldm_jax.training.task import Context


def make(context: Context) -> Condition:
    """config.condition.text: cond['text'] f32[B, L, D] and cond['text_mask'] bool[B, L] of 'tokens' i32[B, L]."""
    encoder, null = context.text, context.tokenizer.encode("")
    return Condition(
        "text",
        read=lambda frozen, batch, keys: batch["tokens"],
        encode=lambda params, frozen, tokens: encoder.apply({"params": params}, tokens),
        null=null,
        needs=("tokens",),
        takes=("prompts",),
        init=lambda key: encoder.init(key, jnp.asarray(null)[None])["params"],
    )
