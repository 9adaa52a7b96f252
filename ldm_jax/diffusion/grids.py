"""Time grids: (process, n, ...) -> f[n + 1], strictly decreasing, n steps from the noisiest time to the end.

They begin at the process's t_max and end at its t_min unless start= and end= say otherwise: t_min is 1e-3 for VP and
sub-VP, whose ODE is singular at 0; 0 for flow (clean data) and for VE and EDM (their sigma_min); the first entry,
1 / N, for a table. `leading`, `trailing` and `linspace` take the entries of a table as diffusers does and end at t = 0,
clean data; `align_your_steps` has other ends. A noise level, where a paper speaks of sigma, is sigma / alpha.
k-diffusion and diffusers space n - 1 steps and add one to clean data: that is grid(process, n - 1) followed by 0, or end=0
where the times are spaced.

times[::-1] runs from data to noise. With it a deterministic sampler inverts (likelihood.encode); `sample` refuses it for a
stochastic one.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import betainc

from ldm_jax.diffusion.process import Process, inverse_log_snr, log_snr

# Log-SNR that stands for infinity when levels are spaced: sigma / alpha = 80 and 0.002, the ends of EDM.
_NOISIEST, _CLEANEST = -2 * float(np.log(80.0)), -2 * float(np.log(0.002))


def _ends(process: Process, n: int, start: float | None, end: float | None) -> tuple[float, float]:
    start = process.t_max if start is None else start
    end = process.t_min if end is None else end
    if n < 1:
        raise ValueError(f"number of steps is {n}, expected at least 1")
    if not 0 <= end < start <= 1:
        raise ValueError(f"grid runs from {start} to {end}, expected 0 <= end < start <= 1")
    return start, end


def _between(start: float, end: float, fraction: Array) -> Array:
    """start + (end - start) * fraction with both ends exact."""
    return (start + (end - start) * fraction).at[0].set(start).at[-1].set(end)


def uniform(process: Process, n: int, *, start: float | None = None, end: float | None = None) -> Array:
    """t_i linear in i."""
    start, end = _ends(process, n, start, end)
    return _between(start, end, jnp.linspace(0.0, 1.0, n + 1))


def quadratic(process: Process, n: int, *, start: float | None = None, end: float | None = None) -> Array:
    """sqrt(t_i) linear in i: steps shrink towards the data. Song et al. 2021 (DDIM, arXiv:2010.02502), appendix D.2."""
    start, end = _ends(process, n, start, end)
    roots = start**0.5 + (end**0.5 - start**0.5) * jnp.linspace(0.0, 1.0, n + 1)
    return (roots**2).at[0].set(start).at[-1].set(end)


def shifted(
    process: Process, n: int, *, shift: float = 3.0, start: float | None = None, end: float | None = None
) -> Array:
    """u -> shift u / (1 + (shift - 1) u) of a uniform grid. Esser et al. 2024 (SD3, arXiv:2403.03206), equation 23."""
    start, end = _ends(process, n, start, end)
    if not shift > 0:
        raise ValueError(f"shift is {shift}, expected a number > 0")
    u = jnp.linspace(1.0, 0.0, n + 1)
    return _between(start, end, 1 - shift * u / (1 + (shift - 1) * u))


def dynamic_shifted(
    process: Process,
    n: int,
    *,
    tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    start: float | None = None,
    end: float | None = None,
) -> Array:
    """`shifted` by exp(mu), mu linear in the number of image tokens: base_shift at base_tokens, max_shift at max_tokens.

    FLUX.1 (Black Forest Labs 2024), t -> e^mu / (e^mu + 1 / t - 1): the resolution shift of SD3 (arXiv:2403.03206) with its
    logarithm interpolated. A 1024 x 1024 image is 4096 tokens of 16 x 16 pixels. Other numbers of tokens extrapolate.
    """
    if tokens < 1:
        raise ValueError(f"number of tokens is {tokens}, expected at least 1")
    if base_tokens == max_tokens:
        raise ValueError(f"base_tokens and max_tokens are both {base_tokens}, expected two numbers of tokens")
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    return shifted(process, n, shift=math.exp(mu), start=start, end=end)


def linear_quadratic(
    process: Process,
    n: int,
    *,
    threshold: float = 0.025,
    linear_steps: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Array:
    """L small equal steps 1 - t = threshold i / L, then 1 - t = threshold (1 + j / L) + c j^2 with j = i - L, up to 1.

    Movie Gen (Polyak et al. 2024, arXiv:2410.13720): the first steps are those of a grid of L / threshold steps, 1000 for
    the default L = n // 2 of 50, because they determine the structure of a video. c is such that the grid ends at 1, and the steps
    grow without a jump, as in Mochi (Genmo 2024). Raises ValueError unless 1 <= L < n (except for n = 1) and every step falls.
    """
    start, end = _ends(process, n, start, end)
    linear = max(n // 2, 1) if linear_steps is None else linear_steps
    if not 1 <= linear < max(n, 2):
        raise ValueError(f"linear_steps is {linear}, expected 1 to {n - 1}, fewer than the {n} steps")
    i, curved = np.arange(n + 1), max(n - linear, 1)
    most = linear * (2 * curved - 1) / (n * (2 * curved - 1) - curved**2) if n > 1 else 1  # the last step has no length
    if not 0 < threshold < most:
        raise ValueError(f"threshold is {threshold}, expected it in (0, {most:g}) for {linear} linear steps of {n}")
    bend = (1 - threshold * n / linear) / curved**2
    return _between(start, end, jnp.asarray(threshold * i / linear + bend * np.maximum(i - linear, 0) ** 2))


def _log_snr_ends(process: Process, start: float, end: float) -> tuple[Array, Array]:
    first, last = log_snr(process, start), log_snr(process, end)
    return jnp.where(jnp.isfinite(first), first, _NOISIEST), jnp.where(jnp.isfinite(last), last, _CLEANEST)


def _at(process: Process, value: Array, start: float, end: float) -> Array:
    """Times of log-SNRs f[n + 1], both ends exact."""
    return inverse_log_snr(process, value).at[0].set(start).at[-1].set(end)


def by_log_snr(process: Process, n: int, *, start: float | None = None, end: float | None = None) -> Array:
    """log-SNR linear in i. Lu et al. 2022 (DPM-Solver, arXiv:2206.00927), section 3.3.

    It is what k-diffusion, diffusers and ComfyUI call `exponential`, sigma / alpha falling geometrically.

    Where log-SNR is infinite at an end (flow), sigma / alpha = 80 or 0.002 takes its place for the spacing alone. The step
    that leaves or enters such an end then has the same length for any number of steps.
    """
    start, end = _ends(process, n, start, end)
    first, last = _log_snr_ends(process, start, end)
    return _at(process, first + (last - first) * jnp.linspace(0.0, 1.0, n + 1), start, end)


def karras(
    process: Process, n: int, *, rho: float = 7.0, start: float | None = None, end: float | None = None
) -> Array:
    """(sigma / alpha)^(1 / rho) linear in i. Karras et al. 2022 (arXiv:2206.00364), equation 5.

    Infinite noise levels at an end are replaced as in by_log_snr.
    """
    start, end = _ends(process, n, start, end)
    if not rho > 0:
        raise ValueError(f"rho is {rho}, expected a number > 0")
    first, last = (jnp.exp(-0.5 * value / rho) for value in _log_snr_ends(process, start, end))
    roots = first + (last - first) * jnp.linspace(0.0, 1.0, n + 1)
    return _at(process, -2 * rho * jnp.log(roots), start, end)


def polyexponential(
    process: Process, n: int, *, rho: float = 1.0, start: float | None = None, end: float | None = None
) -> Array:
    """log(sigma / alpha) linear in (1 - i / n)^rho: k-diffusion's; its default, rho = 1, is `log_snr`.

    rho > 1 spends more steps near the data, rho < 1 near the noise. Infinite noise levels at an end are replaced as in
    by_log_snr. Raises ValueError unless rho > 0.
    """
    start, end = _ends(process, n, start, end)
    if not rho > 0:
        raise ValueError(f"rho is {rho}, expected a number > 0")
    first, last = _log_snr_ends(process, start, end)
    return _at(process, last + (first - last) * jnp.linspace(1.0, 0.0, n + 1) ** rho, start, end)


def kl_optimal(process: Process, n: int, *, start: float | None = None, end: float | None = None) -> Array:
    """atan(sigma / alpha) linear in i, sigma / alpha = tan(u atan(sigma_min) + (1 - u) atan(sigma_max)).

    The least bound on the KL divergence of a discretised SDE when the data are N(0, I): Sabour et al. 2024 (Align Your
    Steps, arXiv:2404.14507), where it is derived in closed form; ComfyUI's `kl_optimal`. The angle is finite where alpha or
    sigma is 0, so that no replacement is needed there. On a variance-preserving process these are equal steps of DDIM's
    rotation (likelihood.py).
    """
    start, end = _ends(process, n, start, end)
    first, last = (jnp.arctan(jnp.exp(-0.5 * log_snr(process, t))) for t in (start, end))
    angle = first + (last - first) * jnp.linspace(0.0, 1.0, n + 1)
    return _at(process, 2 * (jnp.log(jnp.cos(angle)) - jnp.log(jnp.sin(angle))), start, end)


def _beta_quantile(u: Array, a: float, b: float) -> Array:
    """The x in [0, 1] with I_x(a, b) = u, the regularised incomplete beta function, by bisection."""

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        below = betainc(a, b, middle) < u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(u), jnp.ones_like(u)))
    return 0.5 * (low + high)


def beta(
    process: Process,
    n: int,
    *,
    a: float = 0.6,
    b: float = 0.6,
    by_level: bool = False,
    start: float | None = None,
    end: float | None = None,
) -> Array:
    """t_i the quantiles of Beta(a, b) at 1 - i / n: more steps near both ends for a, b < 1.

    Lee et al. 2024 (Beta Sampling is All You Need, arXiv:2407.12173); ComfyUI's `beta`, unrounded. by_level=True spaces
    sigma / alpha by the quantiles instead, as diffusers' use_beta_sigmas does (on the flow diffusers spaces t); infinite
    noise levels at an end are then replaced as in by_log_snr. Raises ValueError unless a, b > 0.
    """
    start, end = _ends(process, n, start, end)
    if not (a > 0 and b > 0):
        raise ValueError(f"a and b are {a} and {b}, expected numbers > 0")
    u = _beta_quantile(jnp.linspace(1.0, 0.0, n + 1), a, b)
    if not by_level:
        return _between(start, end, 1 - u)
    first, last = (jnp.exp(-0.5 * value) for value in _log_snr_ends(process, start, end))
    return _at(process, -2 * jnp.log(last + (first - last) * u), start, end)


# sigma / alpha after 0 to 10 steps, as published with the paper.
ALIGNED: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(
    process: Process, n: int, *, model: str = "sd15", start: float | None = None, end: float | None = None
) -> Array:
    """The noise levels that are best for a model, ALIGNED: those of 10 steps, log(sigma / alpha) interpolated for other n.

    Sabour et al. 2024 (arXiv:2404.14507). The grid begins and ends at the levels of the table, not at t_max and t_min, unless
    start or end replaces them (end=0 in diffusers and ComfyUI). model is sd15, sdxl or svd. Raises ValueError for
    another, and for a process that does not reach these levels: svd needs edm(sigma_max=700).
    """
    if n < 1:
        raise ValueError(f"number of steps is {n}, expected at least 1")
    if model not in ALIGNED:
        raise ValueError(f"model is {model!r}, expected one of {sorted(ALIGNED)}")
    table = np.log(ALIGNED[model])
    target = -2 * np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(table)), table)
    times = inverse_log_snr(process, jnp.asarray(target, float))
    # 14.6146 of Stable Diffusion is published as 14.615: levels that differ by a hundredth are the same.
    if not isinstance(times, jax.core.Tracer) and not np.allclose(log_snr(process, times), target, atol=0.02):
        raise ValueError(
            f"noise levels of {model!r} run from {ALIGNED[model][0]:g} to {ALIGNED[model][-1]:g}, expected a process that "
            "has them all"
        )
    times = times if start is None else times.at[0].set(start)
    times = times if end is None else times.at[-1].set(end)
    return times if isinstance(times, jax.core.Tracer) else _decreasing(np.asarray(times))


def trailing(process: Process, n: int, *, end: float | None = None) -> Array:
    """Equal steps that begin at pure noise: table entries round(N - i N / n) - 1, then clean data at t = 0.

    Lin et al. 2024 (arXiv:2305.08891), table 2. Continuous processes: 1 - i / n, then end (default t_min).
    """
    if process.levels is None:
        _, end = _ends(process, n, 1.0, end)
        times = 1 - np.arange(n + 1) / n
        times[-1] = end
        return _decreasing(times)
    return _entries(process, n, lambda size: np.round(size - np.arange(n) * (size / n)) - 1, end)


def leading(process: Process, n: int, *, offset: int = 0, end: float | None = None) -> Array:
    """Table entries (n - 1 - i) (N // n) + offset, then clean data at t = 0; never reaches the noisiest entries.

    The spacing of DDIM and, with offset 1, of Stable Diffusion; Lin et al. 2024, table 2. Raises ValueError without a table.
    """
    return _entries(process, n, lambda size: np.arange(n)[::-1] * (size // n) + offset, end)


def linspace(process: Process, n: int, *, end: float | None = None) -> Array:
    """n table entries from N - 1 to 0 inclusive, then clean data at t = 0. Lin et al. 2024, table 2.

    It is the spacing of guided-diffusion (Nichol & Dhariwal 2021, arXiv:2102.09672, section 4) and DiT: their
    space_timesteps(1000, '250') is 999, 995, ..., 12, 8, 4, 0.
    """
    return _entries(process, n, lambda size: np.round(np.linspace(size - 1, 0, n)), end)


def _entries(process: Process, n: int, choose: Callable[[int], np.ndarray], end: float | None) -> Array:
    size = process.levels
    if size is None:
        raise ValueError("this grid visits the entries of a table: expected a discrete process, got a continuous one")
    if not 1 <= n <= size:
        raise ValueError(f"number of steps is {n}, expected 1 to {size}, the size of the table")
    return _decreasing(np.append((choose(size) + 1) / size, 0.0 if end is None else end))


def _decreasing(times: np.ndarray) -> Array:
    if not (np.diff(times) < 0).all() or times[0] > 1 or times[-1] < 0:
        raise ValueError(
            f"grid runs from {times[0]:g} by {times[-2]:g} to {times[-1]:g}, expected it to fall in [0, 1]"
        )
    return jnp.asarray(times, float)


def pad(times: Array, steps: int) -> Array:
    """times f[n + 1] padded to f[steps + 1] by repeating the last entry.

    Such steps do nothing, so that one compiled program serves every number of steps up to `steps`. Raises ValueError when n > steps.
    """
    missing = steps + 1 - times.shape[0]
    if missing < 0:
        raise ValueError(f"grid has {times.shape[0] - 1} steps, expected at most {steps}")
    return jnp.concatenate([times, jnp.repeat(times[-1:], missing)])


GRIDS: dict[str, Callable[..., Array]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "shifted": shifted,
    "dynamic_shifted": dynamic_shifted,
    "linear_quadratic": linear_quadratic,
    "beta": beta,
    "log_snr": by_log_snr,
    "polyexponential": polyexponential,
    "karras": karras,
    "kl_optimal": kl_optimal,
    "align_your_steps": align_your_steps,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
}
