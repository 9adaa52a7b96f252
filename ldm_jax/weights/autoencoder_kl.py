"""Parameters of `models.autoencoder_kl` from diffusers' AutoencoderKL: the names that differ."""

from collections.abc import Mapping

import numpy as np

from ldm_jax.weights.layout import to_params

TABLE = (
    (r"(attentions\.\d+)\.to_out\.0$", r"\1.attn.to_out"),
    (r"(attentions\.\d+)\.(to_[qkv])$", r"\1.attn.\2"),
    # The names of files written before diffusers 0.18.
    (r"(attentions\.\d+)\.query$", r"\1.attn.to_q"),
    (r"(attentions\.\d+)\.key$", r"\1.attn.to_k"),
    (r"(attentions\.\d+)\.value$", r"\1.attn.to_v"),
    (r"(attentions\.\d+)\.proj_attn$", r"\1.attn.to_out"),
)
DENSE = ("to_q", "to_k", "to_v", "to_out")


def from_torch(state: Mapping[str, np.ndarray]) -> dict:
    """The tree that `AutoencoderKL.apply({'params': tree}, ...)` takes."""
    return to_params(state, TABLE, dense=DENSE)
