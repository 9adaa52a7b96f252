"""One-step samplers of the reverse SDE.

With lambda = log(alpha / sigma), rising from t to s by h, and y = x_t / alpha, the SDE family whose every member has the
marginals of the process is

    dy = -(1 + eta) (y - x) dlambda + sqrt(2 eta) (sigma / alpha) dw,

eta = 0 the probability-flow ODE, eta = 1 Anderson's reverse of the forward SDE (Song et al. 2021, arXiv:2011.13456,
equation 6); eta multiplies g^2. For a constant clean estimate x its solution is exact (Lu et al. 2022,
arXiv:2211.01095, section 5; Xue et al. 2023, arXiv:2309.05019, proposition 4.2):

    x_s = alpha_s x + sigma_s exp(-eta h) eps + sigma_s sqrt(1 - exp(-2 eta h)) z,        see `split`,

and the change of x along the step enters with the moments M_k((1 + eta) h) of exponential.py. All of it is finite where
alpha_t = 0 (only fresh noise remains) and where sigma_s = 0 (no noise remains). A method's order is its weak order, that
of the mean and covariance of x_s.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import Clean, reverse_sde
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.brownian import Walk, check_noise, draws, increments, walk
from ldm_jax.diffusion.samplers.exponential import level, moments, time_at
from ldm_jax.diffusion.samplers.sampler import Sampler, State, noise, start


def split(process: Process, t: Array, s: Array, eta: Array) -> tuple[Array, Array]:
    """(kept, fresh): the standard deviations of old and new noise in x_s, kept^2 + fresh^2 = sigma_s^2.

    kept = sigma_s exp(-eta h), h = lambda_s - lambda_t; eta is a number or traced, 0 keeps all. With eta = 1 the step
    alpha_s x + kept eps + fresh z draws from q(x_s | x_t, x) (Ho et al. 2020, arXiv:2006.11239, equations 6-7).
    """
    sigma_s = process.sigma(s)
    h = level(process, s) - level(process, t)
    grown = jnp.where(eta > 0, eta * h, 0)
    return sigma_s * jnp.exp(-grown), sigma_s * jnp.sqrt(-jnp.expm1(-2 * grown))


def transition(process: Process, s: Array, t: Array) -> tuple[Array, Array]:
    """(a, b) of the forward step x_t = a x_s + b z from s to t > s: a = alpha_t / alpha_s, b^2 = sigma_t^2 - a^2 sigma_s^2.

    Kingma et al. 2021 (VDM, arXiv:2107.00630), appendix A.1. Not defined where alpha_s = 0.
    """
    a = process.alpha(t) / process.alpha(s)
    return a, jnp.sqrt(jnp.maximum(process.sigma(t) ** 2 - (a * process.sigma(s)) ** 2, 0))


def renoised(process: Process, clean: Clean, t: Array, s: Array, z: Array, eta: Array = 1.0) -> Array:
    """alpha_s x + kept eps + fresh z: the exact step for a constant clean estimate."""
    kept, fresh = split(process, t, s, eta)
    return process.alpha(s) * clean.x + kept * clean.eps + fresh * z


def by_euler_maruyama(
    process: Process, clean: Clean, x_t: Array, t: Array, s: Array, z: Array, eta: Array = 1.0
) -> Array:
    """x_s = x_t + (s - t) drift + sqrt(t - s) diffusion z, of prediction.reverse_sde; see euler_maruyama."""
    drift, diffusion = reverse_sde(process, clean, t, eta)
    fresh = jnp.where(process.sigma(s) > 0, jnp.sqrt(t - s) * diffusion, 0)
    x_s = x_t + (s - t) * drift + fresh * z
    # f and g are infinite where alpha = 0.
    return jnp.where(process.alpha(t) > 0, x_s, renoised(process, clean, t, s, z, eta**2))


def by_reverse_diffusion(process: Process, clean: Clean, x_t: Array, t: Array, s: Array, z: Array) -> Array:
    """x_s = (2 - a) x_t + b^2 score + b z, of `transition`; see reverse_diffusion."""
    a, b = transition(process, s, t)
    fresh = jnp.where(process.sigma(s) > 0, b, 0)
    return (2 - a) * x_t - b**2 / process.sigma(t) * clean.eps + fresh * z


def euler_maruyama(eta: float = 1.0, depth: int = 0) -> Sampler:
    """Euler-Maruyama: x_s = x_t + (s - t) [f x - (1 + eta^2) / 2 g^2 score] + eta g sqrt(t - s) z.

    Song et al. 2021 (arXiv:2011.13456), equation 6 for eta = 1; eta multiplies g, and 0 is Euler's method in t on the
    probability-flow ODE. depth > 0 takes the increments of one Brownian path per row (brownian.py), else z is fresh at
    every step. Weak order 1, strong order 1 along a path (the noise is additive), one evaluation, stochastic. It needs
    |f| (t - s) and g^2 (t - s) / sigma^2 below 1, hundreds of steps on most grids: the plain reference among SDE
    samplers. A step that leaves alpha = 0, where f is infinite, is DDPM's; a step into sigma = 0 adds no noise. Raises
    ValueError for a negative eta or a depth outside 0..30.
    """
    check_noise(eta, depth=depth)

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Walk:
        return walk(process, x_T, keys, depth)

    def step(denoise: Denoiser, process: Process, carry: Walk, t: Array, s: Array, keys: Array | None) -> Walk:
        z = increments(carry, keys, (t, s), depth)[0] if eta > 0 else jnp.zeros_like(carry.x)
        x = by_euler_maruyama(process, denoise(carry.x, t), carry.x, t, s, z, eta)
        return Walk(State(x), carry.path)

    return Sampler(init, step, order=1, evaluations=1, stochastic=eta > 0)


def reverse_diffusion() -> Sampler:
    """Reverse diffusion: x_s = (2 - a) x_t + b^2 score + b z, with x_t = a x_s + b z' the forward step that it undoes.

    Song et al. 2021 (arXiv:2011.13456), equation 46 and the predictors of algorithms 2 (VE: a = 1) and 3 (VP:
    a^2 = 1 - beta, b^2 = beta). Weak order 1, one evaluation, stochastic. Needs no derivative of the schedule and no small
    f (t - s), hence steadier than euler_maruyama on coarse grids; over-dispersed in few steps, as b is the larger of the
    two variances of DDPM. A step into sigma = 0 adds no noise.
    """

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        return State(by_reverse_diffusion(process, denoise(carry.x, t), carry.x, t, s, noise(keys, carry.x)))

    return Sampler(start, step, order=1, evaluations=1, stochastic=True)


class Stage(NamedTuple):
    """A stage of a step from t: its time, the moments' argument (1 + eta) (lambda_stage - lambda_t), its noise in x."""

    t: Array
    h: Array
    noise: Array


def inner_time(process: Process, t: Array, s: Array, r: float) -> tuple[Array, Array]:
    """(u, finite): lambda_u = lambda_t + r h, between t and s; not finite where alpha_t or sigma_s is 0 (u is any time then)."""
    level_t, level_s = level(process, t), level(process, s)
    finite = jnp.isfinite(level_t) & jnp.isfinite(level_s)
    u = time_at(process, jnp.where(finite, level_t + r * (level_s - level_t), 0))
    return jnp.where(finite, jnp.clip(u, jnp.minimum(s, t), jnp.maximum(s, t)), 0.5 * (s + t)), finite


def stages(process: Process, t: Array, times: tuple[Array, ...], zs: list[Array], eta: float) -> list[Stage]:
    """The stages at falling times after t; their noises belong to one path of the SDE.

    zs[i] is the unit noise of the i-th interval: N_i = (kept / sigma) N_{i-1} + fresh z_i with `split` over that interval.
    """
    result, last, held = [], t, jnp.zeros_like(zs[0])
    for u, z in zip(times, zs, strict=True):
        kept, fresh = split(process, last, u, eta)
        held = kept / process.sigma(last) * held + fresh * z
        result.append(Stage(u, (1 + eta) * (level(process, u) - level(process, t)), held))
        last = u
    return result


def at_stage(process: Process, clean: Clean, stage: Stage, t: Array, eta: float) -> Array:
    """The exact step from t to a stage for a constant clean estimate."""
    kept, _ = split(process, t, stage.t, eta)
    return process.alpha(stage.t) * clean.x + kept * clean.eps + stage.noise


def dpmpp_sde(eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5, depth: int = 0) -> Sampler:
    """DPM-Solver++ SDE (2S): a stage at lambda_t + r h, then x_s = alpha_s (x + M_0 / (2 r) (x_u - x)) + kept eps + fresh z.

    k-diffusion's singlestep form of Lu et al. 2022 (arXiv:2211.01095), section 5, with M_0((1 + eta) h), kept and fresh as
    in `split`. The noises of stage and step are unit increments of one Brownian motion in t, over [u, t] and [s, t];
    depth > 0 keeps that motion from grid to grid (brownian.py). eta = 0 is DPM-Solver++(2S). s_noise multiplies z.
    Weak order 2, strong order 1, two evaluations, stochastic; one evaluation and order 1 where alpha_t or sigma_s is 0.
    Detailed images at 10 to 25 steps, at twice the price of dpmpp_2m_sde. Raises ValueError for a negative eta or
    s_noise, r outside (0, 1], a depth outside 0..30.
    """
    check_noise(eta, s_noise, depth)
    if not 0 < r <= 1:
        raise ValueError(f"r is {r}, expected a number in (0, 1]")
    stochastic = eta > 0

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Walk:
        return walk(process, x_T, keys, depth)

    def step(denoise: Denoiser, process: Process, carry: Walk, t: Array, s: Array, keys: Array | None) -> Walk:
        clean = denoise(carry.x, t)
        u, finite = inner_time(process, t, s, r)
        first = last = jnp.zeros_like(carry.x)
        if stochastic:
            first, second = (s_noise * z for z in increments(carry, keys, (t, u, s), depth))
            share = (t - u) / (t - s)
            last = jnp.sqrt(share) * first + jnp.sqrt(1 - share) * second

        def correction():
            x_u = denoise(renoised(process, clean, t, u, first, eta), u).x
            whole = moments("x", (1 + eta) * (level(process, s) - level(process, t)), 1)[0]
            return process.alpha(s) * whole / (2 * r) * (x_u - clean.x)

        x = renoised(process, clean, t, s, last, eta)
        return Walk(State(x + jax.lax.cond(finite, correction, lambda: jnp.zeros_like(x))), carry.path)

    return Sampler(init, step, order=2, evaluations=2, stochastic=stochastic)


def seeds_2(eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> Sampler:
    """SEEDS-2: dpmpp_sde with the exact joint law of the noises at stage and step.

        x_u = alpha_u x + kept eps + N_u,    x_s = alpha_s (x + M_0 / (2 r) (x_u - x)) + kept eps + N_s

    Gonzalez et al. 2023 (arXiv:2305.14267), SEEDS-2 in data prediction: (N_u, N_s) is the Ornstein-Uhlenbeck noise of the
    SDE itself at lambda_t + r h and lambda_s (see `stages`), not increments of a Brownian motion in time. eta = 0 is
    DPM-Solver++(2S). Weak order 2, two evaluations, stochastic; one evaluation and order 1 where alpha_t or sigma_s is 0.
    Unit noise per step. Raises ValueError for a negative eta or s_noise, r outside (0, 1].
    """
    check_noise(eta, s_noise)
    if not 0 < r <= 1:
        raise ValueError(f"r is {r}, expected a number in (0, 1]")
    stochastic = eta > 0

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        clean = denoise(carry.x, t)
        u, finite = inner_time(process, t, s, r)
        zs = [s_noise * z for z in draws(keys, carry.x, 2)] if stochastic else [jnp.zeros_like(carry.x)] * 2

        def two():
            middle, last = stages(process, t, (u, s), zs, eta)
            x_u = denoise(at_stage(process, clean, middle, t, eta), u).x
            extra = moments("x", last.h, 1)[0] / (2 * r) * (x_u - clean.x)
            return at_stage(process, clean, last, t, eta) + process.alpha(s) * extra

        return State(jax.lax.cond(finite, two, lambda: renoised(process, clean, t, s, zs[1], eta)))

    return Sampler(start, step, order=2, evaluations=2, stochastic=stochastic)


def seeds_3(eta: float = 1.0, s_noise: float = 1.0, r_1: float = 1 / 3, r_2: float = 2 / 3) -> Sampler:
    """SEEDS-3: stages at lambda_t + r_1 h and lambda_t + r_2 h, each from the line in lambda through x and the one before.

        x_2 = alpha_2 (x + M_1(r_2 H) r_2 / r_1 (x_1 - x)) + ...,    x_s = alpha_s (x + M_1(H) / r_2 (x_2 - x)) + ...

    with H = (1 + eta) h and the kept and fresh noise of seeds_2. Gonzalez et al. 2023 (arXiv:2305.14267), SEEDS-3 in data
    prediction; eta = 0 is DPM-Solver-3's scheme (Lu et al. 2022, arXiv:2206.00927, algorithm 2) in data prediction, of
    order 3. Weak order 2 for eta > 0, since a third needs iterated integrals of the noise that no stage draws; three
    evaluations, stochastic; one evaluation and order 1 where alpha_t or sigma_s is 0. Unit noise per step. Raises
    ValueError for a negative eta or s_noise, or unless 0 < r_1 < r_2 <= 1.
    """
    check_noise(eta, s_noise)
    if not 0 < r_1 < r_2 <= 1:
        raise ValueError(f"r_1, r_2 are {r_1}, {r_2}, expected 0 < r_1 < r_2 <= 1")
    stochastic = eta > 0

    def step(denoise: Denoiser, process: Process, carry: State, t: Array, s: Array, keys: Array | None) -> State:
        clean = denoise(carry.x, t)
        (u_1, finite), (u_2, _) = (inner_time(process, t, s, r) for r in (r_1, r_2))
        zs = [s_noise * z for z in draws(keys, carry.x, 3)] if stochastic else [jnp.zeros_like(carry.x)] * 3

        def slope_part(stage, change, r):
            return process.alpha(stage.t) * moments("x", stage.h, 2)[1] / r * change

        def three():
            first, second, last = stages(process, t, (u_1, u_2, s), zs, eta)
            change = denoise(at_stage(process, clean, first, t, eta), u_1).x - clean.x
            x_2 = at_stage(process, clean, second, t, eta) + slope_part(second, change, r_1 / r_2)
            change = denoise(x_2, u_2).x - clean.x
            return at_stage(process, clean, last, t, eta) + slope_part(last, change, r_2)

        return State(jax.lax.cond(finite, three, lambda: renoised(process, clean, t, s, zs[2], eta)))

    return Sampler(start, step, order=2 if eta > 0 else 3, evaluations=3, stochastic=stochastic)
