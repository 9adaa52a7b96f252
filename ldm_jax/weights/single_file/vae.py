"""An autoencoder alone, in the latent-diffusion layout. The file does not say the scale of its latents: SD's is assumed."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.weights.single_file import autoencoder
from ldm_jax.weights.single_file.family import Family, Kind
from ldm_jax.weights.single_file.latent_diffusion import has_unet
from ldm_jax.weights.single_file.measure import Shapes
from ldm_jax.weights.single_file.stable_diffusion import SCALING

# Such a file is written without a prefix.
PREFIXES = ("", *(prefix for prefix in autoencoder.PREFIXES if prefix))
PART = autoencoder.part(SCALING, PREFIXES)


def recognises(shapes: Shapes) -> str | None:
    """'vae' for a file with an autoencoder and without a U-Net."""
    return "vae" if PART.prefix(shapes) is not None and not has_unet(shapes) else None


def suits(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """'vae' for an autoencoder alone."""
    return "vae" if set(configs) == {"vae"} else None


VAE = Family(
    autoencoder.PREFIXES[0] + autoencoder.MARK,
    {"vae": Kind("vae", None, 0, {})},
    {"vae": PART},
    recognises,
    size=lambda kind, prediction: 512,
    scheduler=lambda shapes, kind, prediction: None,
    suits=suits,
)
