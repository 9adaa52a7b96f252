"""Training times, loss weights, the diffusion loss and the variational bound.

A network of any kind (prediction.py) outputs o = a x + b eps. At a fixed x_t an error in o is an error in x times
-d / sigma, with d = alpha b - sigma a, so a weight w(t) on |x - x_hat|^2 is the weight

    w_o(t) = w(t) sigma^2 / d^2          on |o - o_hat|^2.

Each weight below is written once, for x, and is right for every kind: d = alpha for eps gives min(SNR, gamma) / SNR,
d = 1 for v (VP) gives min(SNR, gamma) / (SNR + 1). SNR = alpha^2 / sigma^2, lambda = log SNR.

Learned variances are trained by the terms of the discrete bound (vlb_bits), beside the error of the mean.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtri

from ldm_jax.diffusion.denoiser import Apply, call
from ldm_jax.diffusion.prediction import (
    Clean,
    posterior_mean,
    split_variance,
    step_log_var,
    system,
    target,
    to_clean,
)
from ldm_jax.diffusion.process import Process, as_time, corrupt, inverse_log_snr, log_snr, prior_std

# Each maps u, uniform on (0, 1), to a time: its quantile function. A plug-in adds the function itself, f(u f[n]) -> f[n].
TIMES: dict[str, str | Callable[[Array], Array]] = {
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

    mean and std belong to logit_normal and edm, scale to mode. `edm` needs the process, to turn noise levels into times.
    stratified=True draws one of the underlying uniform numbers in each of n equal intervals, for any distribution. With a process,
    times are clipped to [t_min, t_max], and rounded to its table where it has one. Times that are drawn by the earlier losses at them
    need a memory: see sample_by_loss. Raises ValueError for an unknown name and for a scale where mode's t leaves [0, 1].
    """
    if dist not in TIMES:
        raise ValueError(f"time distribution is {dist!r}, expected one of {sorted(TIMES)}")
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale is {scale}, expected a number in [-1, {2 / (math.pi - 2):.4f}]")
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
        t = TIMES[dist](u) if callable(TIMES[dist]) else u
    return t if process is None else to_training_range(process, t)


def to_training_range(process: Process, t: Array) -> Array:
    """Times clipped to [t_min, t_max], or the table's entry that owns each: (floor(N t) + 1) / N."""
    if process.levels is None:
        return jnp.clip(t, process.t_min, process.t_max)
    return (jnp.clip(jnp.floor(t * process.levels), 0, process.levels - 1) + 1) / process.levels


class LossHistory(NamedTuple):
    """The memory of sample_by_loss: the last K losses in each of N bins of (0, 1], and how many losses each bin has had."""

    losses: Array  # f[N, K]
    count: Array  # i32[N]


def loss_history(bins: int, length: int = 10) -> LossHistory:
    """The empty history. bins is the size of the table for a discrete process, any number >= 1 for a continuous one."""
    if bins < 1 or length < 1:
        raise ValueError(f"history has {bins} bins of {length} losses, expected at least 1 of each")
    return LossHistory(jnp.zeros((bins, length)), jnp.zeros(bins, jnp.int32))


def record_losses(history: LossHistory, t: Array, loss: Array) -> LossHistory:
    """The history after a batch: losses f[B], without the weights of sample_by_loss, at times t f[B], in this order.

    Each bin keeps its last K, however often it occurs in the batch.
    """
    bins, length = history.losses.shape
    # Bin i holds i / N < t <= (i + 1) / N. Times of a table are upper ends, rounded: hence the thousandth.
    i = jnp.clip(jnp.ceil(t * bins - 1e-3).astype(jnp.int32) - 1, 0, bins - 1)
    same = i[:, None] == i[None, :]
    before, total = jnp.sum(jnp.tril(same, -1), 1), jnp.sum(same, 1)
    slot = (history.count[i] + before) % length
    # Losses that later ones of this batch would replace are dropped: the order of two writes to one slot is not defined.
    row = jnp.where(total - before <= length, i, bins)
    losses = history.losses.at[row, slot].set(jax.lax.stop_gradient(loss), mode="drop")
    return LossHistory(losses, history.count.at[i].add(1))


def sample_by_loss(
    key: Array, n: int, history: LossHistory, *, process: Process | None = None, uniform: float = 1e-3
) -> tuple[Array, Array]:
    """(t f[n], weight f[n]): times drawn with p_i ~ sqrt(E[L_i^2]) over the bins, and 1 / (N p_i).

    Losses times these weights have the mean of losses at uniform times.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.3 and equation 18: E over the last K = 10 losses of the bin,
    mixed with a share `uniform` of equal p (0.001 in their code); every p is equal until all bins have had K losses.
    Within its bin a time is uniform. With a process times are clipped and rounded as in sample_times; a table whose size
    is the number of bins has one entry a bin.
    """
    bins, length = history.losses.shape
    moment = jnp.sqrt(jnp.mean(history.losses**2, 1))
    total = jnp.sum(moment)
    ready = jnp.all(history.count >= length) & (total > 0)
    p = jnp.where(ready, (1 - uniform) * moment / jnp.where(ready, total, 1) + uniform / bins, 1 / bins)
    key_bin, key_t = jax.random.split(key)
    i = jax.random.choice(key_bin, bins, (n,), p=p)
    # The margin keeps a time, rounded, in the bin whose weight it carries.
    t = (i + jax.random.uniform(key_t, (n,), p.dtype, 2e-3, 1 - 2e-3)) / bins
    return (t if process is None else to_training_range(process, t)), 1 / (bins * p[i])


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


def flow(process: Process, t: Array) -> Array:
    """(sqrt(SNR) + 1)^2: the plain error of the flow's velocity, 1 / sigma^2 on the flow itself. Liu et al. 2022."""
    return (jnp.sqrt(_snr(process, t)) + 1.0) ** 2


def sigma_sqrt(process: Process, t: Array) -> Array:
    """(sqrt(SNR) + 1)^4: 1 / tau^2 on the error of the flow's velocity, tau = sigma / (alpha + sigma) being its time.

    The name is that of SD3's training code in diffusers. Applied there to the error of x, as its script does by default,
    1 / sigma^2 is the weight `flow`.
    """
    return flow(process, t) ** 2


def cosmap(process: Process, t: Array) -> Array:
    """2 / (pi (1 - 2 tau + 2 tau^2)), tau as in sigma_sqrt, on the error of the flow's velocity.

    The density of the times 'cosmap', as a weight for uniform t. Esser et al. 2024 (arXiv:2403.03206), equation 21.
    """
    tau = jax.nn.sigmoid(-0.5 * log_snr(process, t))
    return flow(process, t) * 2 / (math.pi * (1 - 2 * tau + 2 * tau**2))


def sigmoid(process: Process, t: Array, bias: float = -3.0) -> Array:
    """(-dlambda/dt) sigmoid(bias - lambda) SNR, for uniform t: (-dlambda/dt) sigmoid(bias - lambda) on the error of eps.

    Hoogeboom et al. 2024 (SiD2, arXiv:2410.19324), after Kingma & Gao 2023 (arXiv:2303.00848).
    """
    value = log_snr(process, t)
    return _log_snr_speed(process, t) * jax.nn.sigmoid(bias - value) * jnp.exp(value)


def vlb(process: Process, t: Array) -> Array:
    """-1/2 dSNR/dt, for uniform t: the bound on -log p(x) in nats. Kingma et al. 2021 (VDM), equation 17."""
    return 0.5 * _log_snr_speed(process, t) * _snr(process, t)


Weight = Callable[[Process, Array], Array]

# 'simple' is not a weight on x: the error of the output of the network has weight 1.
WEIGHTS: dict[str, Weight | None] = {
    "simple": None,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "snr_plus_one": snr_plus_one,
    "min_snr": min_snr,
    "p2": p2,
    "edm": edm,
    "flow": flow,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap,
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


def with_uncertainty(loss: Array, u: Array) -> Array:
    """loss / exp(u) + u, for loss f[B] and a learned u(t) f[B]: least where exp(u) is the expected loss at t.

    Karras et al. 2024 (EDM2, arXiv:2312.02696), equation 14: every noise level then contributes equally to the
    gradient, whatever its weight. The caller supplies u, for example a linear layer on Fourier features of t, which is trained beside
    the network and is not needed afterwards.
    """
    return loss * jnp.exp(-u) + u


def _gaussian_kl(mean_q: Array, log_var_q: Array, mean_p: Array, log_var_p: Array) -> Array:
    """KL(q || p) of diagonal Gaussians in nats, element by element."""
    change = log_var_q - log_var_p
    return 0.5 * (jnp.expm1(change) - change + (mean_q - mean_p) ** 2 * jnp.exp(-log_var_p))


def discretized_log_prob(x: Array, mean: Array, log_var: Array) -> Array:
    """log P of images x in [-1, 1] with 256 levels under N(mean, exp(log_var)), in nats, element by element.

        P = Phi((x + 1/255 - mean) / std) - Phi((x - 1/255 - mean) / std),  the outermost levels reaching to infinity

    Ho et al. 2020 (arXiv:2006.11239), equation 13, as guided-diffusion computes it: Phi by its approximation with tanh,
    which is within 2e-4, and P at least 1e-12.
    """

    def cdf(y):  # 1/2 (1 + tanh(z)) = sigmoid(2 z), which does not cancel
        return jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))

    scale = jnp.exp(-0.5 * log_var)
    upper, lower = scale * (x - mean + 1 / 255), scale * (x - mean - 1 / 255)
    inside = jnp.where(x > 0.999, cdf(-lower), cdf(upper) - cdf(lower))
    return jnp.log(jnp.maximum(jnp.where(x < -0.999, cdf(upper), inside), 1e-12))


def _bits(nats: Array) -> Array:
    """Mean over all axes but the batch, in bits."""
    return jnp.mean(nats, tuple(range(1, nats.ndim))) / math.log(2)


def vlb_bits(process: Process, truth: Clean, clean: Clean, t: Array) -> Array:
    """f[B] bits/dim: the term of the bound on -log2 p(x) that belongs to the entry of a table at t f[B].

        KL(q(x_s | x_t, x) || N(posterior_mean(clean), exp(step_log_var(v)))),  s the entry below
        -log P(x | x_t) by discretized_log_prob, at the first entry

    Nichol & Dhariwal 2021 (arXiv:2102.09672), equations 4-7. truth is Clean(x, eps) and clean the network's, with
    v = clean.log_var. The bound itself is the sum over all entries plus prior_bits. Raises ValueError without a table or
    without v.
    """
    if process.levels is None:
        raise ValueError("the bound is a sum over the entries of a table: expected a discrete process")
    if clean.log_var is None:
        raise ValueError("the bound needs the variance of a step: expected clean.log_var, got None")
    entry = jnp.round(t * process.levels) - 1
    s = entry / process.levels
    log_var = step_log_var(process, clean.log_var, t, s)
    true_log_var = step_log_var(process, -jnp.ones_like(clean.log_var), t, s)
    mean = posterior_mean(process, clean, t, s)
    kl = _gaussian_kl(posterior_mean(process, truth, t, s), true_log_var, mean, log_var)
    return jnp.where(entry > 0, _bits(kl), _bits(-discretized_log_prob(truth.x, mean, log_var)))


def prior_bits(process: Process, x: Array) -> Array:
    """f[B] bits/dim: KL(q(x_t | x) || N(0, prior_std^2)) at t = 1, the term of the bound that does not depend on the network."""
    t = jnp.ones((), x.dtype)
    log_var, prior = 2 * jnp.log(process.sigma(t)), 2 * jnp.log(prior_std(process, t))
    return _bits(_gaussian_kl(process.alpha(t) * x, log_var, 0.0, prior))


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
    learned_variance: bool = False,
    vlb_weight: Array = 1e-3,
) -> tuple[Array, dict[str, Array]]:
    """Weighted squared error of the network's output, averaged over all axes but the batch.

        loss_i = w_o(t_i) mean |F(x_t, t_i) - target(x, eps, t_i)|^2,    x_t = alpha x + sigma eps

    apply     (params, x [B, ...], time input f[B], cond) -> output, a prediction of this kind
    x         clean data f[B, ...] in the model's units (pixels in [-1, 1], or whitened latents)
    dist      a name in TIMES or a function (key, n) -> f[n]; weight a name in WEIGHTS or a function (process, t)
    t, eps    fixed times [B] or scalar, and fixed noise, for a validation loss by noise level; drawn from key when None

    Returns (loss f[B], {'t': f[B], 'error': unweighted mean squared error f[B]}).

    With learned_variance the output has twice the channels, prediction and v, and the process is a table; the loss is

        L_hybrid = loss_i + vlb_weight N vlb_bits(t_i),    vlb_weight (lambda) 0.001, N the size of the table

    where vlb_bits, returned as 'vlb', has a gradient for v alone: its mean is detached. Nichol & Dhariwal 2021 (arXiv:2102.09672),
    equation 16; the same number as guided-diffusion's rescaled loss. Raises ValueError for an output of any other shape
    and for learned_variance without a table, unless vlb_weight is the number 0, which ignores v.
    """
    key_t, key_eps = jax.random.split(key)
    rows = x.shape[0]
    if t is None:
        t = sample_times(key_t, rows, dist, process=process) if isinstance(dist, str) else dist(key_t, rows)
        t = to_training_range(process, t)
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), (rows,))
    eps = jax.random.normal(key_eps, x.shape, x.dtype) if eps is None else eps
    x_t = corrupt(process, x, eps, t)
    output = call(apply, params, process, kind, {} if cond is None else cond, x_t, t)
    output, v = split_variance(output, x.shape, learned_variance)
    error = jnp.mean((output - target(kind, process, x, eps, t)) ** 2, axis=tuple(range(1, x.ndim)))
    loss, aux = output_weight(weight, kind, process, t) * error, {"t": t, "error": error}
    if v is None or (isinstance(vlb_weight, int | float) and vlb_weight == 0):
        return loss, aux
    clean = to_clean(kind, process, jax.lax.stop_gradient(output), x_t, t)
    bits = vlb_bits(process, Clean(x, eps), clean._replace(log_var=v), t)
    return loss + vlb_weight * process.levels * bits, {**aux, "vlb": bits}
