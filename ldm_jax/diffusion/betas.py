"""Tables of beta_1 .. beta_N, by name or as an array, for process.discrete_vp: alpha_i^2 = prod_{j <= i} (1 - beta_j).

- linear: beta_min to beta_max at even distances (Ho et al. 2020, arXiv:2006.11239, section 4).
- scaled_linear: likewise in sqrt(beta) (Rombach et al. 2022).
- cosine: beta_i = clip(1 - f(i / N) / f((i - 1) / N), beta_min, beta_max), f(t) = cos^2(pi/2 (t + s) / (1 + s)) (Nichol & Dhariwal
  2021, arXiv:2102.09672, equation 17).
"""

import inspect
from collections.abc import Callable

import numpy as np

MOST = 1_000_000  # levels of a table


def _linear_betas(levels: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> np.ndarray:
    return np.linspace(beta_min, beta_max, levels)


def _scaled_linear_betas(levels: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012) -> np.ndarray:
    return np.linspace(beta_min**0.5, beta_max**0.5, levels) ** 2


def _cosine_betas(levels: int = 1000, beta_min: float = 0.0, beta_max: float = 0.999, s: float = 0.008) -> np.ndarray:
    bar = np.cos((np.arange(levels + 1) / levels + s) / (1 + s) * np.pi / 2) ** 2
    return np.clip(1 - bar[1:] / bar[:-1], beta_min, beta_max)


BETAS: dict[str, Callable[..., np.ndarray]] = {
    "linear": _linear_betas,  # Ho et al. 2020; DiT, ADM
    "scaled_linear": _scaled_linear_betas,  # Stable Diffusion 1, 2, XL
    "cosine": _cosine_betas,  # Nichol & Dhariwal 2021
}


def beta_table(betas: np.ndarray | str, **options: float | None) -> np.ndarray:
    """f64[N] of an array, or of a name in BETAS with those of its options that are not None.

    Raises ValueError for an array that is no table, and names an option that is wrong.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(betas, str):
        if betas not in BETAS:
            raise ValueError(f"betas is {betas!r}, expected an array or one of {sorted(BETAS)}")
        betas = BETAS[betas](**_checked(betas, options))
    elif options:
        raise ValueError(f"{next(iter(options))} goes with betas by name ({', '.join(BETAS)}), not with an array")
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) < 2 or not (betas > 0).all() or not ((betas[:-1] < 1).all() and betas[-1] <= 1):
        raise ValueError(f"betas has shape {betas.shape}, expected one axis of at least 2 values in (0, 1)")
    return betas


def _checked(name: str, options: dict[str, float]) -> dict[str, float]:
    """The options of a table by name; ValueError that names the one that is wrong."""
    defaults = {key: value.default for key, value in inspect.signature(BETAS[name]).parameters.items()}
    for key in options:
        if key not in defaults:
            raise ValueError(f"{key} is no option of the betas {name!r}, expected {', '.join(defaults)}")
    filled = defaults | options
    levels, low, high = filled["levels"], filled["beta_min"], filled["beta_max"]
    if isinstance(levels, bool) or not isinstance(levels, (int, np.integer)) or not 2 <= levels <= MOST:
        raise ValueError(f"levels is {levels}, expected a whole number from 2 to {MOST}")
    # The range of a clamp may include 0 and 1; the last beta of a table may be 1.
    if not 0 <= low < 1 or (low == 0 and name != "cosine"):
        raise ValueError(f"beta_min is {low}, expected a number in {'[0, 1)' if name == 'cosine' else '(0, 1)'}")
    if not low < high <= 1:
        raise ValueError(f"beta_max is {high}, expected a number in (beta_min, 1], and beta_min is {low}")
    if not 0 <= filled.get("s", 0.0) <= 1:
        raise ValueError(f"s is {filled['s']}, expected a number in [0, 1]")
    return options


def rescale_zero_terminal_snr(betas: np.ndarray | str) -> np.ndarray:
    """f64[N] betas with alpha_i' = (alpha_i - alpha_N) alpha_1 / (alpha_1 - alpha_N): alpha_1 stays, alpha_N becomes 0.

    The last beta is then 1.

    Lin et al. 2023 (arXiv:2305.08891), algorithm 1. betas as discrete_vp takes them. A network of kind eps says nothing
    about x at t = 1 of such a table: train v.
    """
    alpha = np.sqrt(np.cumprod(1 - beta_table(betas)))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return 1 - np.append(alpha[0], alpha[1:] / alpha[:-1]) ** 2
