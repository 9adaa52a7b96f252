"""A caption, read by a frozen published text encoder with its own tokenizer (Rombach et al. 2022, section 3.3, as Stable Diffusion is
conditioned); the null is the empty caption.
"""

import jax.numpy as jnp

from ldm_jax.training import published_text
from ldm_jax.training.conditioning import Condition
from ldm_jax.training.task import Context
from ldm_jax.weights.tree_hash import tree_sha256


def make(context: Context, *, path: str, skip: int = 0, masked: bool = False) -> Condition:
    """config.condition.published_text: cond['text'] f32[B, L, D] of 'tokens' i32[B, L], the states after the final norm.

    `path`: a folder with CLIP's text encoder and its tokenizer, or a pipeline's folder, which holds both; `skip` leaves out so many of
    the last layers; `masked`: cond['text_mask'] too, so that nothing attends to the padding, as it does in Stable Diffusion.
    Raises ValueError for a folder that holds something else, and for a `skip` that is no number of its layers.
    """
    network, params = (published_text.load if context.load else published_text.shapes)(path)
    if not 0 <= skip <= network.num_hidden_layers:
        raise ValueError(f"config.condition.published_text.skip={skip}; expected 0 to {network.num_hidden_layers}")

    def encode(trained, frozen, tokens):
        del trained
        out = network.apply({"params": frozen["published_text"]}, tokens, skip=skip)
        entries = {"text": out.last_hidden_state.astype(jnp.float32)}
        if masked:
            end = network.eos_token_id
            ends = tokens == (jnp.max(tokens, 1, keepdims=True) if end == 2 else end)
            entries["text_mask"] = jnp.cumsum(ends, 1) - ends == 0  # up to the first end, and that
        return entries

    return Condition(
        "published_text",
        read=lambda frozen, batch, keys: batch["tokens"],
        encode=encode,
        null=published_text.tokenizer(path).encode(""),
        needs=("tokens",),
        takes=("prompts",),
        frozen=params,
        facts={"path": tree_sha256(params, described=False)} if context.load else {},
    )
