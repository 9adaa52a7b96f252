"""Another spacing of the steps than a published file's, by name: --grid=karras with --sampler=euler.

linspace, leading, trailing               which entries of the table (timestep_spacing)
karras, exponential, beta, lu             which noise levels between the ends of the file's table (use_karras_sigmas, ...)

What is taken is the grid, with its time inputs and its noise, of the scheduler class whose update rule is drawn with, read from the
file with that option alone changed: diffusers' EulerDiscreteScheduler.from_config(file, use_karras_sigmas=True). A rule whose
class has no such option takes Euler's levels.
"""

import functools
from typing import Any

from ldm_jax.pipelines.published_grids import LEVEL_SPACINGS, SPACINGS
from ldm_jax.pipelines.schedule import Schedule, load
from ldm_jax.pipelines.schedulers import CLASSES

GRIDS: dict[str, dict[str, Any]] = {
    **{name: {"timestep_spacing": name} for name in SPACINGS},
    **dict(zip(("karras", "exponential", "beta", "lu"), ({key: True} for key in LEVEL_SPACINGS))),
}
OFF = dict.fromkeys(LEVEL_SPACINGS, False)
EULER = "EulerDiscreteScheduler"
# Rules with a class of their own, and what else its file says of them.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": (EULER, {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "deis_2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "uni_pc": ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
    "uni_pc_bh2": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
}
# What each class of these takes from its own file alone.
OWN = ("solver_type", "algorithm_type", "solver_order", "final_sigmas_type", "interpolation_type", "timestep_type")


def takes(name: str, grid: str) -> bool:
    """Whether the class `name` has the option of this grid."""
    return set(GRIDS[grid]) <= set(CLASSES[name].known)


# A compiled program is bound to the processes that are made here: the same question has to have the same answer.
@functools.lru_cache(maxsize=64)
def respaced(schedule: Schedule, grid: str, sampler: str | None = None) -> Schedule:
    """The schedule of the same file with this grid, for the update rule `sampler` (None: the file's); `at` takes the same `sampler`.

    Raises ValueError for an unknown grid, and for one that makes no sense with the file: other steps than a distilled network
    knows, levels of a table for a process that has none, uneven steps for PNDM, whose formula is of even ones.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid {grid!r} is unknown for published pipelines; there are {', '.join(GRIDS)}")
    rule, own = sampler or schedule.sampler, sampler in (None, schedule.sampler)
    config = dict(schedule.stated)
    if own and takes(schedule.name, grid) and "original_inference_steps" not in CLASSES[schedule.name].known:
        return load(config | OFF | GRIDS[grid] | {"_class_name": schedule.name})
    if schedule.process.levels is None or "original_inference_steps" in CLASSES[schedule.name].known:
        raise ValueError(f"{schedule.name} has no grid {grid!r}: its steps are those that its network was made for")
    name, options = (schedule.name, {}) if own else FAMILIES.get(rule, (None, {}))
    if name is not None and takes(name, grid):
        if name != schedule.name:
            config = {key: value for key, value in config.items() if key not in OWN}
        spaced = load(config | options | OFF | GRIDS[grid] | {"_class_name": name})
        return spaced if name == schedule.name else spaced._replace(alpha_to_one=None)
    if rule in ("plms", "pndm"):
        raise ValueError(
            f"sampler {rule!r} takes equal steps, not the grid {grid!r}; another --sampler does, such as euler or dpmpp_2m"
        )
    if not takes(EULER, grid):
        raise ValueError(f"sampler {rule!r} has no grid {grid!r}; dpmpp_2m has it")
    spaced = load({k: v for k, v in config.items() if k not in OWN} | OFF | GRIDS[grid] | {"_class_name": EULER})
    return spaced._replace(clip=schedule.clip, alpha_to_one=None)
