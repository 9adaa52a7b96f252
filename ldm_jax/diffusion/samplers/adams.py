"""Adams-Bashforth samplers: linear multistep methods on dy/dtau = eps - k x (see ode.py).

    y_s = y_t + dtau sum_j w_j d_j,    d = dy/dtau at t and at up to three times before it,

written as x_s = alpha_s x + sigma_s eps + c_s dtau sum_j w_j (d_j - d_t), Euler's step and a correction. For k = 0 these
are the published methods, in eps against sigma / alpha; for k = 1 they are in eps - x against sigma / (alpha + sigma),
that is in the velocity against t on the flow.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers.exponential import combine, weights
from ldm_jax.diffusion.samplers.history import History, empty, remember
from ldm_jax.diffusion.samplers.ode import classical, renoise, slope, straight, trapezoid
from ldm_jax.diffusion.samplers.sampler import Sampler

# int_0^1 u^k du
MOMENTS = (1.0, 1 / 2, 1 / 3, 1 / 4)


def _check_order(order: int) -> None:
    if order not in (2, 3, 4):
        raise ValueError(f"order is {order}, expected 2, 3 or 4")


def _adams(order: int, uniform: bool, start=None, start_steps: int = 0) -> Sampler:
    """Adams-Bashforth, of lower order until there are `order - 1` slopes; `start` takes the first start_steps steps.

    uniform: weights of equal steps (3/2, -1/2; 23/12, -16/12, 5/12; 55/24, -59/24, 37/24, -9/24) whatever the grid.
    """

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> History:
        return empty(x_T, order - 1)

    def step(denoise: Denoiser, process: Process, carry: History, t: Array, s: Array, keys: Array | None) -> History:
        clean = denoise(carry.x, t)
        (_, tau_t), (c_s, tau_s) = straight(process, t), straight(process, s)
        d = slope(process, clean)

        def adams():
            equal = -1 - jnp.arange(order - 1, dtype=tau_t.dtype)
            nodes = equal if uniform else (carry.places - tau_t) / (tau_s - tau_t)
            w = weights(nodes, carry.filled, MOMENTS)
            return renoise(process, clean, s) + c_s * (tau_s - tau_t) * combine(w, carry.values, d)

        if start is None:
            x = adams()
        else:
            x = jax.lax.cond(carry.steps < start_steps, lambda: start(denoise, process, clean, t, s), adams)
        return remember(carry, x, d, tau_t)

    return Sampler(init, step, order=2 if uniform else order, evaluations=1)


def lms(order: int = 4) -> Sampler:
    """Linear multistep: w_j = (1 / dtau) int L_j(tau) dtau, Adams-Bashforth exact for the steps that the grid really takes.

    k-diffusion's LMS (Karras et al. 2022, arXiv:2206.00364, setting; Hairer, Norsett & Wanner 1993, III.5), rhoAB-DEIS of
    Zhang & Chen 2022 (arXiv:2204.13902), and what ComfyUI's ipndm_v is meant to be. Order `order` (2 to 4), one
    evaluation, deterministic. The first steps are of order 1, 2, ..., which costs a term dtau^2 d'' that vanishes where
    the grid begins with small steps in tau / tau_T or at sigma / alpha >> 1. For smooth schedules at 20 steps and more;
    few steps need an exponential method. Raises ValueError for another order.
    """
    _check_order(order)
    return _adams(order, uniform=False)


def ipndm(order: int = 4) -> Sampler:
    """iPNDM: Adams-Bashforth with the weights of equal steps, 55/24, -59/24, 37/24, -9/24, lower orders to begin with.

    Zhang & Chen 2022 (arXiv:2204.13902), appendix on iPNDM, after Liu et al. 2022 (arXiv:2202.09778) without the
    Runge-Kutta start. On a grid whose steps in tau are unequal the weights are off by their relative change: order 2,
    and `order` (2 to 4) only where tau is uniform, as on the flow. One evaluation, deterministic. Strong at 5 to 10 steps
    with Karras's grid. Raises ValueError for another order.
    """
    _check_order(order)
    return _adams(order, uniform=True)


def plms() -> Sampler:
    """PLMS: ipndm whose first step is Heun's, of order 2, as is the second; the third is of order 3.

    Liu et al. 2022 (arXiv:2202.09778), pseudo linear multistep, in the form of latent-diffusion and Stable Diffusion 1 (diffusers'
    PNDM with skip_prk_steps). Order 2 for the reason that ipndm gives, one evaluation a step and one more for the
    first: n + 1 in all, deterministic. Stable Diffusion's first sampler, 50 steps; dpmpp_2m has replaced it.
    """
    return _adams(4, uniform=True, start=trapezoid, start_steps=1)


def pndm() -> Sampler:
    """PNDM: three steps of pseudo Runge-Kutta, then Adams-Bashforth with the weights of equal steps.

    Liu et al. 2022 (arXiv:2202.09778), section 3.3 and algorithm 2: their transfer of x_t by eps is
    Euler's step in y. The stages lie at the middle of t, not of tau, and the weights assume equal steps, so that the order
    is 2 (4 where tau is linear in t, as on the flow). Four evaluations for each of the first three steps and one for
    the others: n + 9 in all for n >= 3; a step into sigma(s) = 0 takes one. Deterministic. For eps networks at 50 steps.
    """

    def runge_kutta(denoise, process, clean, t, s):
        return classical(denoise, process, clean, t, 0.5 * (t + s), s)

    return _adams(4, uniform=True, start=runge_kutta, start_steps=3)


def gradient_estimation(gamma: float = 2.0) -> Sampler:
    """Euler along d + (gamma - 1) (d - d_last): the slope as a less noisy gradient of the squared distance to the data.

    Permenter & Yuan 2023 (arXiv:2306.04848), algorithm 2. One evaluation,
    deterministic. Order 1 unless gamma = 1.5, which is Adams-Bashforth's for equal steps (order 2); gamma = 1 is Euler.
    The first step and one into sigma(s) = 0 are Euler's. Sharper than DDIM at 5 to 10 steps; gamma = 2 is the paper's
    choice. Raises ValueError unless gamma >= 1.
    """
    if not gamma >= 1:
        raise ValueError(f"gamma is {gamma}, expected a number >= 1")

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> History:
        return empty(x_T, 1)

    def step(denoise: Denoiser, process: Process, carry: History, t: Array, s: Array, keys: Array | None) -> History:
        clean = denoise(carry.x, t)
        (_, tau_t), (c_s, tau_s) = straight(process, t), straight(process, s)
        d = slope(process, clean)
        extra = jnp.where((carry.steps > 0) & (tau_s > 0), (gamma - 1) * c_s * (tau_s - tau_t), 0)
        return remember(carry, renoise(process, clean, s) + extra * (d - carry.values[0]), d, tau_t)

    return Sampler(init, step, order=2 if gamma == 1.5 else 1, evaluations=1)
