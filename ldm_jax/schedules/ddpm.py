"""DDPMScheduler (Ho et al. 2020, arXiv:2006.11239, equations 6 and 7; learned variance: Nichol & Dhariwal 2021, arXiv:2102.09672).

The grid is n entries of the table, then clean data.
"""

from typing import Any

from ldm_jax.schedules.ddim import table_facts, table_grid
from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Steps
from ldm_jax.schedules.options import BETAS, CLIP, LEADING, THRESHOLD, ZERO_SNR, chosen
from ldm_jax.schedules.spacing import entries

VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned",
}


def facts(name: str, config: Config) -> Facts:
    table = table_facts(name, config, "epsilon", "v_prediction", "sample")
    return table._replace(learned_variance=config["variance_type"] == "learned_range")


def grid(config: Config, steps: Steps) -> Grid:
    return table_grid(config, steps.count, to_one=True)


def rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    """diffusers adds noise in every step but the one from entry 0, so also in the last step of a list that does not reach it."""
    variance = chosen("DDPMScheduler", config, "variance_type", VARIANCES)
    noisy = variance != "small" and entries(config, steps)[-1] > 0
    return "ddpm", {"variance": variance} | ({"last_noise": True} if noisy else {})


DDPM = SchedulerClass(
    options=BETAS | CLIP | THRESHOLD | LEADING | ZERO_SNR | {"variance_type": "fixed_small"},
    facts=facts,
    grid=grid,
    rule=rule,
    samplers={"ddpm": {}},
)
