"""Which entries of a table, and which noise levels, published schedulers visit in n steps.

Entries of a table of N (`timestep_spacing`; Lin et al. 2024, arXiv:2305.08891, table 2), for i = 0 .. n - 1:

    leading    (n - 1 - i) (N // n) + steps_offset
    trailing   round(N - i N / n) - 1
    linspace   n equal distances from N - 1 to 0, both included

Noise levels sigma / alpha between two ends s_max and s_min, for u from 0 to 1:

    use_karras_sigmas        (s_max^(1/7) + u (s_min^(1/7) - s_max^(1/7)))^7   (Karras et al. 2022, arXiv:2206.00364, equation 5)
    use_exponential_sigmas   log(sigma / alpha) linear in u
    use_lu_lambdas           the same, between the ends of the table whatever sigma_min and sigma_max are
    use_beta_sigmas          s_min + (s_max - s_min) q(1 - u), q the quantile function of Beta(0.6, 0.6)
"""

import numpy as np
from scipy.special import betaincinv

from ldm_jax.schedules.family import Config
from ldm_jax.schedules.options import is_on

SPACINGS = ("leading", "trailing", "linspace")
LEVEL_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def in_table(index: np.ndarray, config: Config, steps: int) -> np.ndarray:
    """`index` itself; ValueError if one of its entries is outside the table."""
    last = config["num_train_timesteps"] - 1
    if index.min() < 0 or index.max() > last:
        raise ValueError(
            f"steps is {steps}, which needs entries {index.min():g} to {index.max():g}, expected them in the table, 0 to {last}"
        )
    return index


def entries(config: Config, steps: int, whole: bool = True) -> np.ndarray:
    """The n entries f64[n] of `timestep_spacing`, the noisiest first. whole=False: those of linspace are not rounded."""
    n, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if steps > n:
        raise ValueError(f"steps is {steps}, expected at most {n}, the size of the table")
    if spacing == "linspace":
        index = np.linspace(0, n - 1, steps)[::-1]
        index = index.round() if whole else index.astype(np.float32).astype(float)
    elif spacing == "leading":
        index = np.arange(steps)[::-1] * float(n // steps) + config["steps_offset"]
    else:
        index = np.arange(n, 0, -n / steps)[:steps].round() - 1
    return in_table(index, config, steps)


def level_spacing(config: Config) -> str | None:
    """The name in LEVEL_SPACINGS that is on, None if none is."""
    return next((key for key in LEVEL_SPACINGS if is_on(config, key)), None)


def spaced(spacing: str, config: Config, low: float, high: float, steps: int) -> np.ndarray:
    """Levels f64[n] from high to low; the options sigma_min and sigma_max, where a file sets them, take the places of both."""
    if spacing != "use_lu_lambdas":
        low = config["sigma_min"] if "sigma_min" in config and config["sigma_min"] is not None else low
        high = config["sigma_max"] if "sigma_max" in config and config["sigma_max"] is not None else high
    u = np.linspace(0, 1, steps)
    if spacing == "use_karras_sigmas":
        return (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if spacing == "use_beta_sigmas":
        return low + betaincinv(0.6, 0.6, 1 - u) * (high - low)
    return np.exp(np.log(high) + u * (np.log(low) - np.log(high)))


# ---- levels of a flow, sigma = t ----


def shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    """shift t / (1 + (shift - 1) t). Esser et al. 2024 (SD3, arXiv:2403.03206), equation 23."""
    return shift * levels / (1 + (shift - 1) * levels)


def to_terminal(levels: np.ndarray, last: float | None) -> np.ndarray:
    """The levels with 1 - t stretched so that the last one is `last`; None or 0 changes nothing."""
    return 1 - (1 - levels) / ((1 - levels[-1]) / (1 - last)) if last else levels


def prescribed(sigmas: tuple[float, ...] | None, steps: int, default: np.ndarray) -> np.ndarray:
    """The levels f64[n] that a pipeline prescribes (Steps.sigmas), or the default where it prescribes none.

    Raises ValueError unless they are n falling numbers in (0, 1].
    """
    if sigmas is None:
        return default
    levels = np.asarray(sigmas, np.float64)
    if levels.shape != (steps,) or not ((np.diff(levels) < 0).all() and 0 < levels[-1] and levels[0] <= 1):
        raise ValueError(
            f"sigmas are {np.array2string(levels, threshold=6)}, expected {steps} falling numbers in (0, 1]"
        )
    return levels
