"""Samplers for denoisers that are consistency functions: x is a sample of the data, not E[x | x_t].

A consistency function takes x_t to the end of its probability-flow path (Song et al. 2023, arXiv:2303.01469, equation 5), so
that x + noise has the exact distribution after one step and every further one. With a plain denoiser, whose x is E[x | x_t], neither
sampler converges as the grid is refined: their order is 0.
"""

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.ode import renoise
from ldm_jax.diffusion.samplers.sampler import Sampler, State, noise, start
from ldm_jax.diffusion.samplers.sde import transition


def lcm(sigma_min: float = 0.0) -> Sampler:
    """Multistep consistency sampling: x_s = alpha_s x + sqrt(sigma_s^2 - sigma_min^2) z, all noise fresh.

    Song et al. 2023 (arXiv:2303.01469), algorithm 1; Luo et al. 2023 (LCM, arXiv:2310.04378), algorithm 3, whose c_skip and
    c_out belong to the denoiser. Exact in every step for an exact consistency function, else order 0; one evaluation,
    stochastic, unit noise per step. For consistency-distilled networks at 1 to 8 steps. sigma_min > 0 is for functions that lead
    to x_epsilon, their process's first level, and not to clean data: consistency models' epsilon = 0.002. Raises ValueError for
    a negative one.
    """
    if not sigma_min >= 0:
        raise ValueError(f"sigma_min is {sigma_min}, expected a number >= 0")

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        fresh = jnp.sqrt(jnp.maximum(process.sigma(s) ** 2 - sigma_min**2, 0))
        return State(process.alpha(s) * denoise(carry.x, t).x + fresh * noise(keys, carry.x))

    return Sampler(start, step, order=0, evaluations=1, stochastic=True)


def tcd(gamma: float = 0.3) -> Sampler:
    """Strategic stochastic sampling: to u = (1 - gamma) s by x and eps, then forward noise from u to s.

    Zheng et al. 2024 (TCD, arXiv:2402.19159), algorithm 2: x_u = alpha_u x + sigma_u eps, x_s = a x_u + b z of
    sde.transition. gamma = 0 is euler, gamma = 1 is lcm where sigma(0) = 0. Exact in every step for an exact trajectory
    consistency function, else order 0 for gamma > 0; one evaluation, stochastic for gamma > 0, unit noise per step. On a table
    the index of the entry is multiplied and rounded down, as in the paper. For TCD-distilled networks at 1 to 20 steps. Raises
    ValueError unless 0 <= gamma <= 1.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}, expected a number in [0, 1]")

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        clean, u = denoise(carry.x, t), (1 - gamma) * s
        if process.levels is not None and gamma > 0:
            # Entry i lies at (i + 1) / N, a float that may fall short of it.
            entry = jnp.floor((1 - gamma) * jnp.maximum(process.levels * s - 1, -1) + 1e-3)
            u = jnp.minimum((entry + 1) / process.levels, s)
        x_u = renoise(process, clean, u)
        if gamma == 0:
            return State(x_u)
        a, b = transition(process, u, s)
        return State(a * x_u + jnp.where(process.sigma(s) > 0, b, 0) * noise(keys, x_u))

    return Sampler(start, step, order=0 if gamma > 0 else 1, evaluations=1, stochastic=gamma > 0)
