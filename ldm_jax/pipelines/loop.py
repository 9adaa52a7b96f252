"""A published pipeline's parts and schedule as sampling/ takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.samplers import Sampler
from ldm_jax.pipelines.components import Parts, on_device
from ldm_jax.sampling.backwards import UNGUIDED as UNGUIDED
from ldm_jax.sampling.backwards import Held as Held
from ldm_jax.sampling.backwards import Scales as Scales
from ldm_jax.sampling.draw import Plan, draw
from ldm_jax.sampling.model import Cond, Model, Network
from ldm_jax.sampling.settings import Guidance
from ldm_jax.schedules import Schedule


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


def plan_of(parts: Parts, schedule: Schedule) -> Plan:
    """What the compiled program of these parts is bound to; published pipelines rescale what the network predicts."""
    model = Model(
        Network(parts.denoiser.module),
        schedule.process,
        schedule.prediction,
        learned_variance=schedule.learned_variance,
        finish=Clipped(schedule),
    )
    return Plan(model, Method(schedule), Guidance(rescale=None))


def run(
    parts: Parts,
    schedule: Schedule,
    x: Array,
    times: np.ndarray | Array,
    conds: Sequence[Cond],
    keys: Array,
    *,
    scales: Scales = UNGUIDED,
    held: Held | None = None,
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """sampling.draw of these parts; schedule and times are those of Schedule.at."""
    with on_device(parts, parts.denoiser) as params:
        return draw(
            plan_of(parts, schedule),
            params,
            x,
            times,
            keys,
            conds,
            scales=scales,
            held=held,
            batch_size=batch_size,
            quiet=quiet,
        )
