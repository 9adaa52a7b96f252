"""Exact likelihood by the probability-flow ODE, and inversion, from data to noise.

With r = sqrt(alpha^2 + sigma^2), phi = atan2(sigma, alpha) and y = x_t / r, the ODE  dx_t/dt = alpha' x + sigma' eps  is

    dy/dphi = v,        v = cos(phi) eps - sin(phi) x

(Salimans & Ho 2022, arXiv:2202.00512, appendix D, here for any process). It is bounded where alpha = 0, where sigma = 0 and where
sigma is 80, and needs no derivative of the schedule. Along the flow a density changes by the divergence (Chen et al.
2018, arXiv:1806.07366, theorem 1; Song et al. 2021, arXiv:2011.13456, equation 39), so for t < T

    log p_t(x_t) = log p_T(x_T) + D log(r_T / r_t) + int_{phi_t}^{phi_T} div v dphi.

The steps are those of the fourth-order Runge-Kutta method in phi. grids.kl_optimal makes them equal, which is good for smooth data;
sharper data (std far below 1) need more steps near phi = 0, which log_snr has where it ends with sigma > 0.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process, inverse_log_snr, prior_std
from ldm_jax.diffusion.samplers.sampler import Sampler, check_times, row_keys, sample

Field = Callable[[Array], Array]
Divergence = Callable[[Field, Array, Array | None], tuple[Array, Array]]


def _row_sum(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def exact(chunk: int | None = None) -> Divergence:
    """div f = sum_j df_j / dx_j, column by column of the Jacobian: D forward-mode products, `chunk` at a time (None: all).

    The result maps (f, x [B, ...], keys) to (f(x), div f f[B]). f must act on each row by itself. For small D, and as a
    reference; an image of D = 3072 costs about D evaluations a stage. Raises ValueError unless chunk >= 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")

    def divergence(field: Field, x: Array, keys: Array | None) -> tuple[Array, Array]:
        value, push = jax.linearize(field, x)
        size = math.prod(x.shape[1:])

        def entry(j):
            basis = jax.nn.one_hot(j, size, dtype=x.dtype).reshape(x.shape[1:])
            return _row_sum(basis * push(jnp.broadcast_to(basis, x.shape)))

        return value, jnp.sum(jax.lax.map(entry, jnp.arange(size), batch_size=min(chunk or size, size)), 0)

    return divergence


PROBES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


def hutchinson(probes: int = 1, law: str = "rademacher") -> Divergence:
    """div f ~ mean of z^T (df/dx) z over `probes` draws z with E[z z^T] = I: unbiased, one forward-mode product each.

    Hutchinson 1990; Grathwohl et al. 2019 (FFJORD, arXiv:1810.01367), section 3.1. law is 'rademacher' (variance
    2 sum_{i != j} S_ij^2 a probe, S the symmetric part of the Jacobian) or 'gaussian' (2 sum_ij S_ij^2). Row i draws from
    keys[i] alone, the same z at every time, so that the integrand stays smooth. Raises ValueError for no probes or an
    unknown law, and without keys.
    """
    if probes < 1:
        raise ValueError(f"number of probes is {probes}, expected at least 1")
    if law not in PROBES:
        raise ValueError(f"law of the probes is {law!r}, expected one of {sorted(PROBES)}")

    def divergence(field: Field, x: Array, keys: Array | None) -> tuple[Array, Array]:
        if keys is None:
            raise ValueError("hutchinson draws probes: expected a key, got None")
        value, push = jax.linearize(field, x)

        def estimate(i):
            z = jax.vmap(lambda key: PROBES[law](jax.random.fold_in(key, i), x.shape[1:], x.dtype))(keys)
            return _row_sum(z * push(z))

        return value, jnp.mean(jax.vmap(estimate)(jnp.arange(probes)), 0)

    return divergence


def _rotation(process: Process, t: Array) -> tuple[Array, Array, Array]:
    """cos(phi), sin(phi) and r at t."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    r = jnp.hypot(alpha, sigma)
    return alpha / r, sigma / r, r


def _checked(times: Array, rising: bool = False) -> Array:
    times = jnp.asarray(times)
    steps = check_times(times)
    if rising and steps is not None and (steps < 0).any():
        raise ValueError("times fall, expected them to rise from data to noise: times[::-1] of a grid for sampling")
    return times


def change_of_variables(
    denoise: Denoiser,
    process: Process,
    x: Array,
    times: Array,
    key: Array | None = None,
    *,
    divergence: Divergence | None = None,
) -> tuple[Array, Array]:
    """(x_s, log |det dx_s / dx| f[B]) of the probability flow from x [B, ...] at times[0] to x_s at times[-1], in one scan.

    divergence is exact() by default, or hutchinson(...), which takes a key (one, or keys[B]). Times may rise or fall. Order 4
    in the steps of phi, four evaluations of the Denoiser and of its divergence a step; a step with t == s costs nothing.
    Raises ValueError for fewer than two times, and, where times are concrete, for times that leave [0, 1] or change direction.
    """
    times = _checked(times).astype(x.dtype)
    divergence = exact() if divergence is None else divergence
    keys = None if key is None else row_keys(key, x.shape[0])

    def field(t):
        cos, sin, r = _rotation(process, t)

        def v(y):
            clean = denoise(r * y, t)
            return cos * clean.eps - sin * clean.x

        return v

    def advance(carry, now):
        t, s = now

        def runge_kutta(carry):
            y, log_det = carry
            (cos_t, sin_t, _), (cos_s, sin_s, _) = _rotation(process, t), _rotation(process, s)
            turn = jnp.arctan2(sin_s * cos_t - sin_t * cos_s, cos_s * cos_t + sin_s * sin_t)
            # tan of the middle angle: the direction of the sum of the two unit vectors.
            half = inverse_log_snr(process, 2 * (jnp.log(cos_t + cos_s) - jnp.log(sin_t + sin_s)))

            def stage(slopes, now):
                (last, _), total = slopes
                u, reach, weight = now
                here = divergence(field(u), y + reach * turn * last, keys)
                return (here, jax.tree.map(lambda a, b: a + weight * b, total, here)), None

            nothing = (jnp.zeros_like(y), jnp.zeros_like(log_det))
            tableau = (
                jnp.stack([t, half, half, s]),
                jnp.asarray([0.0, 0.5, 0.5, 1.0], x.dtype),
                jnp.asarray([1.0, 2.0, 2.0, 1.0], x.dtype) / 6,
            )
            (_, (dy, div)), _ = jax.lax.scan(stage, (nothing, nothing), tableau)
            return y + turn * dy, log_det + turn * div

        return jax.lax.cond(t == s, lambda carry: carry, runge_kutta, carry), None

    (_, _, r), (_, _, r_s) = _rotation(process, times[0]), _rotation(process, times[-1])
    (y, log_det), _ = jax.lax.scan(advance, (x / r, jnp.zeros(x.shape[0], x.dtype)), (times[:-1], times[1:]))
    return r_s * y, log_det + math.prod(x.shape[1:]) * jnp.log(r_s / r)


def log_likelihood(
    denoise: Denoiser,
    process: Process,
    x: Array,
    times: Array,
    key: Array | None = None,
    *,
    divergence: Divergence | None = None,
) -> Array:
    """log p(x) f[B] in nats, of x [B, ...] taken as states at times[0]: log N(x_T; 0, prior_std^2) + log |det dx_T / dx|.

    Song et al. 2021 (arXiv:2011.13456), equation 39 and appendix D.2. times rise from near the data to the noise: a grid
    for sampling, reversed. Everything else is as in change_of_variables. p is the density of the process at times[0], that is of data
    with noise sigma(times[0]), and the prior differs from p_T as far as alpha(T) sigma_data / sigma(T) differs from 0.
    Raises ValueError where concrete times fall.
    """
    times = _checked(times, rising=True)
    x_T, log_det = change_of_variables(denoise, process, x, times, key, divergence=divergence)
    std = prior_std(process, times[-1].astype(x.dtype))
    return log_det - _row_sum(0.5 * (x_T / std) ** 2 + jnp.log(std) + 0.5 * math.log(2 * math.pi))


def bits_per_dim(log_p: Array, dims: int, bin_width: float = 1.0) -> Array:
    """-log p / (dims ln 2) - log2(bin_width), of log p f[...] in nats over dims numbers a row.

    bin_width 1 is that of continuous data. A level of data in bins of width w has probability E[p] w^dims, so for
    `dequantise`d uint8 images, w = 2 / 256, the constant is + 7 and the result bounds the bits a lossless code takes (Theis
    et al. 2016, arXiv:1511.01844, section 3.1). Raises ValueError unless dims >= 1 and bin_width > 0.
    """
    if dims < 1 or not bin_width > 0:
        raise ValueError(f"dims is {dims} and bin_width {bin_width}, expected at least 1 and a number > 0")
    return -log_p / (dims * math.log(2)) - math.log2(bin_width)


def dequantise(key: Array, images: Array) -> Array:
    """u8[B, ...] -> f32[B, ...] in [-1, 1]: (level + u) / 128 - 1 with u uniform on [0, 1), bins of width 2 / 256.

    Uniform dequantisation, Theis et al. 2016 (arXiv:1511.01844), section 3.1. key is one key, or keys[B]; row i draws
    from keys[i]. A network that is trained on level / 127.5 - 1 takes these images without change: the middles of the bins lie
    within 1 / 256 of its levels. Raises ValueError unless the images are uint8.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images are {images.dtype}, expected uint8")
    keys = row_keys(key, images.shape[0])
    return (images + jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)) / 128 - 1


def _deterministic(sampler: Sampler) -> None:
    if sampler.stochastic:
        raise ValueError("the sampler is stochastic: expected a deterministic one, whose path leads back")


def encode(sampler: Sampler, denoise: Denoiser, process: Process, x: Array, times: Array) -> Array:
    """Latent noise [B, ...], of unit variance, from which `decode` on the same falling grid leads back to x [B, ...].

    Any deterministic sampler, run on times[::-1] from x at times[-1] up to times[0], then divided by prior_std. With ddim or
    euler this is DDIM inversion, x_s = alpha_s x + sigma_s eps(x_t, t) for s > t (Song et al. 2021, arXiv:2010.02502, section
    5.4). A one-step method of order p returns with an error of order p, or p + 1 where p is even, because the leading
    errors of the two directions cancel then. Raises ValueError for a stochastic sampler.
    """
    _deterministic(sampler)
    times = jnp.asarray(times)
    return sample(sampler, denoise, process, x, times[::-1]) / prior_std(process, times[0].astype(x.dtype))


def decode(sampler: Sampler, denoise: Denoiser, process: Process, latents: Array, times: Array) -> Array:
    """`sample` from prior_std * latents, latents [B, ...] of unit variance: the inverse of `encode`; also for slerp between two.

    Raises ValueError for a stochastic sampler, which forgets where it began.
    """
    _deterministic(sampler)
    times = jnp.asarray(times)
    return sample(sampler, denoise, process, prior_std(process, times[0].astype(latents.dtype)) * latents, times)
