"""Another spacing of the steps than that of a published file, by name: --grid=karras with --sampler=euler.

    leading, trailing, linspace           which entries of the table are visited (timestep_spacing)
    karras, exponential, beta, lu         which noise levels between the ends of the table (use_karras_sigmas, ...)

The file is read as the scheduler class of the update rule, with that option alone changed, and its grid, time inputs and initial noise
are taken; as in diffusers' EulerDiscreteScheduler.from_config(file, use_karras_sigmas=True). An update rule whose class does not have
the option, or that has no class, takes Euler's levels.
"""

import functools
from typing import Any

from ldm_jax.schedules.classes import CLASSES
from ldm_jax.schedules.schedule import Schedule, load
from ldm_jax.schedules.spacing import LEVEL_SPACINGS, SPACINGS

GRIDS: dict[str, dict[str, Any]] = {
    **{name: {"timestep_spacing": name} for name in SPACINGS},
    **dict(zip(("karras", "exponential", "beta", "lu"), ({key: True} for key in LEVEL_SPACINGS))),
}
OFF = dict.fromkeys(LEVEL_SPACINGS, False)
# Update rule -> (the class that has it, the options with which it has it).
CLASS_OF: dict[str, tuple[str, dict[str, Any]]] = {
    sampler: (name, options) for name, row in CLASSES.items() for sampler, options in row.samplers.items()
}
EULER, _ = CLASS_OF["euler"]
PRIVATE = {key for row in CLASSES.values() for key in row.private}


def takes(name: str, grid: str) -> bool:
    """Whether the class `name` has the option of this grid."""
    return set(GRIDS[grid]) <= set(CLASSES[name].options)


# A compiled program is bound to the processes that are made here: equal arguments have to give the same ones.
@functools.lru_cache(maxsize=64)
def respaced(schedule: Schedule, grid: str, sampler: str | None = None) -> Schedule:
    """The schedule of the same file with this grid, for the update rule `sampler` (None: the file's); pass the same to `at`.

    Raises ValueError for an unknown grid, and for a grid that makes no sense with the file: other steps than those that a network was
    distilled on, levels of a table for a process without one, and uneven steps for PNDM, whose formula needs even ones.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid {grid!r} is unknown for published pipelines; there are {', '.join(GRIDS)}")
    rule, is_published_rule = sampler or schedule.sampler, sampler in (None, schedule.sampler)
    config, row = dict(schedule.stated), CLASSES[schedule.name]
    if is_published_rule and row.respaceable and takes(schedule.name, grid):
        return load(config | OFF | GRIDS[grid] | {"_class_name": schedule.name})
    if schedule.process.levels is None or not row.respaceable:
        raise ValueError(f"{schedule.name} has no grid {grid!r}: its steps are those that its network was made for")
    shared = {key: value for key, value in config.items() if key not in PRIVATE}
    name, options = (schedule.name, {}) if is_published_rule else CLASS_OF.get(rule, (None, {}))
    if name is not None and takes(name, grid):
        stated = config if name == schedule.name else shared
        spaced = load(stated | options | OFF | GRIDS[grid] | {"_class_name": name})
        return spaced if name == schedule.name else spaced._replace(alpha_to_one=None)
    if rule in ("plms", "pndm"):
        raise ValueError(
            f"sampler {rule!r} takes equal steps, not the grid {grid!r}; another --sampler does, such as euler or dpmpp_2m"
        )
    if not takes(EULER, grid):
        raise ValueError(f"sampler {rule!r} has no grid {grid!r}; dpmpp_2m has it")
    spaced = load(shared | OFF | GRIDS[grid] | {"_class_name": EULER})
    return spaced._replace(clip=schedule.clip, alpha_to_one=None)
