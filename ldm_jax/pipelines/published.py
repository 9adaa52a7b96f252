"""A published pipeline's parts as something to draw from: its network, its latents, its conditions, its scheduler's file."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.samplers import SAMPLERS, Sampler
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.components import Parts
from ldm_jax.pipelines.conditions import classes_of, conditions, guidance_embedding
from ldm_jax.pipelines.drawable import Asked, Course, Drawable, Frame, Takes
from ldm_jax.pipelines.kinds import PIPELINES, Kind
from ldm_jax.sampling.model import Model, Network, Space
from ldm_jax.sampling.settings import EXACT, Settings, check_named
from ldm_jax.schedules import Schedule, respaced


class Method(NamedTuple):
    """The sampler of a schedule, hashable."""

    schedule: Schedule

    def __call__(self) -> Sampler:
        return self.schedule.method()


class Clipped(NamedTuple):
    """What a schedule does to the clean estimate, hashable."""

    schedule: Schedule

    def __call__(self, denoise: Denoiser) -> Denoiser:
        return self.schedule.clipped(denoise)


def _from_unit(params: Any, x: Array) -> Array:
    return 2 * x - 1


def _to_unit(params: Any, x: Array) -> Array:
    return x / 2 + 0.5


def space_of(parts: Parts, kind: Kind, shape: tuple[int, ...]) -> tuple[Space, Any]:
    """What the network models and the parameters of its encoder and decoder: latents, or pixels in [-1, 1] or [0, 1]."""
    if parts.autoencoder is not None:
        return L.space(parts.autoencoder.module, shape, parts.tile), L.parameters(parts.autoencoder)
    if kind.darkest == 0:
        return Space(shape, _to_unit, _from_unit), {}
    return Space(shape), {}


def frame_of(parts: Parts) -> Frame:
    """The sizes of pictures, of the denoiser's config.json and the autoencoder's levels."""
    module, vae = parts.denoiser.module, parts.autoencoder
    factor = 1 if vae is None else L.factor(vae.module)
    halves = module.patch_size if hasattr(module, "patch_size") else module.multiple
    latent = parts.denoiser.config.get("sample_size")
    if latent is not None:
        latent = (latent, latent) if isinstance(latent, int) else tuple(map(int, latent))
    channels = module.in_channels if vae is None else vae.module.latent_channels
    return Frame(factor, factor * halves, latent, channels)


def with_options(schedule: Schedule, options: dict[str, Any]) -> Schedule:
    """The schedule whose update rule has these options. ValueError for options that it does not have, and for wrong values."""
    if not options:
        return schedule
    check_named("sampler", schedule.sampler, SAMPLERS, options)
    schedule = schedule._replace(choices=tuple(sorted((dict(schedule.choices) | options).items())))
    schedule.method()  # says which value is out of range
    return schedule


def handover(schedule: Schedule, times: np.ndarray, fraction: float) -> int:
    """How many steps of the grid f[n + 1] lie before `fraction` of the way. ValueError unless it is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of the way is {fraction}, expected a number in (0, 1]")
    levels = schedule.process.levels or 1000
    inputs = np.asarray(schedule.process.time_input(jnp.asarray(times[:-1])))
    return int((inputs >= round(levels - fraction * levels)).sum()) if fraction < 1 else len(times) - 1


def course(
    parts: Parts,
    model: Model,
    settings: Settings,
    size: tuple[int, int],
    *,
    strength: float = 1.0,
    start: float | None = None,
    end: float = 1.0,
    distilled: bool = False,
) -> Course:
    """The scheduler's file at these settings: an update rule changes nothing but itself, a grid the spacing alone.

    Raises ValueError as Schedule.at and schedules.respaced, and for a `start` that leaves no step.
    """
    schedule, name = parts.schedule, settings.name or None
    if settings.grid:
        rule = name or schedule.sampler
        schedule = respaced(schedule, settings.grid, name)
        name = None if schedule.sampler == rule else rule
    times, schedule = schedule.at(settings.steps, size, name, strength, distilled=distilled)
    if end != 1:
        times, schedule = times[: handover(schedule, times, end) + 1], schedule.unfinished()
    if start is not None:
        times = times[handover(schedule, times, start) :]
        if len(times) < 2:
            raise ValueError(f"start {start} leaves none of {settings.steps} steps")
    schedule = with_options(schedule, settings.options)
    model = model._replace(
        process=schedule.process,
        prediction=schedule.prediction,
        learned_variance=schedule.learned_variance,
        finish=Clipped(schedule),
    )
    return Course(times, model, Method(schedule), schedule.noise_scale(times[0]))


def guided(settings: Settings) -> bool:
    """Whether the unconditional estimate is needed. A scale of at most 1 means none, as in the published pipelines, whose distilled kin
    (Turbo) are drawn from with 0; CFG++ and CFG-Zero* act at any scale."""
    return settings.guidance > 1 or settings.guidance_method not in EXACT


def condition(parts: Parts, asked: Asked) -> dict[str, Array]:
    """cond of the network: texts as the states of the text encoders, classes as numbers."""
    if parts.text:
        return conditions(
            parts,
            asked.prompts,
            asked.size,
            asked.sizes,
            negative=asked.away,
            count=asked.count,
            clip_skip=asked.clip_skip,
        )
    return {} if asked.labels is None else {"label": jnp.asarray(asked.labels)}


def drawable(parts: Parts) -> Drawable:
    """These parts, ready to draw."""
    kind, module, schedule = PIPELINES[parts.name], parts.denoiser.module, parts.schedule
    frame, prompts = frame_of(parts), bool(parts.text)
    space, space_params = space_of(parts, kind, (*(frame.latent or (0, 0)), frame.channels))
    model = Model(Network(module), schedule.process, schedule.prediction, space)
    takes = Takes(
        prompts,
        None if prompts else classes_of(parts),
        getattr(module, "num_classes", None),
        module.in_channels - frame.channels,
        getattr(module, "time_cond_proj_dim", None) is not None,
    )
    names = parts.options.get("id2label") or {}
    return Drawable(
        name=parts.name,
        kind=kind,
        takes=takes,
        frame=frame,
        params=parts.denoiser.params,
        space=space,
        space_params=space_params,
        condition=lambda asked: condition(parts, asked),
        embed_scale=lambda guidance, count: guidance_embedding(parts, guidance, count),
        course=lambda settings, size, **span: course(parts, model, settings, size, **span),
        guided=guided,
        unguided="at most 1 means unguided",
        defaults=Settings("", kind.steps, "", kind.guidance),
        sampler=schedule.sampler,
        class_names={int(i): name for i, name in names.items()},
        offload=parts.offload,
        parts=parts,
    )
