"""FlowMatchEulerDiscreteScheduler: rectified flow, x_t = (1 - t) x + t eps (Esser et al. 2024, SD3, arXiv:2403.03206)."""

import math
from typing import Any

import numpy as np

from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Size, Steps
from ldm_jax.schedules.options import LEVELS, one_of
from ldm_jax.schedules.processes import flow_process
from ldm_jax.schedules.spacing import level_spacing, prescribed, shifted, spaced, to_terminal


def facts(name: str, config: Config) -> Facts:
    one_of(name, config, "time_shift_type", "exponential", "linear")
    return Facts(flow_process(config["num_train_timesteps"]), "flow")


def dynamic_shift(config: Config, size: Size) -> float:
    """exp(mu), mu linear in the number of tokens of 16 x 16 pixels in an image of `size` (FLUX.1, see grids.dynamic_shifted)."""
    if size is None:
        raise ValueError(
            "FlowMatchEulerDiscreteScheduler: use_dynamic_shifting is True, expected the size of the image"
        )
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    along = (size[0] // 16 * (size[1] // 16) - low) / (high - low)
    mu = config["base_shift"] + along * (config["max_shift"] - config["base_shift"])
    return math.exp(mu) if config["time_shift_type"] == "exponential" else mu


def grid(config: Config, steps: Steps) -> Grid:
    """n levels, shifted, then 0. By default they lie between the ends of a table that is shifted already, so they are shifted twice."""
    n, shift, dynamic = config["num_train_timesteps"], config["shift"], config["use_dynamic_shifting"]
    ends = np.array([1.0, 1 / n])
    ends = ends if dynamic else shifted(ends, shift)
    levels = prescribed(steps.sigmas, steps.count, np.linspace(*ends, steps.count))
    levels = shifted(levels, dynamic_shift(config, steps.size) if dynamic else shift)
    levels = to_terminal(levels, config["shift_terminal"])
    spacing = level_spacing(config)
    if spacing is not None:
        levels = spaced(spacing, config, levels[-1], levels[0], steps.count)
    return Grid(np.append(levels, 0.0), levels * n)


def rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return ("lcm" if config["stochastic_sampling"] else "euler"), {}


FLOW_MATCH_EULER = SchedulerClass(
    options=LEVELS
    | {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    facts=facts,
    grid=grid,
    rule=rule,
    fixed={"invert_sigmas": (False,)},
)
