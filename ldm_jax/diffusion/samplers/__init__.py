"""Samplers by the names that k-diffusion and ComfyUI give them; one family a file, all run by `sample`."""

from collections.abc import Callable

from ldm_jax.diffusion.samplers.multistep import dpmpp_2m
from ldm_jax.diffusion.samplers.ode import ddim, euler, heun
from ldm_jax.diffusion.samplers.sampler import Sampler, sample

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "euler": euler,
    "heun": heun,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
}

__all__ = ["SAMPLERS", "Sampler", "sample"]
