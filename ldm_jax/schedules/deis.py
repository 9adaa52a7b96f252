"""DEISMultistepScheduler (Zhang and Chen 2023, DEIS, arXiv:2204.13902)."""

from typing import Any

import numpy as np

from ldm_jax.schedules import multistep
from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Steps
from ldm_jax.schedules.multistep import FEW_STEPS
from ldm_jax.schedules.options import one_of
from ldm_jax.schedules.spacing import level_spacing


def facts(name: str, config: Config) -> Facts:
    one_of(name, config, "algorithm_type", "deis", "dpmsolver", "dpmsolver++")
    one_of(name, config, "solver_type", "logrho", "midpoint", "heun", "bh1", "bh2")
    return multistep.facts(name, config)


def repeats_last_level(config: Config) -> bool:
    """Whether the last level occurs twice, so that the last step changes nothing."""
    return level_spacing(config) is not None or config["use_flow_sigmas"]


def grid(config: Config, steps: Steps) -> Grid:
    """The last level occurs twice where levels are spaced or of a flow; otherwise the first entry of the table is the end."""
    if config["use_flow_sigmas"]:
        times, inputs = multistep.flow_grid(config, steps.count)
    else:
        end = 1 / config["num_train_timesteps"]
        times, inputs = multistep.table_grid(config, steps.count, ("use_karras_sigmas",), end)
    return Grid(np.append(times[:-1], times[-2]) if repeats_last_level(config) else times, inputs)


def rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    """`final`: the orders of the last steps."""
    order, few = config["solver_order"], config["lower_order_final"] and steps < FEW_STEPS
    options = {"final": (2,) if repeats_last_level(config) else (2, 1)} if few and order > 1 else {}
    return ("euler", "deis_2", "deis_3")[order - 1], options


DEIS_MULTISTEP = SchedulerClass(
    options=multistep.OPTIONS | {"algorithm_type": "deis", "solver_type": "logrho"},
    facts=facts,
    grid=grid,
    rule=rule,
    fixed=multistep.FIXED,
    samplers={"deis_2": {"solver_order": 2}, "deis_3": {"solver_order": 3}},
    private=("algorithm_type", "solver_type", "solver_order"),
)
