"""ScoreSdeVeScheduler: variance exploding SDE with predictor and corrector (Song et al. 2021, arXiv:2011.13456, algorithms 2 and 4)."""

from typing import Any

import numpy as np

from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Steps
from ldm_jax.schedules.processes import power_process


def facts(name: str, config: Config) -> Facts:
    return Facts(power_process(config["sigma_max"], False), "score", prior=config["sigma_max"])


def grid(config: Config, steps: Steps) -> Grid:
    """n levels with log sigma linear, then clean data; t = (sigma / sigma_max)^(1/7).

    The network takes levels that are spaced up to sampling_eps, not quite those of the state, as in diffusers.
    """
    low, high, eps = config["sigma_min"], config["sigma_max"], config["sampling_eps"]
    levels = np.exp(np.linspace(np.log(high), np.log(low), steps.count))
    inputs = low * (high / low) ** np.linspace(1, eps, steps.count)
    return Grid(np.append((levels / high) ** (1 / 7), 0.0), inputs)


def rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return "predictor_corrector", {"snr": config["snr"], "corrections": config["correct_steps"]}


SCORE_SDE_VE = SchedulerClass(
    options={
        "num_train_timesteps": 2000,
        "snr": 0.15,
        "sigma_min": 0.01,
        "sigma_max": 1348.0,
        "sampling_eps": 1e-5,
        "correct_steps": 1,
    },
    facts=facts,
    grid=grid,
    rule=rule,
)
