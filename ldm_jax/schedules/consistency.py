"""CMStochasticIterativeScheduler: consistency models (Song et al. 2023, arXiv:2303.01469, algorithm 1)."""

from typing import Any, NamedTuple

import numpy as np
from jax import Array

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.process import Process, per_row
from ldm_jax.schedules.family import Clip, Config, Facts, Grid, SchedulerClass, Steps


class ConsistencyParametrization(NamedTuple):
    """c_skip x_t + c_out F of the network's output F, with s = sigma - sigma_min and d = sigma_data:

        c_skip = d^2 / (s^2 + d^2),    c_out = d s / sqrt(sigma^2 + d^2)

    (appendix C). It takes the clean estimate x that the prediction 'edm' makes of F, out of which it computes F again."""

    sigma_min: float

    def __call__(self, process: Process, x: Array, x_t: Array, t: Array) -> Array:
        sigma = per_row(process.sigma(t), x_t)
        d, s = process.sigma_data, sigma - self.sigma_min
        return d**2 / (s**2 + d**2) * x_t + s / sigma * (x - d**2 / (sigma**2 + d**2) * x_t)


def facts(name: str, config: Config) -> Facts:
    edm = P.edm(*(config[key] for key in ("sigma_min", "sigma_max", "rho", "sigma_data")))
    return Facts(
        edm._replace(time_input=lambda t: 1000 * edm.time_input(t)),
        "edm",
        prior=config["sigma_max"],
        clip=Clip(1.0) if config["clip_denoised"] else None,
        parametrization=ConsistencyParametrization(config["sigma_min"]),
    )


def grid(config: Config, steps: Steps) -> Grid:
    """Equal steps of EDM's time from sigma_max, then sigma_min, which is t = 0."""
    n = config["num_train_timesteps"]
    if steps.count > n:
        raise ValueError(f"steps is {steps.count}, expected at most num_train_timesteps, {n}")
    times = 1 - np.arange(steps.count) * (n // steps.count) / max(n - 1, 1)
    low, high = (config[key] ** (1 / config["rho"]) for key in ("sigma_min", "sigma_max"))
    return Grid(np.append(times, 0.0), 250 * config["rho"] * np.log(low + times * (high - low)))


def rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return "lcm", {"sigma_min": config["sigma_min"]}


CM_STOCHASTIC_ITERATIVE = SchedulerClass(
    options={
        "num_train_timesteps": 40,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "rho": 7.0,
        "clip_denoised": True,
    },
    facts=facts,
    grid=grid,
    rule=rule,
    fixed={"s_noise": (1.0,)},
)
