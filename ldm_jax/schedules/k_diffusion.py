"""EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete, LMSDiscrete, KDPM2Discrete and KDPM2AncestralDiscreteScheduler.

They are k-diffusion's samplers (Karras et al. 2022, EDM, arXiv:2206.00364, algorithms 1 and 2). Their state is x_t / alpha, and their
grid is one of noise levels sigma / alpha: those of n entries of the table, or levels spaced between their ends, then 0. Between
two entries it is the level itself that is interpolated, not its logarithm.
"""

from typing import NamedTuple

import numpy as np

from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Steps, always
from ldm_jax.schedules.options import BETAS, CLIP, LATENT, LEVELS, LINSPACE, ZERO_SNR, clip, one_of, prediction, refuse
from ldm_jax.schedules.processes import places, power_process, table_levels, table_process
from ldm_jax.schedules.spacing import SPACINGS, entries, level_spacing, spaced


def facts(name: str, config: Config, *more_predictions: str) -> Facts:
    one_of(name, config, "timestep_spacing", *SPACINGS)
    return Facts(
        table_process(name, config, divides=True),
        prediction(name, config, "epsilon", "v_prediction", *more_predictions),
        prior=1.0 if config["timestep_spacing"] == "leading" else None,
        clip=clip(config),
    )


def facts_with_sample(name: str, config: Config) -> Facts:
    return facts(name, config, "sample")


class Levels(NamedTuple):
    """levels f64[n + 1]; those of the table, f64[N]; the entries f64[n] that were visited, None where levels were spaced."""

    levels: np.ndarray
    table: np.ndarray
    entries: np.ndarray | None


def levels_of(config: Config, steps: int) -> Levels:
    """The levels of n entries, or spaced between those of the first and the last entry; then 0."""
    table, index, spacing = table_levels(config), entries(config, steps, whole=False), level_spacing(config)
    levels = np.interp(index, np.arange(len(table)), table)
    if spacing is None:
        return Levels(np.append(levels, 0.0), table, index)
    return Levels(np.append(spaced(spacing, config, levels[-1], levels[0], steps), 0.0), table, None)


def grid_of(levels: Levels, rounded: bool = False) -> Grid:
    """The grid of these levels. Spaced levels are passed to the network as places in the table; rounded: as whole entries."""
    place = places(levels.levels, levels.table)
    times, inputs = (place + 1) / len(levels.table), levels.entries
    if inputs is None:
        inputs = np.maximum(place[:-1], 0)
        inputs = inputs.round() if rounded else inputs
    return Grid(times, inputs)


def grid(config: Config, steps: Steps) -> Grid:
    return grid_of(levels_of(config, steps.count))


def kdpm2_grid(config: Config, steps: Steps) -> Grid:
    """Of Karras's levels the network takes whole entries."""
    return grid_of(levels_of(config, steps.count), rounded=config["use_karras_sigmas"])


def kdpm2_ancestral_facts(name: str, config: Config) -> Facts:
    one_of(name, config, "timestep_spacing", *SPACINGS)
    if config["use_karras_sigmas"]:
        # Its inner evaluation is at the next time of the grid. There diffusers passes the place itself to the network, but a rounded
        # entry in the step that begins there.
        refuse(name, config, "use_karras_sigmas", "False")
    return facts(name, config)


# ---- EulerDiscreteScheduler, which has more options ----


def is_continuous(config: Config) -> bool:
    """Whether Euler's network takes log(sigma / alpha) / 4 (Stable Video Diffusion)."""
    return config["timestep_type"] == "continuous" and config["prediction_type"] == "v_prediction"


def noisiest(config: Config) -> float:
    """The noisiest level that Euler's grid can have."""
    return max(config["sigma_max"] or 0, table_levels(config)[-1])


def euler_facts(name: str, config: Config) -> Facts:
    one_of(name, config, "interpolation_type", "linear", "log_linear")
    one_of(name, config, "timestep_type", "discrete", "continuous")
    one_of(name, config, "final_sigmas_type", "zero", "sigma_min")
    table = facts(name, config, "sample", "original_sample")
    return table._replace(process=power_process(noisiest(config), True)) if is_continuous(config) else table


def euler_levels(config: Config, steps: int) -> Levels:
    """interpolation_type and final_sigmas_type change the levels: log_linear spaces log(sigma / alpha) over the whole table."""
    levels, table, index = levels_of(config, steps)
    if config["interpolation_type"] == "log_linear":
        levels, spacing = np.geomspace(table[-1], table[0], steps + 1), level_spacing(config)
        if spacing is None:
            return Levels(levels, table, index)
        levels = np.append(spaced(spacing, config, levels[-1], levels[0], steps), 0.0)
    if config["final_sigmas_type"] == "sigma_min":
        levels[-1] = table[0]
    return Levels(levels, table, index)


def euler_grid(config: Config, steps: Steps) -> Grid:
    """Where levels are continuous, t = (level / noisiest)^(1/7)."""
    levels = euler_levels(config, steps.count)
    if not is_continuous(config):
        return grid_of(levels)
    return Grid((levels.levels / noisiest(config)) ** (1 / 7), 0.25 * np.log(levels.levels[:-1]))


EULER = SchedulerClass(
    options=BETAS
    | LINSPACE
    | LEVELS
    | ZERO_SNR
    | {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
        "sigma_min": None,
        "sigma_max": None,
    },
    facts=euler_facts,
    grid=euler_grid,
    rule=always("euler"),
    samplers={"euler": {}},
    private=("interpolation_type", "timestep_type", "final_sigmas_type"),
)
EULER_ANCESTRAL = SchedulerClass(
    options=BETAS | LINSPACE | ZERO_SNR,
    facts=facts,
    grid=grid,
    rule=always("euler_ancestral"),
    samplers={"euler_ancestral": {}},
)
LMS = SchedulerClass(
    options=BETAS | LINSPACE | LEVELS,
    facts=facts_with_sample,
    grid=grid,
    rule=always("lms"),
    samplers={"lms": {}},
)
HEUN = SchedulerClass(
    options=LATENT | LINSPACE | LEVELS | CLIP | {"clip_sample": False},
    facts=facts_with_sample,
    grid=grid,
    rule=always("heun"),
    samplers={"heun": {}},
)
KDPM2 = SchedulerClass(
    options=LATENT | LINSPACE | LEVELS,
    facts=facts,
    grid=kdpm2_grid,
    rule=always("dpm_2"),
    samplers={"dpm_2": {}},
)
KDPM2_ANCESTRAL = SchedulerClass(
    options=LATENT | LINSPACE | LEVELS,
    facts=kdpm2_ancestral_facts,
    grid=grid,
    rule=always("dpm_2_ancestral"),
    samplers={"dpm_2_ancestral": {}},
)
