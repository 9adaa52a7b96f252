"""Samplers by the names that k-diffusion and ComfyUI give them; one family a file, all run by `sample`."""

from collections.abc import Callable

from ldm_jax.diffusion.samplers.adams import gradient_estimation, ipndm, lms, plms, pndm
from ldm_jax.diffusion.samplers.adaptive import dpm_adaptive
from ldm_jax.diffusion.samplers.ancestral import ddpm, dpm_2_ancestral, dpmpp_2s_ancestral, euler_ancestral
from ldm_jax.diffusion.samplers.churn import edm_stochastic, restart
from ldm_jax.diffusion.samplers.consistency import lcm, tcd
from ldm_jax.diffusion.samplers.langevin import annealed_langevin, predictor_corrector
from ldm_jax.diffusion.samplers.multistep import (
    deis_2,
    deis_3,
    dpm_solver_2m,
    dpm_solver_3m,
    dpmpp_2m,
    dpmpp_3m,
    res_multistep,
    uni_pc,
    uni_pc_bh2,
)
from ldm_jax.diffusion.samplers.multistep_sde import (
    dpmpp_2m_sde,
    dpmpp_2m_sde_heun,
    dpmpp_3m_sde,
    er_sde,
    sa_solver,
    sa_solver_pece,
)
from ldm_jax.diffusion.samplers.ode import ddim, dpm_2, euler, heun, midpoint, rk4
from ldm_jax.diffusion.samplers.sampler import Sampler, sample
from ldm_jax.diffusion.samplers.sde import dpmpp_sde, euler_maruyama, reverse_diffusion, seeds_2, seeds_3
from ldm_jax.diffusion.samplers.singlestep import dpm_solver_2, dpm_solver_3, dpmpp_2s, dpmpp_3s

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "euler": euler,
    "heun": heun,
    "ddim": ddim,
    "midpoint": midpoint,
    "rk4": rk4,
    "dpm_2": dpm_2,
    "lms": lms,
    "ipndm": ipndm,
    "plms": plms,
    "pndm": pndm,
    "gradient_estimation": gradient_estimation,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_3": dpm_solver_3,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "dpm_adaptive": dpm_adaptive,
    "dpm_solver_2m": dpm_solver_2m,
    "dpm_solver_3m": dpm_solver_3m,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "deis_2": deis_2,
    "deis_3": deis_3,
    "res_multistep": res_multistep,
    "uni_pc": uni_pc,
    "uni_pc_bh2": uni_pc_bh2,
    # reverse SDE, ancestral, Langevin
    "ddpm": ddpm,
    "euler_ancestral": euler_ancestral,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "dpmpp_sde": dpmpp_sde,
    "seeds_2": seeds_2,
    "seeds_3": seeds_3,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": dpmpp_2m_sde_heun,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "er_sde": er_sde,
    "sa_solver": sa_solver,
    "sa_solver_pece": sa_solver_pece,
    "edm_stochastic": edm_stochastic,
    "restart": restart,
    "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
    "lcm": lcm,
    "tcd": tcd,
}

__all__ = ["SAMPLERS", "Sampler", "sample"]
