"""Diffusion processes: x_t = alpha(t) x + sigma(t) eps with t = 0 data and t = 1 noise.

A process is two functions of t in [0, 1]. Everything else follows from them by automatic differentiation,
as in Kingma et al. 2021 (VDM, arXiv:2107.00630): with log_snr = log(alpha^2 / sigma^2),

    f(t) = d log alpha / dt                          drift of the forward SDE  dx = f x dt + g dw
    g(t)^2 = d sigma^2 / dt - 2 f sigma^2            its diffusion
    dx_t/dt = alpha'(t) x + sigma'(t) eps            probability-flow ODE (see prediction.velocity)

so no coefficient is typed twice. The functions take a scalar or any array and act element by element.
Derivatives at t = 0 are infinite wherever sigma grows as sqrt(t) (VP): integrate down to `t_min`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.betas import BETAS as BETAS
from ldm_jax.diffusion.betas import beta_table, rescale_zero_terminal_snr

Schedule = Callable[[Array], Array]


class Process(NamedTuple):
    """Two coefficients of time and what belongs to them. Transform one with `process._replace(...)` or `shift`.

    alpha, sigma     functions of t in [0, 1]; alpha falls and sigma / alpha rises with t
    time_input       t -> the time input of a network of this process (0..999 for VP, log sigma / 4 for EDM, ...: each process
                     below says what its network sees); of a table the index that published networks were trained with: i,
                     exactly, at t = (i + 1) / levels. For a network that takes sigma itself: with_sigma_input
    t_min, t_max     where grids end and begin by default, and the range of training times
    sigma_data       standard deviation of the data (EDM preconditioning, `prior_std`)
    affine           k in c = alpha + k sigma. Samplers step in y = x_t / c against tau = sigma / c, where the path is a
                     straight line, dy/dtau = eps - k x. 0 gives tau = sigma / alpha (EDM, k-diffusion). Processes
                     whose alpha reaches 0 need 1, because sigma / alpha is infinite there; on the flow tau = t.
    levels           number of entries of a discrete table, entry i at t = (i + 1) / levels; None for continuous time
    t_of_log_snr     closed-form inverse of log_snr, or None for bisection
    """

    alpha: Schedule
    sigma: Schedule
    time_input: Schedule
    t_min: float = 0.0
    t_max: float = 1.0
    sigma_data: float = 1.0
    affine: float = 0.0
    levels: int | None = None
    t_of_log_snr: Schedule | None = None


def as_time(t: Array) -> Array:
    """t as a floating array: a Python number takes the default precision, an array keeps its precision."""
    dtype = getattr(t, "dtype", None)
    return jnp.asarray(t, dtype if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else float)


def per_row(value: Array, like: Array) -> Array:
    """Give a scalar or [B] array the trailing axes that make it broadcast against `like` of shape [B, ...]."""
    value = jnp.asarray(value, like.dtype)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def corrupt(process: Process, x: Array, eps: Array, t: Array) -> Array:
    """x_t = alpha(t) x + sigma(t) eps, for x, eps of shape [B, ...] and t a scalar or [B]."""
    t = jnp.asarray(t, x.dtype)
    return per_row(process.alpha(t), x) * x + per_row(process.sigma(t), x) * eps


def coefficients(process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
    """(alpha, sigma, dalpha/dt, dsigma/dt) at t, the derivatives by forward-mode differentiation."""
    t = as_time(t)
    one = jnp.ones_like(t)
    alpha, dalpha = jax.jvp(process.alpha, (t,), (one,))
    sigma, dsigma = jax.jvp(process.sigma, (t,), (one,))
    return alpha, sigma, dalpha, dsigma


def log_snr(process: Process, t: Array) -> Array:
    """log(alpha^2 / sigma^2): +inf where sigma = 0, -inf where alpha = 0."""
    t = as_time(t)
    return 2 * (jnp.log(process.alpha(t)) - jnp.log(process.sigma(t)))


def inverse_log_snr(process: Process, value: Array) -> Array:
    """The t in [0, 1] with log_snr(t) = value; values out of range give the nearer end."""
    value = as_time(value)
    if process.t_of_log_snr is not None:
        return jnp.clip(process.t_of_log_snr(value), 0.0, 1.0)

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        noisier = log_snr(process, middle) > value
        return jnp.where(noisier, middle, low), jnp.where(noisier, high, middle)

    # 60 halvings reach neighbouring floats even at t = 1e-5.
    low, high = jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(value), jnp.ones_like(value)))
    return 0.5 * (low + high)


def drift_diffusion(process: Process, t: Array) -> tuple[Array, Array]:
    """f(t) and g(t)^2 of the forward SDE dx = f x dt + g dw whose marginals are alpha x + sigma eps."""
    alpha, sigma, dalpha, dsigma = coefficients(process, t)
    f = dalpha / alpha
    return f, 2 * sigma * dsigma - 2 * f * sigma**2


def forward_sde(process: Process, x_t: Array, t: Array) -> tuple[Array, Array]:
    """Drift f(t) x_t [B, ...] and diffusion g(t) of  dx = f x dt + g dw, for t a scalar or [B]; g has t's shape.

    Song et al. 2021 (arXiv:2011.13456), equation 5. Its reverse is prediction.reverse_sde.
    """
    f, g2 = drift_diffusion(process, jnp.asarray(t, x_t.dtype))
    return per_row(f, x_t) * x_t, jnp.sqrt(g2)


def prior_std(process: Process, t: Array | float = 1.0) -> Array:
    """Standard deviation of x_t over the data, sqrt(alpha^2 sigma_data^2 + sigma^2): x_T = prior_std * unit noise."""
    t = as_time(t)
    return jnp.sqrt((process.alpha(t) * process.sigma_data) ** 2 + process.sigma(t) ** 2)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected a number > 0")


def _inside(t_min: float) -> None:
    if not 0 < t_min < 1:
        raise ValueError(f"t_min is {t_min}, expected a time in (0, 1)")


def _linear_integral(beta_min: float, beta_max: float) -> tuple[Schedule, Schedule]:
    """B(t) = int_0^t beta for beta linear in t, and its inverse in the form that does not cancel."""
    slope = beta_max - beta_min

    def integral(t):
        return t * (beta_min + 0.5 * slope * t)

    def inverse(b):
        return 2 * b / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * b))

    return integral, inverse


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """Variance preserving, beta(t) linear: alpha = exp(-B/2), sigma = sqrt(1 - exp(-B)).

    Song et al. 2021 (arXiv:2011.13456), equations 32-33. The network sees 999 t. t_min is where training times begin and grids
    end: the paper samples down to 1e-3, trains and measures likelihoods down to 1e-5 (appendix C).
    """
    _positive(beta_min=beta_min, beta_max=beta_max)
    _inside(t_min)
    integral, inverse = _linear_integral(beta_min, beta_max)
    return Process(
        alpha=lambda t: jnp.exp(-0.5 * integral(t)),
        sigma=lambda t: jnp.sqrt(-jnp.expm1(-integral(t))),
        time_input=lambda t: 999.0 * t,
        t_min=t_min,
        t_of_log_snr=lambda value: inverse(jax.nn.softplus(-value)),
    )


def vp_cosine(s: float = 0.008) -> Process:
    """Variance preserving, alpha = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)).

    Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17, without the clipping of beta. alpha(1) = 0, where a
    prediction of eps does not determine x: grids begin at t_max = 0.999 (start=1 is right for v). The network sees 999 t.
    """
    _positive(s=s)
    rate = 0.5 * math.pi / (1 + s)
    offset = rate * s
    # cos^2(b) - cos^2(a + b) = sin(a) sin(a + 2b): no cancellation in sigma; as a sine alpha(1) is exactly 0.
    return Process(
        alpha=lambda t: jnp.sin(rate * (1 - t)) / math.cos(offset),
        sigma=lambda t: jnp.sqrt(jnp.sin(rate * t) * jnp.sin(rate * t + 2 * offset)) / math.cos(offset),
        time_input=lambda t: 999.0 * t,
        t_min=1e-3,
        t_max=0.999,
        affine=1.0,
        t_of_log_snr=lambda value: (
            (
                jnp.arctan2(
                    jnp.sqrt(math.sin(offset) ** 2 + math.cos(offset) ** 2 * jax.nn.sigmoid(-value)),
                    math.cos(offset) * jnp.sqrt(jax.nn.sigmoid(value)),
                )
                - offset
            )
            / rate
        ),
    )


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """Sub-VP: alpha = exp(-B/2), sigma = 1 - exp(-B). Song et al. 2021, equation 36. The network sees 999 t; t_min as in vp_linear."""
    _positive(beta_min=beta_min, beta_max=beta_max)
    _inside(t_min)
    integral, inverse = _linear_integral(beta_min, beta_max)

    def t_of_log_snr(value):
        # With p = sigma and S = SNR: 1 - p = S p^2.
        p = 2 / (1 + jnp.sqrt(1 + 4 * jnp.exp(value)))
        return inverse(jnp.where(p < 0.5, -jnp.log1p(-p), -value - 2 * jnp.log(p)))

    return Process(
        alpha=lambda t: jnp.exp(-0.5 * integral(t)),
        sigma=lambda t: -jnp.expm1(-integral(t)),
        time_input=lambda t: 999.0 * t,
        t_min=t_min,
        t_of_log_snr=t_of_log_snr,
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t. Song et al. 2021, equation 30.

    The network sees log sigma (NCSN++ as published takes sigma: with_sigma_input). t = 0 is sigma_min, not clean data.
    """
    _positive(sigma_min=sigma_min, sigma_max=sigma_max - sigma_min)
    low, span = math.log(sigma_min), math.log(sigma_max / sigma_min)
    return Process(
        alpha=jnp.ones_like,
        sigma=lambda t: jnp.exp(low + span * t),
        time_input=lambda t: low + span * t,
        t_of_log_snr=lambda value: (-0.5 * value - low) / span,
    )


def flow(shift: float = 1.0) -> Process:
    """Rectified flow: alpha = 1 - t, sigma = t. Liu et al. 2022 (arXiv:2209.03003). The network sees 1000 sigma.

    shift > 1 spends more of [0, 1] near the noise, for higher resolutions: sigma = shift t / (1 + (shift - 1) t), which
    multiplies sigma / alpha by shift = sqrt(pixels / reference pixels). Esser et al. 2024 (SD3, arXiv:2403.03206), eq. 23.
    """
    _positive(shift=shift)

    def sigma(t):
        return shift * t / (1 + (shift - 1) * t)

    return Process(
        alpha=lambda t: (1 - t) / (1 + (shift - 1) * t),
        sigma=sigma,
        time_input=lambda t: 1000.0 * sigma(t),
        affine=1.0,
        t_of_log_snr=lambda value: jax.nn.sigmoid(-0.5 * value - math.log(shift)),
    )


def trig(sigma_data: float = 0.5) -> Process:
    """TrigFlow: alpha = cos(pi t / 2), sigma = sigma_data sin(pi t / 2), so that std(x_t) = sigma_data at every t.

    Lu & Song 2024 (sCM, arXiv:2410.11081), section 3.1; their time is the angle pi t / 2, which the network sees. Their
    network predicts cos eps - sin x / sigma_data from x_t / sigma_data: the kind 'edm' is its negative, input scale
    included, and with sigma_data = 1 the kind 'v' is itself.
    """
    _positive(sigma_data=sigma_data)
    quarter = 0.5 * math.pi
    return Process(
        alpha=lambda t: jnp.sin(quarter * (1 - t)),  # as a sine alpha(1) is exactly 0
        sigma=lambda t: sigma_data * jnp.sin(quarter * t),
        time_input=lambda t: quarter * t,
        sigma_data=sigma_data,
        affine=1.0,
        t_of_log_snr=lambda value: jnp.arctan2(jnp.exp(-0.5 * value), jnp.full_like(value, sigma_data)) / quarter,
    )


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5) -> Process:
    """EDM: alpha = 1, sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho.

    Karras et al. 2022 (arXiv:2206.00364), equation 5, so that a uniform grid in t is theirs. The network sees
    log(sigma) / 4. Pair it with the prediction kind 'edm'. t = 0 is sigma_min.
    """
    _positive(sigma_min=sigma_min, sigma_max=sigma_max - sigma_min, rho=rho, sigma_data=sigma_data)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return Process(
        alpha=jnp.ones_like,
        sigma=lambda t: (low + t * (high - low)) ** rho,
        time_input=lambda t: 0.25 * rho * jnp.log(low + t * (high - low)),
        sigma_data=sigma_data,
        t_of_log_snr=lambda value: (jnp.exp(-0.5 * value / rho) - low) / (high - low),
    )


def discrete_vp(
    betas: np.ndarray | str = "linear",
    zero_terminal_snr: bool = False,
    *,
    levels: int | None = None,
    beta_min: float | None = None,
    beta_max: float | None = None,
    s: float | None = None,
) -> Process:
    """Variance preserving from a table: alpha_i^2 = prod_{j <= i} (1 - beta_j) at t = (i + 1) / N.

    betas is f[N] with 0 < beta <= 1 (only the last may be 1: zero terminal SNR), or a name in BETAS with options:

    levels              N (1000), which papers call T
    beta_min, beta_max  'linear' and 'scaled_linear' run from one to the other, the latter in sqrt(beta) (0.0001 to 0.02; 0.00085 to
                        0.012); 'cosine' is clamped to them (0 to 0.999, as published and in diffusers)
    s                   of 'cosine' (0.008), diffusion/betas.py

    zero_terminal_snr=True passes it through rescale_zero_terminal_snr. Between entries log_snr is linear in t, which is
    how k-diffusion and diffusers map noise levels to times; below the first entry sigma / alpha goes linearly to 0
    at t = 0, and with zero terminal SNR alpha / sigma does so at t = 1. The network sees the index, N t - 1. Raises
    ValueError for betas that are no such table, and names an option that is wrong.
    """
    betas = beta_table(betas, levels=levels, beta_min=beta_min, beta_max=beta_max, s=s)
    betas = rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas
    n = len(betas)
    with np.errstate(divide="ignore"):
        log_bar = np.cumsum(np.log1p(-betas))
        table = log_bar - np.log(-np.expm1(log_bar))
    terminal = bool(np.isneginf(table[-1]))
    knots = table[:-1] if terminal else table

    def level(t):
        t = as_time(t)
        values = jnp.asarray(knots, t.dtype)
        # The floor of a product alone: a compiler may round one copy of n t - 1 once and another copy twice, and then the
        # index and the fraction differ by a whole entry.
        place = n * t
        i = jnp.clip(jnp.floor(place), 1, len(knots) - 1).astype(jnp.int32)
        inside = values[i - 1] + (place - i) * (values[i] - values[i - 1])
        out = jnp.where(place < 1, values[0] - 2 * jnp.log(place), inside)
        if terminal:
            out = jnp.where(place > n - 1, values[-1] + 2 * jnp.log(n * (1 - t)), out)
        return out

    def time_input(t):
        # (i + 1) / N is not a float: without the snap, entry 500 reaches the network as 500.00006.
        position = n * t - 1
        nearest = jnp.round(position)
        return jnp.where(jnp.abs(position - nearest) < 1e-3, nearest, position)

    def t_of_log_snr(value):
        values = jnp.asarray(knots, value.dtype)
        position = jnp.interp(-value, -values, jnp.arange(len(knots), dtype=value.dtype))
        t = jnp.where(value > values[0], jnp.exp(0.5 * (values[0] - value)), position + 1) / n
        return jnp.where(value < values[-1], 1 - jnp.exp(0.5 * (value - values[-1])) / n, t) if terminal else t

    return Process(
        alpha=lambda t: jnp.sqrt(jax.nn.sigmoid(level(t))),
        sigma=lambda t: jnp.sqrt(jax.nn.sigmoid(-level(t))),
        time_input=time_input,
        t_min=1.0 / n,
        affine=float(terminal),
        levels=n,
        t_of_log_snr=t_of_log_snr,
    )


def shift(process: Process, factor: float) -> Process:
    """The same process in the time t' = factor t / (1 + (factor - 1) t): more of [0, 1] is spent near the noise.

    The resolution shift of `flow(shift=factor)`, for any process: the marginals and the time inputs of the network stay the
    same, and belong to other times. Raises ValueError unless factor > 0.
    """
    _positive(factor=factor)

    # This form maps t = 1 to 1 exactly; a time that rounds past 1 would make an alpha that ends at 0 negative.
    def to_old(t):
        return t / (t + (1 - t) / factor)

    def to_new(t):
        return t / (t + factor * (1 - t))

    return process._replace(
        alpha=lambda t: process.alpha(to_old(t)),
        sigma=lambda t: process.sigma(to_old(t)),
        time_input=lambda t: process.time_input(to_old(t)),
        t_min=to_new(process.t_min),
        t_max=to_new(process.t_max),
        levels=None,
        t_of_log_snr=lambda value: to_new(inverse_log_snr(process, value)),
    )


def with_sigma_input(process: Process) -> Process:
    """The same process whose network takes sigma itself, because it embeds log sigma and divides by sigma inside.

    Song et al. 2021's NCSN++ as diffusers has it (models/unet.py, 'fourier_log'). Raises ValueError unless alpha = 1 and sigma > 0.
    """
    t = jnp.asarray([process.t_min, process.t_max])
    if (process.alpha(t) != 1).any() or not (process.sigma(t) > 0).all():
        raise ValueError("a network that takes sigma needs a process with alpha = 1 and sigma > 0; expected ve or edm")
    return process._replace(time_input=process.sigma)


PROCESSES: dict[str, Callable[..., Process]] = {
    "vp_linear": vp_linear,
    "vp_cosine": vp_cosine,
    "sub_vp": sub_vp,
    "ve": ve,
    "flow": flow,
    "trig": trig,
    "edm": edm,
    "discrete_vp": discrete_vp,
}
