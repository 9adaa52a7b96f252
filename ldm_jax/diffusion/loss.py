"""Training times, loss weights and the diffusion loss.

A network of any kind (prediction.py) outputs o = a x + b eps. At a given x_t an error in o is an error in x times
-d / sigma, with d = alpha b - sigma a, so a weight w(t) on |x - x_hat|^2 is the weight

    w_o(t) = w(t) sigma^2 / d^2          on |o - o_hat|^2.

Each weight below is written once, for x, and is right for every kind: d = alpha for eps gives min(SNR, gamma) / SNR,
d = 1 for v (VP) gives min(SNR, gamma) / (SNR + 1). SNR = alpha^2 / sigma^2, lambda = log SNR.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtri

from ldm_jax.diffusion.denoiser import Apply, call
from ldm_jax.diffusion.prediction import system, target
from ldm_jax.diffusion.process import Process, as_time, corrupt, inverse_log_snr, log_snr

# Each maps u, uniform on (0, 1), to a time: its quantile function.
TIMES: dict[str, str] = {
    "uniform": "t = u",
    "stratified": "t = (u + i / n) mod 1, one draw in each n-th (Kingma et al. 2021, arXiv:2107.00630, I.1)",
    "logit_normal": "logit t ~ N(mean, std^2), by default N(0, 1) (Esser et al. 2024, arXiv:2403.03206, eq. 19)",
    "mode": "t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), scale 1.29 (Esser et al. 2024, eq. 20)",
    "cosmap": "t = 1 - 1 / (tan(pi u / 2) + 1) (Esser et al. 2024, eq. 21)",
    "edm": "log(sigma / alpha) ~ N(mean, std^2), by default N(-1.2, 1.2^2) (Karras et al. 2022, arXiv:2206.00364)",
}


def sample_times(
    key: Array,
    n: int,
    dist: str = "uniform",
    *,
    process: Process | None = None,
    mean: float | None = None,
    std: float | None = None,
    scale: float = 1.29,
    stratified: bool = False,
) -> Array:
    """f[n] training times in (0, 1) from a distribution in TIMES.

    mean and std belong to logit_normal and edm, scale to mode. `edm` needs the process, to turn noise levels into
    times. stratified=True draws the underlying uniform numbers one in each n-th, for any distribution. A process given
    also clips to [t_min, t_max], and rounds to its table where it has one. Raises ValueError for an unknown name.
    """
    if dist not in TIMES:
        raise ValueError(f"time distribution is {dist!r}, expected one of {sorted(TIMES)}")
    if stratified or dist == "stratified":
        first = jax.random.uniform(key, ())
        u = (first + jnp.arange(n) / n) % 1.0
    else:
        u = jax.random.uniform(key, (n,))
    u = jnp.clip(u, 1e-6, 1 - 1e-6)  # every quantile function and log-SNR is finite inside
    if dist == "logit_normal":
        t = jax.nn.sigmoid((0.0 if mean is None else mean) + (1.0 if std is None else std) * ndtri(u))
    elif dist == "mode":
        t = 1 - u - scale * (jnp.cos(0.5 * math.pi * u) ** 2 - 1 + u)
    elif dist == "cosmap":
        t = 1 - 1 / (jnp.tan(0.5 * math.pi * u) + 1)
    elif dist == "edm":
        if process is None:
            raise ValueError("time distribution 'edm' draws noise levels: expected process=, to turn them into times")
        t = inverse_log_snr(process, -2 * ((-1.2 if mean is None else mean) + (1.2 if std is None else std) * ndtri(u)))
    else:
        t = u
    return t if process is None else to_training_range(process, t)


def to_training_range(process: Process, t: Array) -> Array:
    """Times clipped to [t_min, t_max], or the table's entry that owns each: (floor(N t) + 1) / N."""
    if process.levels is None:
        return jnp.clip(t, process.t_min, process.t_max)
    return (jnp.clip(jnp.floor(t * process.levels), 0, process.levels - 1) + 1) / process.levels


def _snr(process: Process, t: Array) -> Array:
    return jnp.exp(log_snr(process, t))


def _log_snr_speed(process: Process, t: Array) -> Array:
    """-d lambda / dt."""
    return -jax.jvp(lambda u: log_snr(process, u), (t,), (jnp.ones_like(t),))[1]


def snr(process: Process, t: Array) -> Array:
    """SNR: the plain error of eps. Ho et al. 2020 (arXiv:2006.11239), equation 14."""
    return _snr(process, t)


def truncated_snr(process: Process, t: Array) -> Array:
    """max(SNR, 1). Salimans & Ho 2022 (arXiv:2202.00512), section 4."""
    return jnp.maximum(_snr(process, t), 1.0)


def snr_plus_one(process: Process, t: Array) -> Array:
    """SNR + 1: the plain error of v under VP. Salimans & Ho 2022, section 4."""
    return _snr(process, t) + 1.0


def min_snr(process: Process, t: Array, gamma: float = 5.0) -> Array:
    """min(SNR, gamma). Hang et al. 2023 (arXiv:2303.09556), section 3.4."""
    return jnp.minimum(_snr(process, t), gamma)


def p2(process: Process, t: Array, k: float = 1.0, gamma: float = 1.0) -> Array:
    """SNR / (k + SNR)^gamma. Choi et al. 2022 (arXiv:2204.00227), equation 8."""
    ratio = _snr(process, t)
    return ratio / (k + ratio) ** gamma


def edm(process: Process, t: Array) -> Array:
    """SNR + 1 / sigma_data^2: 1 / c_out^2. Karras et al. 2022 (arXiv:2206.00364), table 1."""
    return _snr(process, t) + 1.0 / process.sigma_data**2


def sigmoid(process: Process, t: Array, bias: float = -3.0) -> Array:
    """(-dlambda/dt) sigmoid(bias - lambda) SNR, for uniform t. Hoogeboom et al. 2024 (SiD2, arXiv:2410.19324)."""
    value = log_snr(process, t)
    return _log_snr_speed(process, t) * jax.nn.sigmoid(bias - value) * jnp.exp(value)


def vlb(process: Process, t: Array) -> Array:
    """-1/2 dSNR/dt, for uniform t: the bound on -log p(x) in nats. Kingma et al. 2021 (VDM), equation 17."""
    return 0.5 * _log_snr_speed(process, t) * _snr(process, t)


Weight = Callable[[Process, Array], Array]

# 'simple' is not a weight on x: it leaves the error of the network's own output as it is.
WEIGHTS: dict[str, Weight | None] = {
    "simple": None,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "snr_plus_one": snr_plus_one,
    "min_snr": min_snr,
    "p2": p2,
    "edm": edm,
    "sigmoid": sigmoid,
    "vlb": vlb,
}


def output_weight(weight: str | Weight, kind: str, process: Process, t: Array) -> Array:
    """w_o(t), what the squared error of a network of this kind is multiplied by; of t's shape.

    weight is a name in WEIGHTS or a function (process, t) -> weight on the error of x, e.g. partial(min_snr, gamma=3).
    """
    if isinstance(weight, str):
        if weight not in WEIGHTS:
            raise ValueError(f"loss weight is {weight!r}, expected one of {sorted(WEIGHTS)}")
        weight = WEIGHTS[weight]
    t = as_time(t)
    if weight is None:
        return jnp.ones_like(t)
    _, sigma, _, _, d = system(kind, process, t)
    return weight(process, t) * (sigma / d) ** 2


def diffusion_loss(
    apply: Apply,
    params: Any,
    process: Process,
    kind: str,
    x: Array,
    cond: Mapping[str, Array] | None,
    key: Array,
    *,
    dist: str | Callable[[Array, int], Array] = "uniform",
    weight: str | Weight = "simple",
    t: Array | None = None,
    eps: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Weighted squared error of the network's output, averaged over all axes but the batch.

        loss_i = w_o(t_i) mean |F(x_t, t_i) - target(x, eps, t_i)|^2,    x_t = alpha x + sigma eps

    apply     (params, x [B, ...], time input f[B], cond) -> output of the given kind
    x         clean data f[B, ...] in the model's units (pixels in [-1, 1], or whitened latents)
    dist      a name in TIMES or a function (key, n) -> f[n]; weight a name in WEIGHTS or a function (process, t)
    t, eps    fixed times [B] or scalar, and fixed noise, for a validation loss by noise level; drawn from key when None

    Returns (loss f[B], {'t': f[B], 'error': unweighted mean squared error f[B]}).
    """
    key_t, key_eps = jax.random.split(key)
    rows = x.shape[0]
    if t is None:
        t = sample_times(key_t, rows, dist, process=process) if isinstance(dist, str) else dist(key_t, rows)
        t = to_training_range(process, t)
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), (rows,))
    eps = jax.random.normal(key_eps, x.shape, x.dtype) if eps is None else eps
    output = call(apply, params, process, kind, {} if cond is None else cond, corrupt(process, x, eps, t), t)
    wanted = target(kind, process, x, eps, t)
    if output.shape != wanted.shape:
        raise ValueError(f"network output has shape {output.shape}, expected that of x, {x.shape}")
    error = jnp.mean((output - wanted) ** 2, axis=tuple(range(1, x.ndim)))
    return output_weight(weight, kind, process, t) * error, {"t": t, "error": error}
