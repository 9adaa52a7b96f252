"""UniPCMultistepScheduler (Zhao et al. 2023, UniPC, arXiv:2302.04867)."""

from typing import Any

import numpy as np

from ldm_jax.schedules import multistep
from ldm_jax.schedules.family import Config, Facts, Grid, SchedulerClass, Steps
from ldm_jax.schedules.options import ZERO_SNR, chosen, one_of, refuse
from ldm_jax.schedules.processes import table_levels
from ldm_jax.schedules.spacing import level_spacing, prescribed, shifted, spaced, to_terminal

# solver_type -> the sampler. Values that belong to other classes stand for the default of this one, as in diffusers.
SOLVERS = {
    "bh1": "uni_pc",
    "bh2": "uni_pc_bh2",
    "midpoint": "uni_pc_bh2",
    "heun": "uni_pc_bh2",
    "logrho": "uni_pc_bh2",
}


def facts(name: str, config: Config) -> Facts:
    chosen(name, config, "solver_type", SOLVERS)
    one_of(name, config, "final_sigmas_type", "zero", "sigma_min")
    final, spacing = config["final_sigmas_type"], level_spacing(config)
    if final == "sigma_min" and spacing is not None:
        refuse(
            name, config, "final_sigmas_type", f"'zero' beside {spacing}: its last level, met twice, is corrected twice"
        )
    if final == "zero" and not config["lower_order_final"] and config["solver_order"] > 1:
        refuse(name, config, "lower_order_final", "True beside final_sigmas_type 'zero'")
    if config["shift_terminal"] is not None and not config["use_flow_sigmas"]:
        refuse(name, config, "shift_terminal", "None without use_flow_sigmas")
    return multistep.facts(name, config, flow_spacings=("use_karras_sigmas",))


def grid(config: Config, steps: Steps) -> Grid:
    """On a table; on a flow n shifted levels from t = 1, or Karras's levels s of the table as t = s / (s + 1), then 0."""
    if not config["use_flow_sigmas"]:
        return multistep.table_grid(config, steps.count, ("use_karras_sigmas",), multistep.last_time(config))
    n, spacing = config["num_train_timesteps"], level_spacing(config)
    if spacing is not None:
        table = table_levels(config)
        levels = spaced(spacing, config, table[0], table[-1], steps.count)
        levels = levels / (levels + 1)
    else:
        levels = prescribed(steps.sigmas, steps.count, np.linspace(1, 1 / n, steps.count + 1)[:-1])
        levels = to_terminal(shifted(levels, config["flow_shift"]), config["shift_terminal"])
        levels[0] -= 1e-6 if abs(levels[0] - 1) < 1e-6 else 0  # alpha = 0 has no log-SNR
    return Grid(np.append(levels, 0.0), np.floor(levels * n))


def rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    final = (2, 1) if config["lower_order_final"] else ()
    return SOLVERS[config["solver_type"]], {"order": config["solver_order"], "final": final}


UNIPC_MULTISTEP = SchedulerClass(
    options=multistep.OPTIONS
    | ZERO_SNR
    | {
        "solver_type": "bh2",
        "final_sigmas_type": "zero",
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    facts=facts,
    grid=grid,
    rule=rule,
    fixed=multistep.FIXED | {"predict_x0": (True,), "disable_corrector": ((),), "solver_p": (None,)},
    samplers={"uni_pc": {"solver_type": "bh1"}, "uni_pc_bh2": {"solver_type": "bh2"}},
    private=("solver_type", "solver_order", "final_sigmas_type"),
)
