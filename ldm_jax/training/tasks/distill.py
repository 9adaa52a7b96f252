"""A small autoencoder in the place of a first stage, for previews: AutoencoderTiny taught the latents that a diffusion model works in.

    loss = |encode(x) - z_mean|_2^2 + |x - decode(z)|_1,     z = (z_raw - mean) / std,   z_raw of the teacher's posterior

(after TAESD, the published AutoencoderTiny of Stable Diffusion's latents, whose losses are adversarial besides.) z is drawn as
diffusion draws it, z_mean is that of the posterior's mean; both are whitened, so that the student decodes what a diffusion model gives.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.training import first_stage as stages
from ldm_jax.training import state as states
from ldm_jax.training.images import from_uint8
from ldm_jax.training.tasks.autoencoder import psnr


def make(
    *,
    network: Any,
    teacher: stages.FirstStage,
    optimizer: Any,
    schedule: Any,
    averages: states.Averages,
    batch_size: int,
    resolution: int,
    accumulate: int = 1,
) -> states.Task:
    """Task that trains `network`, an AutoencoderTiny, under the name 'autoencoder'. Batches: {'image': u8[B, H, W, 3]}.

    Raises ValueError for another network, and for one whose latents do not have the teacher's shape.
    """
    if not isinstance(network, AutoencoderTiny):
        raise ValueError(
            f"the task distill trains autoencoder_tiny; config.model.name is that of a {type(network).__name__}"
        )
    x = jnp.zeros((1, resolution, resolution, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)["params"]

    def shape(module, params):
        return jax.eval_shape(lambda params: stages.moments(module, params, x)["mean"], params).shape[1:]

    latents = shape(teacher.network, teacher.params), shape(network, shapes)
    if latents[0] != latents[1]:
        raise ValueError(f"config.model has latents of shape {latents[1]}; the first stage's have {latents[0]}")
    optimizers = {"autoencoder": optimizer}

    def init(key):
        k_params, k_state = jax.random.split(key)
        return states.create(k_state, {"autoencoder": network.init(k_params, x)["params"]}, optimizers, averages)

    def errors(params, frozen, batch, key):
        """Both terms of the loss, and the PSNR of reconstructions from the teacher's latents, f32[B] each."""
        x, own = from_uint8(batch["image"]), {"params": params["autoencoder"]}
        found = stages.moments(teacher.network, frozen["autoencoder"], x)
        z_mean = stages.to_latent(teacher, frozen, {"mean": found["mean"]}, key)
        z = stages.to_latent(teacher, frozen, found, key)
        y = network.apply(own, z, method="decode")
        latent = jnp.mean(jnp.square(network.apply(own, x, method="encode") - z_mean), axis=(1, 2, 3))
        return {"latent": latent, "reconstruction": jnp.mean(jnp.abs(x - y), axis=(1, 2, 3)), "psnr": psnr(x, y)}

    def loss(params, frozen, batch, key):
        found = {name: jnp.mean(value) for name, value in errors(params, frozen, batch, key).items()}
        total = found["latent"] + found["reconstruction"]
        return total, {"loss": total, **found}

    step = states.make_step(loss, optimizers, schedule, averages, batch_size, accumulate)

    def validate(params, frozen, batch, key):
        found = errors(params, frozen, batch, key)
        found["loss"] = found["latent"] + found["reconstruction"]
        return {f"val_{name}": value for name, value in found.items()}

    def pictures(params, frozen, batch, key):
        x, own = from_uint8(batch["image"]), {"params": params["autoencoder"]}
        z = stages.to_latent(teacher, frozen, batch, key)
        return {
            "data": x,
            "reconstructions": network.apply(own, z, method="decode"),
            "teacher": stages.to_image(teacher, frozen, z),
        }

    return states.Task(init, step, validate, pictures, stages.frozen(teacher))
