"""Time grids: (process, n, ...) -> f[n + 1], strictly decreasing, n steps from the noisiest time to the end.

They begin at the process's t_max and end at its t_min unless start= and end= say otherwise: t_min is 1e-3 for VP and
sub-VP, whose ODE is singular at 0; 0 for flow (clean data) and for VE and EDM (their sigma_min); the first entry,
1 / N, for a table. `leading`, `trailing` and `linspace` visit a table's entries as diffusers does and end at t = 0,
clean data.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

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


def _log_snr_ends(process: Process, start: float, end: float) -> tuple[Array, Array]:
    first, last = log_snr(process, start), log_snr(process, end)
    return jnp.where(jnp.isfinite(first), first, _NOISIEST), jnp.where(jnp.isfinite(last), last, _CLEANEST)


def by_log_snr(process: Process, n: int, *, start: float | None = None, end: float | None = None) -> Array:
    """log-SNR linear in i. Lu et al. 2022 (DPM-Solver, arXiv:2206.00927), section 3.3; k-diffusion's exponential.

    Where log-SNR is infinite at an end (flow), sigma / alpha = 80 or 0.002 stands for it in the spacing alone; the step
    that leaves or enters such an end then keeps its length however many steps there are.
    """
    start, end = _ends(process, n, start, end)
    first, last = _log_snr_ends(process, start, end)
    times = inverse_log_snr(process, first + (last - first) * jnp.linspace(0.0, 1.0, n + 1))
    return times.at[0].set(start).at[-1].set(end)


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
    return inverse_log_snr(process, -2 * rho * jnp.log(roots)).at[0].set(start).at[-1].set(end)


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

    DDIM's and Stable Diffusion's (offset 1) own spacing; Lin et al. 2024, table 2. Raises ValueError without a table.
    """
    return _entries(process, n, lambda size: np.arange(n)[::-1] * (size // n) + offset, end)


def linspace(process: Process, n: int, *, end: float | None = None) -> Array:
    """n table entries from N - 1 to 0 inclusive, then clean data at t = 0. Lin et al. 2024, table 2."""
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
    """times f[n + 1] lengthened to f[steps + 1] by repeating the last: steps that do nothing, so that one compiled
    program serves every count up to `steps`. Raises ValueError when n > steps."""
    missing = steps + 1 - times.shape[0]
    if missing < 0:
        raise ValueError(f"grid has {times.shape[0] - 1} steps, expected at most {steps}")
    return jnp.concatenate([times, jnp.repeat(times[-1:], missing)])


GRIDS: dict[str, Callable[..., Array]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "shifted": shifted,
    "log_snr": by_log_snr,
    "karras": karras,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
}
