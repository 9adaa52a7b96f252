"""What DPM-Solver, UniPC and DEIS share: their options, and their grid on a table or on a flow.

They step in log-SNR and visit the first n of n + 1 entries of the table, so that no step begins at the first entry. The network takes
whole entries: a spaced level becomes the entry below it, or the nearest one, as each class has it. With use_flow_sigmas the same
solvers run on a rectified flow, alpha = 1 - t and sigma = t.
"""

import numpy as np

from ldm_jax.schedules.family import Config, Facts, Grid
from ldm_jax.schedules.options import BETAS, LEVELS, LINSPACE, THRESHOLD, clip, one_of, prediction, refuse
from ldm_jax.schedules.processes import flow_process, places, table_levels, table_process
from ldm_jax.schedules.spacing import SPACINGS, in_table, level_spacing, shifted, spaced

# Below this number of steps DPM-Solver and DEIS lower the order of the last two steps.
FEW_STEPS = 15
OPTIONS = (
    BETAS
    | LINSPACE
    | THRESHOLD
    | LEVELS
    | {"solver_order": 2, "lower_order_final": True, "use_flow_sigmas": False, "flow_shift": 1.0}
)
# use_dynamic_shifting takes a number that no file holds.
FIXED = {"use_dynamic_shifting": (False,), "time_shift_type": ("exponential",)}


def facts(name: str, config: Config, flow_spacings: tuple[str, ...] = ()) -> Facts:
    """flow_spacings: the names in LEVEL_SPACINGS that the class supports beside use_flow_sigmas."""
    one_of(name, config, "timestep_spacing", *SPACINGS)
    one_of(name, config, "solver_order", 1, 2, 3)
    process, predictions = table_process(name, config, divides=True), ("epsilon", "v_prediction", "sample")
    if config["use_flow_sigmas"]:
        process, predictions = flow_process(config["num_train_timesteps"]), ("epsilon", "sample", "flow_prediction")
        spacing = level_spacing(config)
        if spacing is not None and spacing not in flow_spacings:
            refuse(name, config, spacing, "False beside use_flow_sigmas")
        if "final_sigmas_type" in config and config["final_sigmas_type"] != "zero":
            refuse(name, config, "final_sigmas_type", "'zero' beside use_flow_sigmas")
    return Facts(process, prediction(name, config, *predictions), clip=clip(config))


def entries(config: Config, steps: int, noisiest: int) -> np.ndarray:
    """The first n of n + 1 entries f64[n] of `timestep_spacing`, out of the first `noisiest` of the table."""
    n, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if steps >= noisiest:
        raise ValueError(f"steps is {steps}, expected fewer than the table's entries that are used, {noisiest}")
    if spacing == "linspace":
        index = np.linspace(0, noisiest - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        index = np.arange(1, steps + 1)[::-1] * float(noisiest // (steps + 1)) + config["steps_offset"]
    else:
        index = np.arange(noisiest, 0, -n / steps)[:steps].round() - 1
    return in_table(index, config, steps)


def table_grid(config: Config, steps: int, rounded: tuple[str, ...], end: float, noisiest: int | None = None) -> Grid:
    """The grid on a table, then the time `end`.

    rounded: the names in LEVEL_SPACINGS whose levels become the nearest entry; those of the others become the entry below.
    noisiest: how many entries of the table are used, None: all.
    """
    n, spacing = config["num_train_timesteps"], level_spacing(config)
    index, table = entries(config, steps, n if noisiest is None else noisiest), table_levels(config)
    place = index
    if spacing is not None:
        place = places(spaced(spacing, config, table[0], table[-1], steps), table)
        index = np.maximum(place, 0)
        index = index.round() if spacing in rounded else np.floor(index)
    return Grid(np.append((place + 1) / n, end), index)


def last_time(config: Config) -> float:
    """Where final_sigmas_type ends a grid: at the first entry of the table, or at clean data."""
    return 1 / config["num_train_timesteps"] if config["final_sigmas_type"] == "sigma_min" else 0.0


def flow_grid(config: Config, steps: int) -> Grid:
    """n levels of a flow from 1 - 1 / N down, shifted, then 0 (DPM-Solver and DEIS)."""
    n = config["num_train_timesteps"]
    levels = shifted(1 - np.linspace(1, 1 / n, steps + 1), config["flow_shift"])[:0:-1]
    return Grid(np.append(levels, 0.0), np.floor(levels * n))
