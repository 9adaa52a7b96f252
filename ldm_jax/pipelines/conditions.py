"""What a published network is conditioned on: the states of its text encoders, SDXL's sizes and crops, classes.

Stable Diffusion 1 and 2 read the last state after the final norm. SDXL (Podell et al. 2023, sections 2.2 and 2.3) joins the states
before the last layer of its encoders, and adds the pooled text of the second and the numbers (original size, crop, target size),
or, in its refiner, (original size, crop, aesthetic score).
LCM (Luo et al. 2023, section 4.2) takes the guidance scale itself, as a sinusoidal embedding of w - 1.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.embedding import timestep_embedding
from ldm_jax.pipelines import prompts
from ldm_jax.pipelines.components import Parts, TextEncoder, on_device
from ldm_jax.pipelines.request import RESULT_SIZES, Sizes


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _states(module: nn.Module, params: Any, ids: Array, skip: int, normed: bool) -> tuple[Array, Array | None]:
    """(states f32[B, L, D], projected f32[B, P] or None)."""
    out = module.apply({"params": params}, ids, skip=skip if normed else 0)
    states = out.last_hidden_state if normed else out.hidden_states[-1 - skip]
    return states, out.text_embeds


def encode(
    parts: Parts, encoder: TextEncoder, texts: Sequence[str], skip: int = 0, normed: bool = True
) -> tuple[Array, Array | None]:
    """(states f32[N, L, D], projected f32[N, P] or None) of prompts, weights in them honoured.

    skip leaves out the last layers; normed puts the final norm after what is left.
    """
    length = min(encoder.tokenizer.model_max_length, encoder.network.module.max_position_embeddings)
    tokens = prompts.tokenize(encoder.tokenizer, texts, length)
    with on_device(encoder.network.params, parts.offload) as params:
        read = functools.partial(_states, encoder.network.module, params)
        states, pooled = read(jnp.asarray(tokens.ids), skip, normed)
        if tokens.weighted:
            empty, _ = read(jnp.asarray(prompts.tokenize(encoder.tokenizer, [""], length).ids), skip, normed)
            w = jnp.asarray(tokens.weights)[..., None]
            states = jnp.where(w == 1, states, empty + w * (states - empty))
        return jax.block_until_ready((states, pooled))


def is_xl(parts: Parts) -> bool:
    """Whether the network takes sizes besides the text (SDXL)."""
    return getattr(parts.denoiser.module, "addition_embed_type", None) == "text_time"


def conditions(
    parts: Parts,
    texts: Sequence[str] | None,
    size: tuple[int, int],
    sizes: Sizes = RESULT_SIZES,
    *,
    negative: bool = False,
    count: int | None = None,
    clip_skip: int = 0,
) -> dict[str, Array]:
    """cond of the denoiser for N texts and pictures of `size` (H, W) pixels.

    texts=None says nothing at all, for `count` pictures: zeros where the pipeline was trained so (SDXL's
    force_zeros_for_empty_prompt), else the empty prompt. negative: these are the texts guided away from.
    """
    xl = is_xl(parts)
    zeros = texts is None and xl and bool(parts.options.get("force_zeros_for_empty_prompt", True))
    texts = [""] * (count or 1) if texts is None else texts
    read = [encode(parts, e, texts, 1 + clip_skip if xl else clip_skip, normed=not xl) for e in parts.text]
    cond = {"text": jnp.concatenate([states for states, _ in read], -1)}
    if not xl:
        return cond
    cond["pooled"] = next(pooled for _, pooled in read if pooled is not None)
    if zeros:
        cond = {name: jnp.zeros_like(value) for name, value in cond.items()}
    score = sizes.negative_aesthetic if negative else sizes.aesthetic
    last = (score,) if parts.options.get("requires_aesthetics_score") else (sizes.target or size)
    ids = (*(sizes.original or size), *sizes.crop, *last)
    width = parts.denoiser.module.projection_class_embeddings_input_dim
    numbers = cond["pooled"].shape[-1] + len(ids) * parts.denoiser.module.addition_time_embed_dim
    if width is not None and numbers != width:
        raise ValueError(
            f"the U-Net takes {width} numbers of text and size, the text encoders and {len(ids)} sizes give {numbers}; "
            "requires_aesthetics_score in model_index.json may be wrong"
        )
    cond["time_ids"] = jnp.broadcast_to(jnp.asarray(ids, jnp.float32), (len(texts), len(ids)))
    return cond


def guidance_embedding(parts: Parts, guidance: float, count: int) -> dict[str, Array]:
    """{'guidance': f32[count, D]} for a network that takes its scale of guidance, {} for others."""
    width = getattr(parts.denoiser.module, "time_cond_proj_dim", None)
    if width is None:
        return {}
    # Sine first, and the frequencies of a shift of 1, as LCM was trained.
    w = jnp.full((count,), 1000.0 * (guidance - 1.0))
    return {"guidance": timestep_embedding(w, width, flip_sin_to_cos=False, downscale_freq_shift=1.0)}


def classes_of(parts: Parts) -> int | None:
    """How many classes the denoiser knows; None for one without."""
    module = parts.denoiser.module
    return getattr(module, "num_class_embeds", None) or getattr(module, "num_classes", None)
