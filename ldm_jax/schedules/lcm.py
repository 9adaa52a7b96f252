"""LCMScheduler (Luo et al. 2023, latent consistency models, arXiv:2310.04378) and TCDScheduler (Zheng et al. 2024, arXiv:2402.19159).

Their network was distilled on original_inference_steps entries of the table. The grid is n of these, then clean data (LCM) or the
first entry (TCD).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.process import Process, per_row
from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Steps, always
from ldm_jax.schedules.options import (
    CLIP,
    LATENT,
    LEADING,
    THRESHOLD,
    TO_ONE,
    ZERO_SNR,
    clip,
    prediction,
    refuse,
)
from ldm_jax.schedules.processes import table_process


class ConsistencyBoundary(NamedTuple):
    """c_skip x_t + c_out x of a clean estimate x, with u = scaling times the time input and d = 1/2:

        c_skip = d^2 / (u^2 + d^2),    c_out = u / sqrt(u^2 + d^2)

    (Luo et al. 2023, section 4.1)."""

    scaling: float

    def __call__(self, process: Process, x: Array, x_t: Array, t: Array) -> Array:
        u = per_row(self.scaling * process.time_input(t), x_t)
        return 0.25 / (u**2 + 0.25) * x_t + u / jnp.sqrt(u**2 + 0.25) * x


def facts(name: str, config: Config) -> Facts:
    original, n = config["original_inference_steps"], config["num_train_timesteps"]
    if not 1 <= original <= n:
        refuse(name, config, "original_inference_steps", f"1 to {n}")
    return Facts(table_process(name, config), prediction(name, config, "epsilon", "v_prediction", "sample"))


def lcm_facts(name: str, config: Config) -> Facts:
    return facts(name, config)._replace(clip=clip(config), boundary=ConsistencyBoundary(config["timestep_scaling"]))


def _grid(config: Config, steps: Steps, end: float) -> Grid:
    """n of the first int(original_inference_steps strength) steps of the distillation, then the time end / N."""
    n, original = config["num_train_timesteps"], config["original_inference_steps"]
    used = int(original * steps.strength)
    if steps.count > used:
        of = (
            "original_inference_steps"
            if steps.strength == 1
            else f"original_inference_steps {original} x strength {steps.strength}"
        )
        raise ValueError(f"steps is {steps.count}, expected at most {of}, {used}")
    index = np.arange(used, 0, -1) * float(n // original) - 1
    index = index[np.floor(np.linspace(0, used, steps.count, endpoint=False)).astype(int)]
    return Grid(np.append((index + 1) / n, end / n), index)


def lcm_grid(config: Config, steps: Steps) -> Grid:
    return _grid(config, steps, end=0.0)


def tcd_grid(config: Config, steps: Steps) -> Grid:
    return _grid(config, steps, end=1.0)


OPTIONS = (
    LATENT
    | THRESHOLD
    | CLIP
    | LEADING
    | ZERO_SNR
    | TO_ONE
    | {"beta_schedule": "scaled_linear", "clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0}
)
LCM = SchedulerClass(
    options=OPTIONS,
    facts=lcm_facts,
    grid=lcm_grid,
    rule=always("lcm"),
    takes_strength=True,
    respaceable=False,
)
# TCD's file has the options of a clipping, but its step does not clip.
TCD = SchedulerClass(
    options=OPTIONS,
    facts=facts,
    grid=tcd_grid,
    rule=always("tcd", gamma=0.3),
    respaceable=False,
)
