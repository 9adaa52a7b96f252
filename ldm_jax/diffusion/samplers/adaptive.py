"""A sampler that chooses its steps between the times of the grid."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process, per_row
from ldm_jax.diffusion.samplers.exponential import level, time_at
from ldm_jax.diffusion.samplers.ode import renoise
from ldm_jax.diffusion.samplers.sampler import Sampler
from ldm_jax.diffusion.samplers.singlestep import third


class Controlled(NamedTuple):
    """x [B, ...]; the length in lambda that each row tries next, f[B]; its last two 1 / E, f[B, 2], 0 for none yet."""

    x: Array
    length: Array
    past: Array


def dpm_adaptive(
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    safety: float = 0.81,
    attempts: int = 1000,
) -> Sampler:
    """DPM-Solver-23: between two times of the grid, as many steps in lambda as an estimate of the error asks for.

    Lu et al. 2022 (arXiv:2206.00927), section 3.4 and appendix C, with k-diffusion's controller. From three evaluations
    an attempt gets x_s by DPM-Solver-3 and, from the first two, x'_s by DPM-Solver-2. With

        E = rms over a row of (x_s - x'_s) / max(atol, rtol max(|x_t|, |x'_s|)),    e = 1 / E,

    a PID controller (Soderlind 2003, "Digital filters in adaptive time-stepping") gives the next attempt's length as this one's
    times 1 + atan(e_0^((p + i + d) / 3) e_1^(-(p + 2 d) / 3) e_2^(d / 3) - 1), e_1 and e_2 those of the steps accepted
    before; the attempt is accepted where that factor is at least `safety`.

    Order 3 in the steps taken; deterministic. Each row takes steps independently, so that it does not depend on its batch: the
    Denoiser is evaluated at times t [B], and the batch goes on until its slowest row is done. evaluations = 3 is the cost of an
    attempt; a grid step has one attempt or more. No step is longer than a step of the grid: with few entries (log_snr, 1 to 5
    steps) the error decides, a fine grid gives dpm_solver_3. A row that needs more than `attempts` within a grid step is NaN
    from there on, so that it cannot be mistaken for a sample. A grid step that leaves alpha = 0 or enters sigma = 0 is DDIM's,
    with one evaluation. For unguided sampling to a required accuracy. Raises ValueError unless rtol, atol, h_init, safety and
    attempts are positive.
    """
    for name, value in dict(rtol=rtol, atol=atol, h_init=h_init, safety=safety, attempts=attempts).items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected a number > 0")
    powers = (pcoeff + icoeff + dcoeff) / 3, -(pcoeff + 2 * dcoeff) / 3, dcoeff / 3

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Controlled:
        rows = x_T.shape[0]
        return Controlled(x_T, jnp.full(rows, h_init, x_T.dtype), jnp.zeros((rows, 2), x_T.dtype))

    def step(
        denoise: Denoiser, process: Process, carry: Controlled, t: Array, s: Array, keys: Array | None
    ) -> Controlled:
        begin, end = level(process, t), level(process, s)

        def attempt(state):
            count, here, (x, length, past) = state
            left = jnp.abs(end - here)
            last, tried = length >= left, jnp.minimum(length, left)
            there = jnp.where(last, end, here + jnp.sign(end - begin) * tried)
            now, then = time_at(process, here), time_at(process, there)
            high, low = third(denoise, "eps", process, denoise(x, now), now, then)
            tolerance = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(x), jnp.abs(low)))
            error = jnp.sqrt(jnp.mean(((high - low) / tolerance) ** 2, tuple(range(1, x.ndim))))
            e = 1 / (error + 1e-8)
            before = jnp.where(past > 0, past, e[:, None])
            factor = e ** powers[0] * before[:, 0] ** powers[1] * before[:, 1] ** powers[2]
            factor = 1 + jnp.arctan(factor - 1)
            active = left > 0
            accept = active & (factor >= safety)
            # A last step that the end of the grid step cut short does not shorten the next length.
            proposed = jnp.where(accept & last, jnp.maximum(length, tried * factor), tried * factor)
            return (
                count + 1,
                jnp.where(accept, there, here),
                Controlled(
                    jnp.where(per_row(accept, x) > 0, high, x),
                    jnp.where(active, proposed, length),
                    jnp.where(accept[:, None], jnp.stack([e, before[:, 0]], 1), past),
                ),
            )

        def control():
            def unfinished(state):
                # A length is NaN when the network gives NaN: further attempts cannot repair that row.
                return (state[0] < attempts) & jnp.any((state[1] != end) & jnp.isfinite(state[2].length))

            here = jnp.full(carry.x.shape[:1], begin)
            _, here, out = jax.lax.while_loop(unfinished, attempt, (0, here, carry))
            return out._replace(x=jnp.where(per_row(here == end, out.x) > 0, out.x, jnp.nan))

        def ddim():
            return carry._replace(x=renoise(process, denoise(carry.x, t), s))

        return jax.lax.cond(jnp.isfinite(begin) & jnp.isfinite(end), control, ddim)

    return Sampler(init, step, order=3, evaluations=3)
