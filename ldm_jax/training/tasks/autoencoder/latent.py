"""From images to latents, for each kind of autoencoder.

autoencoder    z                                  penalties
KL             mean + exp(logvar / 2) eps         kl                       Kingma & Welling 2014
VQ             before quantization                codebook, commitment     van den Oord et al. 2017
FSQ, tiny      before rounding; z                 none
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.models.fsq import FSQModel
from ldm_jax.models.vq import VQModel


class Latent(NamedTuple):
    """z f32[B, h, w, D] as `decode` takes it, its penalties f32[B] by name, and with a codebook indices i32[B, h, w]."""

    z: jax.Array
    penalties: dict[str, jax.Array]
    indices: jax.Array | None


def _gaussian(network: AutoencoderKL, variables: Any, x: jax.Array, key: jax.Array | None) -> Latent:
    posterior = network.apply(variables, x, method="encode")
    z = posterior.mean if key is None else posterior.sample(key)
    return Latent(z, {"kl": posterior.kl() / x[0].size}, None)


def _quantized(network: VQModel | FSQModel, variables: Any, x: jax.Array, key: jax.Array | None) -> Latent:
    z = network.apply(variables, x, method="encode")
    q = network.apply(variables, z, method="quantized")
    errors = {"codebook": q.codebook, "commitment": q.commitment} if isinstance(network, VQModel) else {}
    return Latent(z, errors, q.indices)


def _certain(network: AutoencoderTiny, variables: Any, x: jax.Array, key: jax.Array | None) -> Latent:
    return Latent(network.apply(variables, x, method="encode"), {}, None)


class Kind(NamedTuple):
    """encode(network, {'params': ...}, x f32[B, H, W, 3], key) -> Latent, without a key the posterior's mean, as latents are used
    later; the names of its penalties."""

    encode: Callable[[Any, Any, jax.Array, jax.Array | None], Latent]
    penalties: tuple[str, ...] = ()


KINDS: dict[type, Kind] = {
    AutoencoderKL: Kind(_gaussian, ("kl",)),
    AutoencoderTiny: Kind(_certain),
    FSQModel: Kind(_quantized),
    VQModel: Kind(_quantized, ("codebook", "commitment")),
}


def last_kernel(half: Mapping[str, Any]) -> jax.Array:
    """The kernel of the last convolution of an encoder's or decoder's parameters."""
    name = "conv_out" if "conv_out" in half else max(half, key=lambda name: int(name.rpartition("_")[2]))
    return half[name]["kernel"]
