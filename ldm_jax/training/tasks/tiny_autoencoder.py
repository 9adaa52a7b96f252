"""A small autoencoder for previews: an AutoencoderTiny that learns the latents of a first stage, in which a diffusion model works.

    loss = |encode(x) - z_mean|_2^2 + |x - decode(z)|_1,     z = (z_raw - mean) / std,   z_raw of the first stage's posterior

(after TAESD, the published AutoencoderTiny of Stable Diffusion's latents, whose losses are adversarial too.) z is drawn as
diffusion draws it, z_mean is that of the posterior's mean. Both are whitened, so that the small autoencoder decodes what a diffusion
model draws.
"""

import jax
import jax.numpy as jnp

from ldm_jax import models
from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.training import first_stage
from ldm_jax.training.images import psnr
from ldm_jax.training.state import create
from ldm_jax.training.step import make_step, value_and_grad
from ldm_jax.training.task import Context, Figures, Kind, Task


def make(context: Context) -> Task:
    """Task that trains `context.network`, an AutoencoderTiny, under the name 'autoencoder'. Batches: {'image': u8[B, H, W, 3]}.

    Raises ValueError for another network, and for one whose latents do not have the shape of the first stage's.
    """
    network, teacher, space = context.network, context.stage, context.space
    if not isinstance(network, AutoencoderTiny):
        raise ValueError(
            f"the task tiny_autoencoder trains autoencoder_tiny; config.model.name is that of a {type(network).__name__}"
        )
    x = jnp.zeros((1, *space.shape))
    shapes = models.shapes(network, space.shape)["params"]

    def shape(module, params):
        return jax.eval_shape(lambda params: first_stage.moments(module, params, x)["mean"], params).shape[1:]

    latents = shape(teacher.network, teacher.params), shape(network, shapes)
    if latents[0] != latents[1]:
        raise ValueError(f"config.model has latents of shape {latents[1]}; the first stage's have {latents[0]}")
    optimizers = {"autoencoder": context.optimizer()}

    def init(key):
        k_params, k_state = jax.random.split(key)
        params = {"autoencoder": models.init(network, k_params, space.shape)["params"]}
        return create(k_state, params, optimizers, context.averages)

    def errors(params, frozen, batch, key):
        """Both terms of the loss, and the PSNR of reconstructions from the first stage's latents, f32[B] each."""
        x, variables = space.load(batch[space.entry]), {"params": params["autoencoder"]}
        moments = first_stage.moments(teacher.network, frozen["autoencoder"], x)
        z_mean = first_stage.to_latent(teacher, frozen, {"mean": moments["mean"]}, key)
        z = first_stage.to_latent(teacher, frozen, moments, key)
        y = network.apply(variables, z, method="decode")
        latent = jnp.mean(jnp.square(network.apply(variables, x, method="encode") - z_mean), axis=(1, 2, 3))
        return {"latent": latent, "reconstruction": jnp.mean(jnp.abs(x - y), axis=(1, 2, 3)), "psnr": psnr(x, y)}

    def loss(params, state, frozen, batch, key):
        del state
        means = {name: jnp.mean(value) for name, value in errors(params, frozen, batch, key).items()}
        total = means["latent"] + means["reconstruction"]
        return total, {"loss": total, **means}, {}

    step = make_step(context, value_and_grad(loss), optimizers)

    def validate(params, frozen, batch, key):
        rows = errors(params, frozen, batch, key)
        rows["loss"] = rows["latent"] + rows["reconstruction"]
        return {f"val_{name}": value for name, value in rows.items()}

    def pictures(params, frozen, batch, key):
        x, variables = space.load(batch[space.entry]), {"params": params["autoencoder"]}
        z = first_stage.to_latent(teacher, frozen, batch, key, space)
        return {
            "data": x,
            "reconstructions": network.apply(variables, z, method="decode"),
            "teacher": first_stage.to_image(teacher, frozen, z),
        }

    return Task(init, step, validate, pictures, first_stage.frozen(teacher))


KIND = Kind(make, network="autoencoder", stage="must", figures=Figures("reconstructed"))
