"""First stage: a KL autoencoder (Rombach et al. 2022, sec. 3.1 and appendix G; Kingma & Welling 2014).

    loss = |x - decode(z)|_p + kl_weight * KL(N(mean, var) || N(0, 1)),   z = mean + exp(logvar / 2) eps

The error is a mean over pixels and channels; the KL is a sum over the latent divided by the number of pixel values, so
that `kl_weight` keeps its meaning at any resolution. Images enter as u8 and are used in [-1, 1].
"""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.training import state as states
from ldm_jax.training.images import from_uint8

RECONSTRUCTIONS = {
    "l1": lambda error: jnp.abs(error),
    "l2": lambda error: jnp.square(error),
    "charbonnier": lambda error: jnp.sqrt(jnp.square(error) + 1e-4),
}


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (clipped, as they are looked at): f32[B]."""
    error = jnp.mean(jnp.square(jnp.clip(x, -1, 1) - jnp.clip(y, -1, 1)), axis=(1, 2, 3))
    return 10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))


def make(
    *,
    network: Any,
    optimizer: Any,
    schedule: Any,
    averages: states.Averages,
    batch_size: int,
    resolution: int,
    channels: int = 3,
    accumulate: int = 1,
    reconstruction: str = "l1",
    kl_weight: float = 1e-6,
) -> states.Task:
    """Task that trains `network` (encode, decode) under the name 'autoencoder'. Batches: {'image': u8[B, H, W, 3]}."""
    if reconstruction not in RECONSTRUCTIONS:
        raise ValueError(f"reconstruction {reconstruction!r} is unknown; there are {', '.join(RECONSTRUCTIONS)}")
    distance = RECONSTRUCTIONS[reconstruction]
    optimizers = {"autoencoder": optimizer}

    def init(key):
        k_params, k_state = jax.random.split(key)
        x = jnp.zeros((1, resolution, resolution, channels))
        params = {"autoencoder": network.init(k_params, x)["params"]}
        return states.create(k_state, params, optimizers, averages)

    def loss(params, frozen, batch, key):
        del frozen
        x = from_uint8(batch["image"])
        variables = {"params": params["autoencoder"]}
        posterior = network.apply(variables, x, method="encode")
        y = network.apply(variables, posterior.sample(key), method="decode")
        error = jnp.mean(distance(x - y))
        nats = jnp.mean(posterior.kl()) / x[0].size
        total = error + kl_weight * nats
        return total, {"loss": total, "reconstruction": error, "kl": nats, "psnr": jnp.mean(psnr(x, y))}

    step = states.make_step(loss, optimizers, schedule, averages, batch_size, accumulate)

    def validate(params, frozen, batch, key):
        """Reconstruction from the posterior's mean, as it is used later."""
        del frozen, key
        x = from_uint8(batch["image"])
        variables = {"params": params["autoencoder"]}
        posterior = network.apply(variables, x, method="encode")
        y = network.apply(variables, posterior.mean, method="decode")
        error = jnp.mean(distance(x - y), axis=(1, 2, 3))
        nats = posterior.kl() / x[0].size
        return {"val_loss": error + kl_weight * nats, "val_psnr": psnr(x, y), "val_kl": nats}

    def pictures(params, frozen, batch, key):
        del frozen, key
        x = from_uint8(batch["image"])
        variables = {"params": params["autoencoder"]}
        y = network.apply(variables, network.apply(variables, x, method="encode").mean, method="decode")
        return {"data": x, "reconstructions": y}

    return states.Task(init, step, validate, pictures, frozen={})
