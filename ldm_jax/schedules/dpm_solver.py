"""DPMSolverMultistepScheduler (Lu et al. 2022, DPM-Solver, arXiv:2206.00927, and DPM-Solver++, arXiv:2211.01095)."""

import math
from typing import Any

import numpy as np

from ldm_jax.schedules import multistep
from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Steps
from ldm_jax.schedules.multistep import FEW_STEPS
from ldm_jax.schedules.options import ZERO_SNR, chosen, one_of, refuse
from ldm_jax.schedules.processes import table_levels
from ldm_jax.schedules.spacing import level_spacing

# Values that belong to other classes stand for the default of this one, as in diffusers.
ALGORITHMS = {
    "dpmsolver++": "dpmsolver++",
    "deis": "dpmsolver++",
    "dpmsolver": "dpmsolver",
    "sde-dpmsolver++": "sde-dpmsolver++",
}
SOLVERS = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
# (algorithm, order, solver) -> the sampler.
SAMPLERS = {
    ("dpmsolver++", 2, "midpoint"): "dpmpp_2m",
    ("dpmsolver++", 2, "heun"): "res_multistep",
    ("dpmsolver++", 3, "midpoint"): "dpmpp_3m",
    ("dpmsolver++", 3, "heun"): "dpmpp_3m",
    ("dpmsolver", 2, "midpoint"): "dpm_solver_2m",
    ("dpmsolver", 2, "heun"): "deis_2",
    ("dpmsolver", 3, "midpoint"): "dpm_solver_3m",
    ("dpmsolver", 3, "heun"): "dpm_solver_3m",
    ("sde-dpmsolver++", 2, "midpoint"): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 2, "heun"): "dpmpp_2m_sde_heun",
}


def facts(name: str, config: Config) -> Facts:
    algorithm = chosen(name, config, "algorithm_type", ALGORITHMS)
    chosen(name, config, "solver_type", SOLVERS)
    one_of(name, config, "final_sigmas_type", "zero", "sigma_min")
    one_of(name, config, "variance_type", None, "learned", "learned_range")
    if algorithm == "dpmsolver" and (config["final_sigmas_type"] == "zero" or config["use_flow_sigmas"]):
        refuse(name, config, "algorithm_type", "one with ++ beside final_sigmas_type 'zero' or use_flow_sigmas")
    if algorithm == "sde-dpmsolver++" and config["solver_order"] == 3:
        # In diffusers its second difference has a weight that tends to -1 as steps shrink: weak order 1.
        refuse(name, config, "solver_order", "1 or 2 beside algorithm_type 'sde-dpmsolver++'")
    return multistep.facts(name, config)._replace(learned_variance=config["variance_type"] is not None)


def grid(config: Config, steps: Steps) -> Grid:
    """Levels noisier than lambda_min_clipped, a log(alpha / sigma), are left out. On the cosine table no level is rounded up."""
    if config["use_flow_sigmas"]:
        return multistep.flow_grid(config, steps.count)
    cosine = config["beta_schedule"] == "squaredcos_cap_v2"
    clipped = int((-np.log(table_levels(config)) < config["lambda_min_clipped"]).sum())
    return multistep.table_grid(
        config,
        steps.count,
        rounded=() if cosine else ("use_karras_sigmas", "use_lu_lambdas"),
        end=multistep.last_time(config),
        noisiest=config["num_train_timesteps"] - clipped,
    )


def rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    """`final`: the orders of the last steps."""
    algorithm, solver = ALGORITHMS[config["algorithm_type"]], SOLVERS[config["solver_type"]]
    order, few = config["solver_order"], config["lower_order_final"] and steps < FEW_STEPS
    if order == 1:
        return ("euler_ancestral" if algorithm == "sde-dpmsolver++" else "euler"), {}
    final = (2, 1) if few else (1,) if config["euler_at_final"] else ()
    if config["final_sigmas_type"] == "sigma_min" and level_spacing(config) is not None:
        final = final[:-1]  # the last level occurs twice, so the last step changes nothing
    elif config["final_sigmas_type"] == "zero" and order == 2:
        final = ()  # a step into sigma = 0 is of order 1 anyway
    options = {"final": final} if final else {}
    return SAMPLERS[algorithm, order, solver], options | ({"solver": solver} if order == 3 and solver == "heun" else {})


DPM_SOLVER_MULTISTEP = SchedulerClass(
    options=multistep.OPTIONS
    | ZERO_SNR
    | {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    facts=facts,
    grid=grid,
    rule=rule,
    fixed=multistep.FIXED,
    samplers={
        "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
        "dpmpp_3m": {"algorithm_type": "dpmsolver++", "solver_order": 3},
        "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    },
    private=("algorithm_type", "solver_type", "solver_order", "final_sigmas_type"),
)
