"""The space that a diffusion model lives in: pixels, or the whitened latents of a trained autoencoder.

    z = (z_raw - mean) / std,   z_raw ~ N(posterior mean, posterior std^2)

with `mean` and `std` f32[C] of z_raw over training images (whitening.py), so that every channel has zero mean and unit variance
whatever the autoencoder (Karras et al. 2024, EDM2, appendix B.2, in the place of one typed constant). A published autoencoder has
constants of its own, which stand for them: mean = shift_factor, std = 1 / scaling_factor (published.py). An autoencoder without a
posterior (VQ and FSQ, before quantization; the tiny one) has one z_raw an image.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.autoencoder_kl import Posterior
from ldm_jax.sampling.model import Space

IMAGES = Space(())


class FirstStage(NamedTuple):
    """`network`: linen module with encode and decode; `params` its parameters; `mean`, `std` f32[C]; `shape` of a latent, (h, w, C) of
    an image's.

    `sha256` names the latents. Of a published autoencoder, `decoder` is the sha256 of what decodes them, `published` its description
    (weights.autoencoders.Autoencoder); '' and None for one that was trained here.
    """

    network: Any
    params: Any
    mean: np.ndarray
    std: np.ndarray
    shape: tuple[int, ...]
    sha256: str = ""
    decoder: str = ""
    published: Any = None


def whitened(stage: FirstStage, mean: np.ndarray, std: np.ndarray) -> FirstStage:
    """The stage with other constants of whitening, f32[C] each."""
    return stage._replace(mean=np.asarray(mean, np.float32), std=np.asarray(std, np.float32))


def frozen(stage: FirstStage | None) -> dict[str, Any]:
    """What a compiled step is handed: parameters and statistics as arrays ({} for pixels)."""
    if stage is None:
        return {}
    return {"autoencoder": stage.params, "mean": jnp.asarray(stage.mean), "std": jnp.asarray(stage.std)}


def moments(network: Any, params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """'mean' and 'std' f32[B, h, w, C] of z_raw, of images f32[B, H, W, 3] in [-1, 1]; no 'std' where it is always 0."""
    encoded = network.apply({"params": params}, x, method="encode")
    if isinstance(encoded, Posterior):
        return {"mean": encoded.mean, "std": jnp.exp(0.5 * encoded.logvar)}
    return {"mean": encoded}


def latent_shape(network: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the latents of data of `shape`, (H, W, 3) of images; no parameters are needed. ValueError where there are none."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def encode(x):
        return network.init_with_output(jax.random.key(0), x, method="encode")[0]

    try:
        encoded = jax.eval_shape(encode, images)
    except ValueError as error:
        raise ValueError(f"config.input.resolution={shape[0]} does not fit the first stage: {error}") from None
    return tuple((encoded.mean if isinstance(encoded, Posterior) else encoded).shape[1:])


def _whitened(frozen: dict[str, Any], z: jax.Array) -> jax.Array:
    return (z - frozen["mean"]) / frozen["std"]


def to_latent(
    stage: FirstStage | None, frozen: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array, space: Space = IMAGES
) -> jax.Array:
    """Clean x of a batch, f32[B, *shape]: the data itself, pixels in [-1, 1]; or whitened latents drawn from the posterior, of the data
    or of cached moments ('mean', 'std'). `space`: that of the data, which says where the batch holds it."""
    if stage is None:
        return space.load(batch[space.entry])
    held = batch
    if "mean" not in batch:
        held = moments(stage.network, frozen["autoencoder"], space.load(batch[space.entry]))
    z = held["mean"].astype(jnp.float32)
    if "std" in held:
        z += held["std"].astype(jnp.float32) * jax.random.normal(key, z.shape)
    return _whitened(frozen, z)


def encode(stage: FirstStage | None, frozen: dict[str, Any], images: jax.Array) -> jax.Array:
    """x of images f32[B, H, W, 3] in [-1, 1] without noise: themselves, or the whitened mean of the posterior."""
    if stage is None:
        return images
    z = moments(stage.network, frozen["autoencoder"], images)["mean"].astype(jnp.float32)
    return _whitened(frozen, z)


def to_image(stage: FirstStage | None, frozen: dict[str, Any], x: jax.Array) -> jax.Array:
    """Images f32[B, H, W, 3], nominally in [-1, 1], of clean x."""
    if stage is None:
        return x
    z = x * frozen["std"] + frozen["mean"]
    return stage.network.apply({"params": frozen["autoencoder"]}, z, method="decode")
