"""Parameters of `models.unet` from diffusers' UNet2DConditionModel and UNet2DModel: the names that differ."""

from collections.abc import Mapping

import numpy as np

from ldm_jax.weights import autoencoder_kl
from ldm_jax.weights.layout import stack_layers, to_params

TABLE = (
    *autoencoder_kl.TABLE,
    (r"(attn[12])\.to_out\.0$", r"\1.to_out"),
    (r"ff\.net\.0\.proj$", "ff_in"),
    (r"ff\.net\.2$", "ff_out"),
    # Early DDPM checkpoints hold each resampling convolution under two names at once.
    (r"(samplers\.0)\.Conv2d_0$", r"\1.conv"),
)
DENSE = (*autoencoder_kl.DENSE, "proj_in", "proj_out")


def from_torch(state: Mapping[str, np.ndarray], scan_layers: bool = False) -> dict:
    """The tree that `UNet.apply({'params': tree}, ...)` takes; `scan_layers` as in the module."""
    state = dict(state)
    frequencies = state.pop("time_proj.weight", None)
    state.pop("time_proj.W", None)
    embeddings = () if "class_embedding.bias" in state else ("class_embedding",)
    params = to_params(state, TABLE, embeddings, DENSE)
    if frequencies is not None:
        params["time_proj"] = np.asarray(frequencies)
    return stack_layers(params, "transformer_blocks") if scan_layers else params
