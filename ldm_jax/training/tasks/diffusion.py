"""Diffusion of data of any rank, or of its latents, under conditions (Ho et al. 2020; Rombach et al. 2022; Lipman et al. 2023).

    loss = E_t,eps  weight(t) |F(x_t, t, cond) - target|^2,    x_t = alpha x + sigma eps

and, where F has learned variance, the hybrid bound of Nichol & Dhariwal 2021 (loss.diffusion_loss). Two options make the noise
levels contribute evenly. Both learn the size of the loss at each level:

    uncertainty             loss_i -> loss_i exp(-u(t_i)) + u(t_i), u trained beside F (Karras et al. 2024, EDM2, equation 14)
    times='loss_history'    t drawn with p(t) ~ sqrt(E[loss^2]), loss_i -> loss_i / p(t_i) (Nichol & Dhariwal 2021, equation 18)

Networks: 'denoiser', with captions the text encoder 'text', and 'uncertainty' where it is learned; all trained together. Validation
is the unweighted error at fixed times, at each noise level and on average; that of a score times sigma^2, which is alike at all levels.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import loss as losses
from ldm_jax.diffusion.prediction import PREDICTIONS
from ldm_jax.sampling.model import joined
from ldm_jax.training import conditioning, first_stage, sampling
from ldm_jax.training.state import create
from ldm_jax.training.step import make_step, value_and_grad
from ldm_jax.training.task import Context, Figures, Kind, Task

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)

BY_LOSS = "loss_history"
BINS = 100  # of the history where the process has no table
WAVES = 32


def log_size(params: dict[str, jax.Array], t: jax.Array) -> jax.Array:
    """u(t) f32[B], the learned logarithm of the loss at t f32[B]: sum_k w_k sqrt(2) cos(pi k t), k = 0 .. 31, 'weight' f32[32].

    EDM2's is linear in random Fourier features of log sigma; cosines of t, which is bounded, do without drawing any.
    """
    k = jnp.arange(WAVES, dtype=jnp.float32)
    return math.sqrt(2) * jnp.cos(math.pi * t[:, None] * k) @ params["weight"]


def model(context: Context, *, prediction: str, learned_variance: bool = False, **training: Any) -> sampling.Model:
    """What diffuses: the network with its process, its condition and its space. `training`: the keys of `make` that drawing ignores.

    Raises ValueError when network, data and first stage do not fit together.
    """
    del training
    network, process = context.network, context.process
    shape = context.stage.shape if context.stage else context.space.shape
    takes = context.conditioning
    check_classes(network, bool(takes.num_classes), context.num_classes)
    shapes = conditioning.entries(takes, first_stage.frozen(context.stage) | conditioning.frozen(takes))
    conditioning.check(shapes, network, type(network).__name__)
    joined = conditioning.channels(shapes)
    if network.in_channels != shape[-1] + sum(joined.values()):
        more = "".join(f" and config.condition.{name} joins {count} channels" for name, count in joined.items())
        more += f"; expected {shape[-1] + sum(joined.values())}" if joined else ""
        raise ValueError(
            f"config.model.in_channels={network.in_channels}, but what is modelled has shape {shape}{more}"
        )
    if prediction not in PREDICTIONS:
        raise ValueError(f"config.task.prediction={prediction!r}; there are {', '.join(PREDICTIONS)}")
    channels = shape[-1] * (2 if learned_variance else 1)
    if (network.out_channels or network.in_channels) != channels:
        raise ValueError(
            f"config.model.out_channels={network.out_channels}, but {shape[-1]} channels are modelled and "
            f"config.task.learned_variance is {learned_variance}, so expected {channels}"
        )
    if learned_variance and process.levels is None:
        raise ValueError(
            "config.task.learned_variance needs a process with a table of times, such as config.process.name='discrete_vp'"
        )
    return sampling.Model(
        network, context.conditioning, context.stage, process, prediction, shape, learned_variance, context.space
    )


def check_classes(network: Any, label: bool, num_classes: int) -> None:
    """Raise ValueError unless a denoiser has the table of classes that config.condition.label and the data ask for."""
    count = num_classes if label else 0
    # A table with a row for the null class: `num_classes` of DiT counts without it, `num_class_embeds` of the U-Net with it.
    for key, expected in (("num_classes", count), ("num_class_embeds", count + 1 if count else None)):
        if hasattr(network, key) and getattr(network, key) != expected:
            raise ValueError(
                f"config.model.{key}={getattr(network, key)}; the data has {num_classes} classes and config.condition.label is "
                f"{label}, so expected {expected}"
            )


def classes(network: Any, label: bool) -> int:
    """How many classes a denoiser was made for. Raises ValueError where it has some and `label` is False, or none and it is True."""
    key = "num_classes" if hasattr(network, "num_classes") else "num_class_embeds"
    value = getattr(network, key, None)
    count = value if key == "num_classes" else (value or 1) - 1
    if bool(count) != label:
        raise ValueError(
            f"config.model.{key}={value}, but config.condition.label is {label}; expected "
            + ("the number of classes" if label else "none")
        )
    return count


def make(
    context: Context,
    *,
    prediction: str,
    learned_variance: bool = False,
    times: str = "uniform",
    weight: str = "simple",
    stratified: bool = True,
    drop: float = 0.1,
    vlb_weight: float = 1e-3,
    uncertainty: bool = False,
) -> Task:
    """Task that trains `context.network` (and the text encoder). Batches: the data, 'image' u8, or cached 'mean' and 'std'; what
    the conditions read.

    `prediction`: what the network predicts, a name in PREDICTIONS; `learned_variance`: it has channels for the variance of a step too.
    A score is trained with the weight 'snr', which is lambda(t) = sigma^2 on its error (Song & Ermon 2019, arXiv:1907.05600, eq. 6);
    'simple' would leave it to the smallest noise.
    `times`, `weight`: names in diffusion.loss, or times='loss_history'; `stratified` as there (a history draws independent
    times); `drop`: the probability of a row to be trained without its condition, for guidance; `vlb_weight`: weight of the bound
    where the variance is learned; `uncertainty`: learn u(t), under a network of that name.

    The metric 'loss' is the mean of the weighted loss over times as `times` names them, uniform ones for a history; 'uncertainty'
    the mean of u. Raises ValueError naming the key of config.task that is off.
    """
    for key, name, table in (("times", times, (*losses.TIMES, BY_LOSS)), ("weight", weight, losses.WEIGHTS)):
        if name not in table:
            raise ValueError(f"task.{key} is {name!r}; there are {', '.join(table)}")
    if not 0 <= drop < 1:
        raise ValueError(f"task.drop is {drop}; expected a probability in [0, 1)")
    by_loss = times == BY_LOSS
    if by_loss and uncertainty:
        raise ValueError(f"task.times is {BY_LOSS!r} and task.uncertainty is set: both even out the loss; expected one")
    diffuses = model(context, prediction=prediction, learned_variance=learned_variance)
    process, kind, takes, space = diffuses.process, diffuses.prediction, diffuses.conditioning, context.space
    trained = [condition.name for condition in takes.conditions if condition.init is not None]
    names = ["denoiser", *trained] + (["uncertainty"] if uncertainty else [])
    optimizers = dict.fromkeys(names, context.optimizer())

    def init(key):
        k_params, k_text, k_state = jax.random.split(key, 3)
        params = conditioning.init(takes, k_text)
        params["denoiser"] = sampling.init(diffuses, k_params, params)
        if uncertainty:
            params["uncertainty"] = {"weight": jnp.zeros(WAVES)}
        history = {BY_LOSS: losses.loss_history(process.levels or BINS)} if by_loss else {}
        return create(k_state, params, optimizers, context.averages, history)

    def apply(params, x, t, cond, key=None):
        rngs = {} if key is None else {"dropout": key}
        x, cond = joined(x, cond)
        return diffuses.denoiser.apply({"params": params}, x, t, cond, train=key is not None, rngs=rngs)

    def loss(params, state, frozen, batch, key):
        k_latent, k_drop, k_loss, k_net = jax.random.split(key, 4)
        x = first_stage.to_latent(diffuses.stage, frozen, batch, k_latent, space)
        cond = conditioning.training(takes, params, frozen, batch, k_drop, drop, len(x))
        t, share = None, 1.0
        if by_loss:
            # diffusion_loss would draw times from this key. It leaves the key unused where it gets times.
            k_times = jax.random.split(k_loss)[0]
            t, share = losses.sample_by_loss(k_times, x.shape[0], state.variables[BY_LOSS], process=process)
        rows, aux = losses.diffusion_loss(
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
            t=t,
            learned_variance=diffuses.learned_variance,
            vlb_weight=vlb_weight,
        )
        total = jnp.mean(share * rows)
        metrics = {"loss": total}
        if uncertainty:
            u = log_size(params["uncertainty"], aux["t"])
            total = jnp.mean(losses.with_uncertainty(rows, u))
            metrics["uncertainty"] = jnp.mean(u)
        if by_loss:
            metrics |= {"t": aux["t"], "rows": rows}
        return total, metrics, {}

    def record(state, rows, key):
        del key
        history = losses.record_losses(state.variables[BY_LOSS], rows["t"], rows["rows"])
        return {BY_LOSS: history}, {}

    step = make_step(context, value_and_grad(loss), optimizers, record if by_loss else None)

    def validate(params, frozen, batch, key):
        k_latent, k_noise = jax.random.split(key)
        x = first_stage.to_latent(diffuses.stage, frozen, batch, k_latent, space)
        keys = jax.random.split(jax.random.fold_in(key, conditioning.number("rows")), len(x))
        cond = conditioning.complete(takes, params, frozen, batch, keys)
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
                weight="snr" if kind == "score" else "simple",  # the error of a score is that of eps / sigma
                t=t,
                learned_variance=diffuses.learned_variance,
                vlb_weight=0,
            )
        return {"val_loss": jnp.mean(jnp.stack(list(out.values())), 0), **out}

    preview = context.preview
    generate, frozen = sampling.make_generate(diffuses, context.settings, preview), sampling.frozen(diffuses, preview)

    def pictures(params, frozen, batch, key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch["label"].shape[0]))
        times = sampling.make_times(diffuses, context.settings)
        out = {"samples": generate(params, frozen, keys, batch, times, jnp.float32(context.settings.guidance))}
        if space.entry in batch:
            out["data"] = space.load(batch[space.entry])
        for condition in takes.conditions:
            if condition.show is not None:
                values = conditioning.read(takes, frozen, batch, keys, drawing=True)
                out[condition.name] = condition.show(values[condition.name])
        return out

    shown = pictures if space.entry == "image" else None
    return Task(init, step, validate, shown, frozen, conditioning.facts(takes))


KIND = Kind(
    make,
    network="denoiser",
    stage="may",
    latents=True,
    conditioned=True,
    model=model,
    figures=Figures("drawn"),
    classes=classes,
    check_classes=check_classes,
)
