"""The scheduler classes of diffusers, by the `_class_name` of their scheduler_config.json: one line a class."""

from ldm_jax.schedules import (
    consistency,
    ddim,
    ddpm,
    deis,
    dpm_solver,
    flow_match,
    k_diffusion,
    lcm,
    pndm,
    score_sde_ve,
    unipc,
)
from ldm_jax.schedules.family import SchedulerClass

CLASSES: dict[str, SchedulerClass] = {
    "DDIMScheduler": ddim.DDIM,
    "DDIMInverseScheduler": ddim.DDIM_INVERSE,
    "DDPMScheduler": ddpm.DDPM,
    "PNDMScheduler": pndm.PNDM,
    "EulerDiscreteScheduler": k_diffusion.EULER,
    "EulerAncestralDiscreteScheduler": k_diffusion.EULER_ANCESTRAL,
    "LMSDiscreteScheduler": k_diffusion.LMS,
    "HeunDiscreteScheduler": k_diffusion.HEUN,
    "KDPM2DiscreteScheduler": k_diffusion.KDPM2,
    "KDPM2AncestralDiscreteScheduler": k_diffusion.KDPM2_ANCESTRAL,
    "DPMSolverMultistepScheduler": dpm_solver.DPM_SOLVER_MULTISTEP,
    "UniPCMultistepScheduler": unipc.UNIPC_MULTISTEP,
    "DEISMultistepScheduler": deis.DEIS_MULTISTEP,
    "LCMScheduler": lcm.LCM,
    "TCDScheduler": lcm.TCD,
    "FlowMatchEulerDiscreteScheduler": flow_match.FLOW_MATCH_EULER,
    "ScoreSdeVeScheduler": score_sde_ve.SCORE_SDE_VE,
    "CMStochasticIterativeScheduler": consistency.CM_STOCHASTIC_ITERATIVE,
}
# Options that a file of any class may carry: its own class ignores those of other classes.
OPTIONS = {key for row in CLASSES.values() for key in (*row.options, *row.fixed)}
