"""The space that a diffusion model lives in: pixels, or the whitened latents of a trained autoencoder.

    z = (z_raw - mean) / std,   z_raw ~ N(posterior mean, exp(logvar))

with `mean` and `std` f32[C] of z_raw over training images (whitening.py), so that every channel has zero mean and unit variance
whatever the autoencoder (Karras et al. 2024, EDM2, appendix B.2, in the place of one typed constant).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.autoencoder_kl import Posterior
from ldm_jax.training.images import from_uint8


class FirstStage(NamedTuple):
    """`network`: linen module with encode and decode; `params` its parameters; `mean`, `std` f32[C]; `shape` (h, w, C) of a latent."""

    network: Any
    params: Any
    mean: np.ndarray
    std: np.ndarray
    shape: tuple[int, int, int]
    sha256: str = ""


def frozen(stage: FirstStage | None) -> dict[str, Any]:
    """What a compiled step is handed: parameters and statistics as arrays ({} for pixels)."""
    if stage is None:
        return {}
    return {"autoencoder": stage.params, "mean": jnp.asarray(stage.mean), "std": jnp.asarray(stage.std)}


def to_latent(
    stage: FirstStage | None, frozen: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array
) -> jax.Array:
    """Clean x of a batch, f32[B, h, w, C]: pixels in [-1, 1]; or whitened latents drawn from the posterior, of 'image' or of cached
    moments ('mean', 'logvar')."""
    if stage is None:
        return from_uint8(batch["image"])
    if "mean" in batch:
        posterior = Posterior(batch["mean"].astype(jnp.float32), batch["logvar"].astype(jnp.float32))
    else:
        x = from_uint8(batch["image"])
        posterior = stage.network.apply({"params": frozen["autoencoder"]}, x, method="encode")
    return (posterior.sample(key) - frozen["mean"]) / frozen["std"]


def to_image(stage: FirstStage | None, frozen: dict[str, Any], x: jax.Array) -> jax.Array:
    """Images f32[B, H, W, 3], nominally in [-1, 1], of clean x."""
    if stage is None:
        return x
    z = x * frozen["std"] + frozen["mean"]
    return stage.network.apply({"params": frozen["autoencoder"]}, z, method="decode")
