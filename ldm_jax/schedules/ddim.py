"""DDIMScheduler and DDIMInverseScheduler (Song et al. 2021, DDIM, arXiv:2010.02502, equation 12 with sigma = 0 by default).

The grid is n entries of the table and the end: clean data, t = 0, or the first entry, t = 1 / N, if set_alpha_to_one is False.
A step of diffusers goes down by N // n entries, whatever the next entry of its list is; see `Strided`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers import Sampler
from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Steps, always
from ldm_jax.schedules.options import (
    BETAS,
    CLIP,
    LEADING,
    THRESHOLD,
    TO_ONE,
    ZERO_SNR,
    clip,
    one_of,
    prediction,
    refuse,
)
from ldm_jax.schedules.processes import table_process
from ldm_jax.schedules.spacing import SPACINGS, entries

# Two times this close are one time: further apart than rounding in single precision, closer than in any grid.
SAME_TIME = 1e-6


class Strided(NamedTuple):
    """Steps go to t - stride, or to `end` where that leaves the table, whatever the next time of the grid is.

    The state is then at another level than the input that the network takes next. Upwards, in inversion, no class steps so.
    """

    stride: float
    end: float

    def next_time(self, t: Array, s: Array) -> Array:
        """The time at which a step from t ends, s being the next time of the grid."""
        return jnp.where(s > t, s, jnp.where(t - self.stride > SAME_TIME, t - self.stride, self.end))

    def __call__(self, sampler: Sampler) -> Sampler:
        def step(denoise: Any, process: Process, carry: Any, t: Array, s: Array, keys: Array | None) -> Any:
            return sampler.step(denoise, process, carry, t, self.next_time(t, s), keys)

        return sampler._replace(step=step)


def strides(config: Config, grid: Grid) -> tuple[Grid, Strided, bool]:
    """(the grid with the end that equal strides reach, those strides, whether the grid already has equal strides)."""
    n, (times, inputs) = config["num_train_timesteps"], grid
    stride, end = n // len(inputs), float(times[-1])
    equal = (np.diff(inputs) == -stride).all() and inputs[-1] < stride
    if inputs[-1] >= stride:
        times = np.append(times[:-1], (inputs[-1] + 1 - stride) / n)
    return Grid(times, inputs), Strided(stride / n, end), bool(equal)


def loop(config: Config, grid: Grid, first: int) -> tuple[Grid, Strided | None]:
    """Equal strides; None where the grid already has them."""
    grid, strided, equal = strides(config, grid)
    return grid, None if equal else strided


def table_facts(name: str, config: Config, *predictions: str) -> Facts:
    """Of a class that reads a table and does not divide by alpha: DDIM, DDPM, PNDM."""
    one_of(name, config, "timestep_spacing", *SPACINGS)
    return Facts(table_process(name, config), prediction(name, config, *predictions), clip=clip(config))


def facts(name: str, config: Config) -> Facts:
    one_of(name, config, "timestep_spacing", *SPACINGS)
    ends_at_zero = config["timestep_spacing"] == "linspace" or not config["steps_offset"]
    if clip(config) and not config["set_alpha_to_one"] and config["timestep_spacing"] != "trailing" and ends_at_zero:
        refuse(name, config, "set_alpha_to_one", "True: its last step, from the first entry to itself, would only clip")
    return table_facts(name, config, "epsilon", "v_prediction", "sample")


def table_grid(config: Config, steps: int, to_one: bool) -> Grid:
    """n entries, then clean data, or else the first entry."""
    n, index = config["num_train_timesteps"], entries(config, steps)
    return Grid(np.append((index + 1) / n, 0.0 if to_one else 1 / n), index)


def grid(config: Config, steps: Steps) -> Grid:
    return table_grid(config, steps.count, config["set_alpha_to_one"])


def inverse_grid(config: Config, steps: Steps) -> Grid:
    """Times rise; the network takes the entry that a step goes to."""
    n, stride = config["num_train_timesteps"], config["num_train_timesteps"] // steps.count
    index = entries(config, steps.count)[::-1]
    if (np.diff(index) != stride).any() or index[0] >= stride:
        raise ValueError(
            f"DDIMInverseScheduler: steps is {steps.count} with timestep_spacing {config['timestep_spacing']!r}, expected a "
            f"number that divides {n}"
        )
    return Grid(np.append(0.0 if config["set_alpha_to_one"] else 1 / n, (index + 1) / n), index)


DDIM = SchedulerClass(
    options=BETAS | CLIP | THRESHOLD | LEADING | ZERO_SNR | TO_ONE,
    facts=facts,
    grid=grid,
    rule=always("ddim"),
    loop=loop,
    samplers={"ddim": {}},
)
DDIM_INVERSE = SchedulerClass(
    options=BETAS | CLIP | LEADING | ZERO_SNR | TO_ONE,
    facts=facts,
    grid=inverse_grid,
    rule=always("ddim"),
)
