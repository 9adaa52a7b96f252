"""Diffusion in pixels or latents, told labels and captions or nothing (Ho et al. 2020; Rombach et al. 2022; Lipman et al. 2023).

    loss = E_t,eps  weight(t) |F(x_t, t, cond) - target|^2,    x_t = alpha x + sigma eps

and, where F has learned variance, the hybrid bound of Nichol & Dhariwal 2021 (loss.diffusion_loss).

Networks: 'denoiser' and, with captions, the text encoder 'text', trained together. Validation is the unweighted error at fixed
times, at each noise level and on average.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import loss as losses
from ldm_jax.training import conditioning as conditions
from ldm_jax.training import first_stage as stages
from ldm_jax.training import sampling
from ldm_jax.training import state as states
from ldm_jax.training.images import from_uint8

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def make(
    *,
    model: sampling.Model,
    settings: sampling.Settings,
    optimizers: dict[str, Any],
    schedule: Any,
    averages: states.Averages,
    batch_size: int,
    accumulate: int = 1,
    times: str = "uniform",
    weight: str = "simple",
    stratified: bool = True,
    drop: float = 0.1,
    vlb_weight: float = 1e-3,
) -> states.Task:
    """Task that trains `model.denoiser` (and the text encoder). Batches: 'image' u8 or cached 'mean' and 'logvar'; 'label'; 'tokens'.

    `times`, `weight`: names in diffusion.loss; `stratified` as there; `drop`: how often a row is told nothing, for guidance;
    `vlb_weight`: what the bound counts where the model learns its variance (task.learned_variance).
    """
    for what, name, known in (("times", times, losses.TIMES), ("weight", weight, losses.WEIGHTS)):
        if name not in known:
            raise ValueError(f"task.{what} is {name!r}; there are {', '.join(known)}")
    if not 0 <= drop < 1:
        raise ValueError(f"task.drop is {drop}; expected a probability in [0, 1)")
    process, kind, conditioning = model.process, model.prediction, model.conditioning
    guide = conditions.conditional(conditioning)

    def init(key):
        k_params, k_text, k_state = jax.random.split(key, 3)
        params = conditions.init(conditioning, k_text)
        cond = conditions.nothing(conditioning, params, 1)
        params["denoiser"] = model.denoiser.init(k_params, jnp.zeros((1, *model.shape)), jnp.zeros(1), cond)["params"]
        return states.create(k_state, params, optimizers, averages)

    def apply(params, x, t, cond, key=None):
        rngs = {} if key is None else {"dropout": key}
        return model.denoiser.apply({"params": params}, x, t, cond, train=key is not None, rngs=rngs)

    def loss(params, frozen, batch, key):
        k_latent, k_drop, k_loss, k_net = jax.random.split(key, 4)
        x = stages.to_latent(model.stage, frozen, batch, k_latent)
        dropped = jax.random.bernoulli(k_drop, drop, x.shape[:1]) if guide and drop else None
        cond = conditions.condition(conditioning, params, batch, dropped)
        rows, _ = losses.diffusion_loss(
            functools.partial(apply, key=k_net),
            params["denoiser"],
            process,
            kind,
            x,
            cond,
            k_loss,
            # One time in each B-th of the unit interval: the loss of a batch is less noisy at no cost.
            dist=functools.partial(losses.sample_times, dist=times, process=process, stratified=stratified),
            weight=weight,
            learned_variance=model.learned_variance,
            vlb_weight=vlb_weight,
        )
        total = jnp.mean(rows)
        return total, {"loss": total}

    step = states.make_step(loss, optimizers, schedule, averages, batch_size, accumulate)

    def validate(params, frozen, batch, key):
        k_latent, k_noise = jax.random.split(key)
        x = stages.to_latent(model.stage, frozen, batch, k_latent)
        cond = conditions.condition(conditioning, params, batch)
        out = {}
        for i, level in enumerate(LEVELS):
            t = jnp.full(x.shape[0], process.t_min + level * (process.t_max - process.t_min))
            key_i = jax.random.fold_in(k_noise, i)
            out[f"val_loss/t{level}"], _ = losses.diffusion_loss(
                apply,
                params["denoiser"],
                process,
                kind,
                x,
                cond,
                key_i,
                t=t,
                learned_variance=model.learned_variance,
                vlb_weight=0,
            )
        return {"val_loss": jnp.mean(jnp.stack(list(out.values())), 0), **out}

    generate = sampling.make_generate(model, settings)

    def pictures(params, frozen, batch, key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch["label"].shape[0]))
        times = sampling.make_times(model, settings)
        out = {"samples": generate(params, frozen, keys, batch, times, jnp.float32(settings.guidance))}
        if "image" in batch:
            out["data"] = from_uint8(batch["image"])
        return out

    return states.Task(init, step, validate, pictures, stages.frozen(model.stage))
