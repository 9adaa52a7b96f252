"""A classifier of x_t, for classifier guidance (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

    loss = E_t,eps  -log p(y | x_t, t),    x_t = alpha x + sigma eps,    y the label of x

x is an image or, with a first stage, its whitened latent: the space of the diffusion model that it will guide. Both must have one
process. `log_prob` is what diffusion/guidance.classifier takes.

Validation is the cross entropy and the accuracy at fixed times, at each noise level and on average. Near t = 1 x_t says little of
its class, so that the average accuracy is far from 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.diffusion.loss import TIMES, sample_times
from ldm_jax.diffusion.process import Process, corrupt, per_row
from ldm_jax.training import first_stage
from ldm_jax.training.state import create
from ldm_jax.training.step import make_step, value_and_grad
from ldm_jax.training.task import Context, Kind, Task
from ldm_jax.training.tasks.classifier import check_classes

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def logits(network: Any, params: Any, process: Process, x_t: jax.Array, t: jax.Array, **options: Any) -> jax.Array:
    """f32[B, num_classes] of x_t [B, H, W, C] at times t f32[B].

    The network takes x_t scaled to a variance of about 1, whatever the process, and the process's time input.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    scale = jax.lax.rsqrt((alpha * process.sigma_data) ** 2 + sigma**2)
    return network.apply({"params": params}, x_t * per_row(scale, x_t), process.time_input(t), **options)


def log_prob(
    network: Any, params: Any, process: Process, label: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(x_t [B, H, W, C], t f32[B]) -> log p(label | x_t) f32[B], of labels i32[B]: what diffusion/guidance.classifier takes."""

    def log_prob(x_t: jax.Array, t: jax.Array) -> jax.Array:
        rows = jax.nn.log_softmax(logits(network, params, process, x_t, t))
        return jnp.take_along_axis(rows, label[:, None], -1)[:, 0]

    return log_prob


def make(context: Context, *, times: str = "uniform", stratified: bool = True, label_smoothing: float = 0.0) -> Task:
    """Task that trains `context.network`(x, t) -> logits under the name 'noisy_classifier'.

    Batches: 'image' u8[B, H, W, 3] or cached 'mean' and 'std' of latents; 'label' i32[B]. `times`, `stratified`: as in
    diffusion.loss.sample_times; `label_smoothing`: the share of the target that is spread over all classes. Raises ValueError naming
    the key of the config that is off.
    """
    if times not in TIMES:
        raise ValueError(f"task.times is {times!r}; there are {', '.join(TIMES)}")
    network, process, stage, space = context.network, context.process, context.stage, context.space
    shape = stage.shape if stage else space.shape
    if network.in_channels != shape[-1]:
        raise ValueError(f"config.model.in_channels={network.in_channels}, but what is classified has shape {shape}")
    optimizers = {"noisy_classifier": context.optimizer()}

    def init(key):
        k_params, k_state = jax.random.split(key)
        params = network.init(k_params, jnp.zeros((1, *shape)), jnp.zeros(1))["params"]
        return create(k_state, {"noisy_classifier": params}, optimizers, context.averages)

    def classify(params, x, t, key, **options):
        x_t = corrupt(process, x, jax.random.normal(key, x.shape), t)
        return logits(network, params["noisy_classifier"], process, x_t, t, **options)

    def loss(params, state, frozen, batch, key):
        del state
        k_latent, k_times, k_noise, k_drop = jax.random.split(key, 4)
        x = first_stage.to_latent(stage, frozen, batch, k_latent, space)
        t = sample_times(k_times, len(x), times, process=process, stratified=stratified)
        rows = classify(params, x, t, k_noise, train=True, rngs={"dropout": k_drop})
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], rows.shape[-1]), label_smoothing)
        error = jnp.mean(optax.softmax_cross_entropy(rows, target))
        return error, {"loss": error, "accuracy": jnp.mean(jnp.argmax(rows, -1) == batch["label"])}, {}

    def validate(params, frozen, batch, key):
        k_latent, k_noise = jax.random.split(key)
        x = first_stage.to_latent(stage, frozen, batch, k_latent, space)
        levels = {"val_loss": {}, "val_accuracy": {}}
        for i, level in enumerate(LEVELS):
            t = jnp.full(len(x), process.t_min + level * (process.t_max - process.t_min))
            rows = classify(params, x, t, jax.random.fold_in(k_noise, i))
            right = (jnp.argmax(rows, -1) == batch["label"]).astype(jnp.float32)
            error = optax.softmax_cross_entropy_with_integer_labels(rows, batch["label"])
            levels["val_loss"][f"val_loss/t{level}"] = error
            levels["val_accuracy"][f"val_accuracy/t{level}"] = right
        means = {name: jnp.mean(jnp.stack([*values.values()]), 0) for name, values in levels.items()}
        return means | levels["val_loss"] | levels["val_accuracy"]

    return Task(init, make_step(context, value_and_grad(loss), optimizers), validate, frozen=first_stage.frozen(stage))


KIND = Kind(make, network="noisy_classifier", stage="may", latents=True, check_classes=check_classes)
