"""Multistep exponential samplers: they use the outputs of the network at earlier steps in place of further evaluations.

    x_s = alpha_s x + sigma_s eps + alpha_s sum_j w_j (x_j - x)             data prediction
    x_s = alpha_s x + sigma_s eps + sigma_s sum_j w_j (eps_j - eps)         noise prediction

with weights from the moments M_k of exponential.py, exact for a polynomial in lambda = log(alpha / sigma), or as
published where a paper or its code truncates them. A step that leaves alpha = 0 or enters sigma = 0, where lambda is
infinite, has w = 0 (DDIM's step). Such a place is never a node of the interpolation: the order is lower for as long as it would
be one. The first steps are of order 1, 2, ... too, which costs little in a grid that begins at sigma / alpha >> 1, where x and
eps hardly depend on lambda. A grid that is uniform in t up to alpha = 0 costs more (a factor log n in the error of an
order-2 method), since its first steps do not shrink in lambda.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.exponential import Kind, combine, estimate, level, moments, scale, weights
from ldm_jax.diffusion.samplers.history import History, check_final, empty, remember, within
from ldm_jax.diffusion.samplers.ode import renoise
from ldm_jax.diffusion.samplers.sampler import Sampler

Moments = tuple[Array, ...]
# (M_0, M_1, ...) and which nodes are in use -> the moments that a method uses in their place.
Rule = Callable[[Moments, Array], Moments]


def exact(m: Moments, usable: Array) -> Moments:
    """The moments as they are: the polynomial through the nodes is integrated exactly."""
    return m


def taylor(m: Moments, usable: Array) -> Moments:
    """DPM-Solver's: M_0 / 2 for M_1 while one earlier value is in use, M_2 / 2 for M_2 when two are."""
    if len(m) == 2:
        return m[0], m[0] / 2
    return m[0], jnp.where(usable[1], m[1], m[0] / 2), m[2] / 2


def halved(m: Moments, usable: Array) -> Moments:
    """`taylor` with M_1 itself wherever it occurs: solver_type 'heun' of DPM-Solver's published code, and k-diffusion's."""
    return (*m[:2], m[2] / 2)


# solver_type of DPM-Solver's published code, of the steps through a line.
SOLVERS: dict[str, Rule] = {"midpoint": taylor, "heun": halved}


def _solver(name: str) -> Rule:
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}, expected one of {sorted(SOLVERS)}")
    return SOLVERS[name]


def reach(from_level: Array, to_level: Array, usable: Array) -> tuple[Array, Array]:
    """h = to - from and `usable`; 1 and nowhere where h is infinite."""
    finite = jnp.isfinite(from_level) & jnp.isfinite(to_level)
    return jnp.where(finite, to_level - from_level, 1), usable & finite


def _multistep(kind: Kind, order: int, rule: Rule, true_order: int, final: tuple[int, ...] = ()) -> Sampler:
    check_final(final)

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> History:
        return empty(x_T, order - 1, times)

    def step(denoise: Denoiser, process: Process, carry: History, t: Array, s: Array, keys: Array | None) -> History:
        clean = denoise(carry.x, t)
        value, level_t = estimate(kind, clean), level(process, t)
        h, usable = reach(level_t, level(process, s), carry.filled & within(carry.left, final, order - 1))
        nodes = jnp.where(usable, carry.places - level_t, 0) / h
        w = weights(nodes, usable, rule(moments(kind, h, order), usable))
        x = renoise(process, clean, s) + scale(kind, process, s) * combine(w, carry.values, value)
        return remember(carry, x, value, level_t)

    return Sampler(init, step, order=true_order, evaluations=1)


def dpmpp_2m(final: tuple[int, ...] = ()) -> Sampler:
    """DPM-Solver++(2M): w_1 = -M_0 / (2 r), r = h_last / h; that is D = x + h / (2 h_last) (x - x_last) in DDIM's place of x.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2, h = lambda_s - lambda_t. Order 2, one evaluation, deterministic. The
    usual choice for guided sampling at 10 to 25 steps. final: orders of the last steps at most (history.within), here and
    below; (1,) makes the last one DDIM's, which one into sigma = 0 is anyway. Raises ValueError for an order below 1.
    """
    return _multistep("x", 2, taylor, 2, final)


def dpmpp_3m(final: tuple[int, ...] = (), solver: Literal["midpoint", "heun"] = "midpoint") -> Sampler:
    """DPM-Solver++(3M): the parabola through three clean estimates, its last term halved as in the published code.

    Lu et al. 2022 (arXiv:2211.01095), data prediction in the multistep form of DPM-Solver-3; k-diffusion and diffusers. All
    of them multiply the second divided difference, which is half the second derivative, by M_2 / 2, half its weight: what
    is left out is of local order 3, so the order is 2. res_multistep(order=3) has the whole weight and order 3. One
    evaluation, deterministic. For unguided sampling at 20 steps and more; final=(2, 1) below 15. solver says how a step through
    a line weighs it: 'midpoint' as dpmpp_2m, 'heun' as res_multistep. Raises ValueError for another.
    """
    return _multistep("x", 3, _solver(solver), 2, final)


def dpm_solver_2m(final: tuple[int, ...] = ()) -> Sampler:
    """DPM-Solver(2M): dpmpp_2m with eps in place of x, w_1 = -M_0(-h) / (2 r).

    Lu et al. 2022 (arXiv:2206.00927), the multistep form in the authors' code. Order 2, one evaluation, deterministic. For
    unguided sampling; under strong guidance use data prediction.
    """
    return _multistep("eps", 2, taylor, 2, final)


def dpm_solver_3m(final: tuple[int, ...] = (), solver: Literal["midpoint", "heun"] = "midpoint") -> Sampler:
    """DPM-Solver(3M): dpmpp_3m with eps in place of x, with the same halved last term and so of order 2.

    Lu et al. 2022 (arXiv:2206.00927), the published code's multistep form. deis_3 has the whole weight and order 3. One
    evaluation, deterministic. For unguided sampling at 20 steps and more. final and solver as in dpmpp_3m.
    """
    return _multistep("eps", 3, _solver(solver), 2, final)


def deis_2(final: tuple[int, ...] = ()) -> Sampler:
    """DEIS of order 2: the line in lambda through two values of eps, integrated exactly: w_1 = -M_1(-h) / r.

    Zhang & Chen 2022 (arXiv:2204.13902), equation 15, interpolating in lambda = -log rho (their log-rho AB, what diffusers
    has). One evaluation, deterministic. For unguided eps networks at 5 to 20 steps.
    """
    return _multistep("eps", 2, exact, 2, final)


def deis_3(final: tuple[int, ...] = ()) -> Sampler:
    """DEIS of order 3: the parabola in lambda through three values of eps, integrated exactly.

    Zhang & Chen 2022 (arXiv:2204.13902), equation 15, as in deis_2. Order 3 but for the start (see the module), one
    evaluation, deterministic. For unguided eps networks at 5 to 20 steps. diffusers' closed form of these weights cancels in
    single precision beyond some 40 steps.
    """
    return _multistep("eps", 3, exact, 3, final)


def res_multistep(order: int = 2, final: tuple[int, ...] = ()) -> Sampler:
    """RES multistep: the polynomial in lambda through `order` clean estimates, integrated exactly: w_1 = -M_1 / r for 2.

    Zhang et al. 2023 (arXiv:2308.02157), the multistep form: unlike dpmpp_2m it meets the order conditions of exponential
    integrators for every h and not only as h -> 0. Order 2 or 3 (3 except at the start, see the module), one
    evaluation, deterministic. In dpmpp_2m's place where steps are long. Raises ValueError for another order.
    """
    if order not in (2, 3):
        raise ValueError(f"order is {order}, expected 2 or 3")
    return _multistep("x", order, exact, order, final)


class Predicted(NamedTuple):
    """The history, whose x is the predicted state; that state without the differences (DDIM's step)."""

    past: History
    base: Array

    @property
    def x(self) -> Array:
        return self.past.x


def _uni_pc(order: int, b: Literal["h", "expm1"], final: tuple[int, ...] | None) -> Sampler:
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}, expected 1, 2 or 3")
    last = (2, 1) if final is None else final
    check_final(last)

    def quadrature(h: Array, nodes: Array, usable: Array) -> Array:
        m = moments("x", h, len(nodes) + 1)
        half = 0.5 * (h if b == "h" else m[0])
        return weights(nodes, usable, (m[0], jnp.where(jnp.sum(usable) == 1, half, m[1]), *m[2:]))

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Predicted:
        past = empty(x_T, order, times)
        if final is None:
            past = past._replace(left=jnp.where(process.sigma(times[-1]) == 0, past.left, -1))
        return Predicted(past, x_T)

    def corrected(process: Process, carry: Predicted, x: Array, t: Array, level_t: Array) -> Array:
        """The step that led to t once more, its polynomial now through the new clean estimate x as well."""
        values, places, filled = carry.past.values, carry.past.places, carry.past.filled
        earlier = filled[1:] & within(carry.past.left + 1, last, order - 1)
        h, usable = reach(places[0], level_t, jnp.append(earlier, filled[0]))
        nodes = jnp.where(usable, jnp.append(places[1:], level_t) - places[0], 0) / h
        w = quadrature(h, nodes, usable)
        return carry.base + process.alpha(t) * combine(w, jnp.concatenate([values[1:], x[None]]), values[0])

    def step(denoise: Denoiser, process: Process, carry: Predicted, t: Array, s: Array, keys: Array | None):
        clean = denoise(carry.x, t)
        level_t, sigma_t = level(process, t), process.sigma(t)
        change = corrected(process, carry, clean.x, t, level_t) - carry.x
        base = renoise(process, clean, s) + jnp.where(sigma_t > 0, process.sigma(s) / sigma_t, 0) * change
        x = base
        if order > 1:
            past = carry.past.values[:-1]
            filled = carry.past.filled[:-1] & within(carry.past.left, last, order - 1)
            h, usable = reach(level_t, level(process, s), filled)
            w = quadrature(h, jnp.where(usable, carry.past.places[:-1] - level_t, 0) / h, usable)
            x = base + process.alpha(s) * combine(w, past, clean.x)
        return Predicted(remember(carry.past, x, clean.x, level_t), base)

    return Sampler(init, step, order=order + 1, evaluations=1)


def uni_pc(order: int = 3, final: tuple[int, ...] | None = None) -> Sampler:
    """UniPC with B(h) = h: predict x_s, evaluate the network there, and use its output both to correct x_s and for the next step.

    Zhao et al. 2023 (arXiv:2302.04867), algorithms 1 and 2, data prediction. Predictor: res_multistep's polynomial through
    `order` clean estimates; corrector: the same through one more, the estimate at the predicted state, which is not
    evaluated again. A step with a single difference takes B / 2 for M_1, as published: with order 3, in the first two
    steps only. In a grid that ends at sigma = 0 the last two steps have orders 2 and 1, as in the authors' code and
    diffusers' (lower_order_final): they are long in lambda, and a parabola through guided estimates leaves the data there.
    `final` says so for any grid, () never and (2, 1) always. Order `order` + 1 (`order` from 1 to 3), one evaluation,
    deterministic; the result is the state of the last predictor. The most accurate at 5 to 10 steps for unguided sampling;
    under strong guidance use order 2. Raises ValueError for another order.
    """
    return _uni_pc(order, "h", final)


def uni_pc_bh2(order: int = 3, final: tuple[int, ...] | None = None) -> Sampler:
    """UniPC with B(h) = exp(h) - 1 (here 1 - exp(-h), for data prediction), the published choice for guided sampling.

    Zhao et al. 2023 (arXiv:2302.04867), section 3; in all else uni_pc. With order 2 its predictor is dpmpp_2m.
    """
    return _uni_pc(order, "expm1", final)
