"""The tables and time grids of published schedulers, by the options of their scheduler_config.json.

Entry i of a table of N is t = (i + 1) / N; a noise level s = sigma / alpha between two entries lies where log s does on the line
between theirs, and below the first one s is linear in t. Three spacings of n entries (Lin et al. 2024, arXiv:2305.08891, table
2), and four of n levels between two ends:

    leading    (n - 1 - i) (N // n) + offset         karras             (s_max^(1/7) + u (s_min^(1/7) - s_max^(1/7)))^7, u from 0 to 1
    trailing   round(N - i N / n) - 1                exponential, lu    log s linear
    linspace   from N - 1 to 0, both included        beta               s at the quantiles of Beta(0.6, 0.6)

DPM-Solver, UniPC and DEIS take the first n of n + 1 entries. Everything ends where the class ends, at clean data, t = 0, or at the
table's first entry, t = 1 / N (set_alpha_to_one false, final_sigmas_type 'sigma_min').

A grid is (times f64[n + 1], what the network is fed at the first n of them f64[n]). Those numbers are diffusers' 0.42, to the
rounding of its tables: whether a level that lies on an entry is told as that entry or as the one before hangs on it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import betaincinv

Config = Mapping[str, Any]
Size = tuple[int, int] | None
Grid = tuple[np.ndarray, np.ndarray]

# alpha^2 at the last entry of a table of zero terminal SNR, in the classes that divide by alpha.
SMALLEST = 2.0**-24


def _line(low: float, high: float, n: int) -> np.ndarray:
    """n numbers on a line in single precision, from either end to the middle."""
    low, high, i = np.float32(low), np.float32(high), np.arange(n)
    step = float((high - low) / np.float32(n - 1))
    return np.where(i < n // 2, low + step * i, high - step * (n - 1 - i)).astype(np.float32)


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def betas(config: Config, divides: bool = False) -> np.ndarray:
    """f64[N] of beta_schedule or trained_betas, 1 - beta rounded to single precision; of a class that divides by alpha a terminal SNR
    of zero is 2^-24 instead. ValueError for trained_betas of another number than num_train_timesteps."""
    n, low, high = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        found = np.asarray(config["trained_betas"], np.float32)
        if len(found) != n:
            raise ValueError(f"trained_betas has {len(found)} entries, expected num_train_timesteps, {n}")
    elif config["beta_schedule"] == "linear":
        found = _line(low, high, n)
    elif config["beta_schedule"] == "scaled_linear":
        found = _line(low**0.5, high**0.5, n) ** 2
    else:  # Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        found = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)
    alphas = np.float32(1) - found
    if config.get("rescale_betas_zero_snr"):
        # Lin et al. 2023 (arXiv:2305.08891), algorithm 1, as in process.rescale_zero_terminal_snr but in single precision.
        root = np.sqrt(np.cumprod(alphas.astype(np.float64)).astype(np.float32))
        bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        alphas = 1 - (1 - np.append(bar[0], bar[1:] / bar[:-1]))
    found = 1 - alphas.astype(np.float64)
    if config.get("rescale_betas_zero_snr") and divides:
        found[-1] = 1 - SMALLEST / np.prod(1 - found[:-1])
    return found


def levels_of(config: Config) -> np.ndarray:
    """sigma / alpha f64[N] of the table, in the classes that divide by alpha."""
    bar = np.cumprod(1 - betas(config, divides=True)).astype(np.float32)
    return np.sqrt((1 - bar) / bar).astype(np.float64)


def places_of(levels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where levels lie among the entries of a table; ValueError for a level that is noisier than all of them."""
    if levels.max() > table[-1] * (1 + 1e-6):
        raise ValueError(f"the noisiest level is {levels.max():g}, expected at most the table's, {table[-1]:g}")
    logs, sought = np.log(table.astype(np.float32)), np.log(np.maximum(levels, 1e-10))
    low = np.clip(np.searchsorted(logs, sought, side="right") - 1, 0, len(table) - 2)
    along = np.clip((logs[low] - sought) / (logs[low] - logs[low + 1]), 0, 1)
    return np.where(levels < table[0], levels / table[0] - 1, (1 - along) * low + along * (low + 1))


SPACINGS = ("leading", "trailing", "linspace")
LEVEL_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def level_spacing(config: Config) -> str | None:
    """The one of LEVEL_SPACINGS that is on."""
    return next((key for key in LEVEL_SPACINGS if config.get(key)), None)


def _spaced(spacing: str, config: Config, low: float, high: float, steps: int) -> np.ndarray:
    """Levels f64[n] from high to low, or from sigma_max to sigma_min where the file has them."""
    if spacing != "use_lu_lambdas":
        low = low if config.get("sigma_min") is None else config["sigma_min"]
        high = high if config.get("sigma_max") is None else config["sigma_max"]
    u = np.linspace(0, 1, steps)
    if spacing == "use_karras_sigmas":
        return (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if spacing == "use_beta_sigmas":
        return low + betaincinv(0.6, 0.6, 1 - u) * (high - low)
    return np.exp(np.log(high) + u * (np.log(low) - np.log(high)))


def _on_table(index: np.ndarray, config: Config, steps: int) -> np.ndarray:
    last = config["num_train_timesteps"] - 1
    if index.min() < 0 or index.max() > last:
        raise ValueError(
            f"steps is {steps}, which needs entries {index.min():g} to {index.max():g}, expected them in the table, 0 to {last}"
        )
    return index


def entries(config: Config, steps: int, whole: bool = True) -> np.ndarray:
    """Entries f64[n] of `timestep_spacing`, the noisiest first; linspace rounded or not."""
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
    return _on_table(index, config, steps)


def inner_entries(config: Config, steps: int) -> np.ndarray:
    """The entries of DPM-Solver, UniPC and DEIS, levels noisier than lambda_min_clipped left out."""
    n, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    last = n - int((-np.log(levels_of(config)) < config.get("lambda_min_clipped", -math.inf)).sum())
    if steps >= last:
        raise ValueError(f"steps is {steps}, expected fewer than the table's entries that are used, {last}")
    if spacing == "linspace":
        index = np.linspace(0, last - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        index = np.arange(1, steps + 1)[::-1] * float(last // (steps + 1)) + config["steps_offset"]
    else:
        index = np.arange(last, 0, -n / steps)[:steps].round() - 1
    return _on_table(index, config, steps)


# ---- one function a family: (config, steps, size of the image, a flow's own levels) -> Grid ----


def alpha_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """DDIM's, PNDM's and DDPM's: entries, and an end."""
    n, index = config["num_train_timesteps"], entries(config, steps)
    return np.append((index + 1) / n, 0.0 if config.get("set_alpha_to_one", True) else 1 / n), index


def inverse_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """DDIMInverse's: upwards, the network being told the entry that each step goes to."""
    n, index = config["num_train_timesteps"], entries(config, steps)[::-1]
    if (np.diff(index) != n // steps).any() or index[0] >= n // steps:
        raise ValueError(
            f"DDIMInverseScheduler: steps is {steps} with timestep_spacing {config['timestep_spacing']!r}, expected a number "
            f"that divides {n}"
        )
    return np.append(0.0 if config["set_alpha_to_one"] else 1 / n, (index + 1) / n), index


def _sigma_levels(config: Config, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(levels f64[n + 1], the table's f64[N], the time inputs f64[n] unless the levels were spaced) of the classes whose state is
    x_t / alpha: Euler, Heun, LMS, KDPM2. Between entries it is sigma / alpha itself, not its logarithm, that is on the line."""
    table, index, spacing = levels_of(config), entries(config, steps, whole=False), level_spacing(config)
    levels = np.interp(index, np.arange(len(table)), table)
    end = table[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    if config.get("interpolation_type") == "log_linear":
        levels = np.geomspace(table[-1], table[0], steps + 1)
        if spacing is None:
            return levels, table, index
    if spacing is None:
        return np.append(levels, end), table, index
    return np.append(_spaced(spacing, config, levels[-1], levels[0], steps), end), table, None


def sigma_grid(config: Config, steps: int, size: Size, sigmas: Any, rounded: bool = False) -> Grid:
    """Theirs; rounded: Karras's levels are told as whole entries (KDPM2)."""
    levels, table, inputs = _sigma_levels(config, steps)
    places = places_of(levels, table)
    if inputs is None:
        inputs = np.maximum(places[:-1], 0)
        inputs = inputs.round() if rounded and config["use_karras_sigmas"] else inputs
    return (places + 1) / len(table), inputs


def continuous(config: Config) -> bool:
    """Whether Euler's network is told log(sigma) / 4 (Stable Video Diffusion)."""
    return config["timestep_type"] == "continuous" and config["prediction_type"] == "v_prediction"


def noisiest(config: Config) -> float:
    """The noisiest level that such a grid can have."""
    return max(config["sigma_max"] or 0, levels_of(config)[-1])


def euler_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """sigma_grid, or with t = (level / noisiest)^(1/7) where levels are continuous."""
    if not continuous(config):
        return sigma_grid(config, steps, size, sigmas)
    levels, _, _ = _sigma_levels(config, steps)
    return (levels / noisiest(config)) ** (1 / 7), 0.25 * np.log(levels[:-1])


def _inner_grid(config: Config, steps: int, rounds: tuple[str, ...]) -> Grid:
    """DPM-Solver's, UniPC's and DEIS's on a table, the network told whole entries: rounded in the spacings `rounds`, else cut off."""
    n, spacing = config["num_train_timesteps"], level_spacing(config)
    index, table = inner_entries(config, steps), levels_of(config)
    places = index
    if spacing is not None:
        places = places_of(_spaced(spacing, config, table[0], table[-1], steps), table)
        index = np.maximum(places, 0)
        index = index.round() if spacing in rounds else np.floor(index)
    end = 1 / n if config.get("final_sigmas_type") == "sigma_min" else 0.0
    return np.append((places + 1) / n, end), index


def dpm_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """DPM-Solver's; on the cosine table it cuts off everything."""
    if config["use_flow_sigmas"]:
        return _backward_flow(config, steps)
    cosine = config["beta_schedule"] == "squaredcos_cap_v2"
    return _inner_grid(config, steps, () if cosine else ("use_karras_sigmas", "use_lu_lambdas"))


def deis_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """DEIS's: the last level stands twice where levels were spaced, else the table's first ends the grid."""
    if config["use_flow_sigmas"]:
        times, inputs = _backward_flow(config, steps)
        return np.append(times[:-1], times[-2]), inputs
    times, inputs = _inner_grid(config, steps, ("use_karras_sigmas",))
    end = 1 / config["num_train_timesteps"] if level_spacing(config) is None else times[-2]
    return np.append(times[:-1], end), inputs


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Esser et al. 2024 (SD3, arXiv:2403.03206), equation 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _backward_flow(config: Config, steps: int) -> Grid:
    """n levels of a flow from 1 - 1 / N down, shifted, and 0."""
    n = config["num_train_timesteps"]
    levels = _shifted(1 - np.linspace(1, 1 / n, steps + 1), config["flow_shift"])[:0:-1]
    return np.append(levels, 0.0), np.floor(levels * n)


def _given(sigmas: Any, steps: int, default: np.ndarray) -> np.ndarray:
    """A flow's own levels before its shift, if there are any."""
    if sigmas is None:
        return default
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.shape != (steps,) or not ((np.diff(sigmas) < 0).all() and 0 < sigmas[-1] and sigmas[0] <= 1):
        raise ValueError(
            f"sigmas are {np.array2string(sigmas, threshold=6)}, expected {steps} falling numbers in (0, 1]"
        )
    return sigmas


def _to_terminal(levels: np.ndarray, last: float | None) -> np.ndarray:
    """1 - levels stretched so that the last level is `last`."""
    return 1 - (1 - levels) / ((1 - levels[-1]) / (1 - last)) if last else levels


def unipc_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """UniPC's, on a table or a flow."""
    if not config["use_flow_sigmas"]:
        return _inner_grid(config, steps, ("use_karras_sigmas",))
    n, spacing = config["num_train_timesteps"], level_spacing(config)
    if spacing is not None:
        table = levels_of(config)
        levels = _spaced(spacing, config, table[0], table[-1], steps)
        levels = levels / (levels + 1)
    else:
        levels = _given(sigmas, steps, np.linspace(1, 1 / n, steps + 1)[:-1])
        levels = _to_terminal(_shifted(levels, config["flow_shift"]), config["shift_terminal"])
        levels[0] -= 1e-6 if abs(levels[0] - 1) < 1e-6 else 0  # alpha = 0 has no log-SNR
    return np.append(levels, 0.0), np.floor(levels * n)


def flow_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """FlowMatchEuler's. Its own levels run between the shifted ends of its table, and are shifted once more; use_dynamic_shifting
    shifts by exp(mu), mu linear in the number of 16 x 16 tokens of an image of `size` pixels (FLUX.1, see grids.dynamic_shifted)."""
    n, shift, dynamic = config["num_train_timesteps"], config["shift"], config["use_dynamic_shifting"]
    ends = np.array([1.0, 1 / n])
    levels = _given(sigmas, steps, np.linspace(*(ends if dynamic else _shifted(ends, shift)), steps))
    if dynamic:
        if size is None:
            raise ValueError(
                "FlowMatchEulerDiscreteScheduler: use_dynamic_shifting is True, expected the size of the image"
            )
        low, high = config["base_image_seq_len"], config["max_image_seq_len"]
        along = (size[0] // 16 * (size[1] // 16) - low) / (high - low)
        mu = config["base_shift"] + along * (config["max_shift"] - config["base_shift"])
        shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
    levels = _to_terminal(_shifted(levels, shift), config["shift_terminal"])
    spacing = level_spacing(config)
    if spacing is not None:
        levels = _spaced(spacing, config, levels[-1], levels[0], steps)
    return np.append(levels, 0.0), levels * n


def distilled_grid(
    config: Config, steps: int, size: Size, sigmas: Any, end: float = 0.0, strength: float = 1.0
) -> Grid:
    """LCM's and TCD's: n of the original_inference_steps that they were distilled on, then the time end / N.

    With a strength n of the first int(original_inference_steps strength) of them, as latent consistency models begin with a picture.
    """
    n, original = config["num_train_timesteps"], config["original_inference_steps"]
    used = int(original * strength)
    if steps > used:
        of = (
            "original_inference_steps"
            if strength == 1
            else f"original_inference_steps {original} x strength {strength}"
        )
        raise ValueError(f"steps is {steps}, expected at most {of}, {used}")
    index = np.arange(used, 0, -1) * float(n // original) - 1
    index = index[np.floor(np.linspace(0, used, steps, endpoint=False)).astype(int)]
    return np.append((index + 1) / n, end / n), index


def consistency_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """Consistency models': equal steps of EDM's time from sigma_max, then sigma_min, t = 0."""
    n = config["num_train_timesteps"]
    if steps > n:
        raise ValueError(f"steps is {steps}, expected at most num_train_timesteps, {n}")
    times = 1 - np.arange(steps) * (n // steps) / max(n - 1, 1)
    low, high = (config[key] ** (1 / config["rho"]) for key in ("sigma_min", "sigma_max"))
    return np.append(times, 0.0), 250 * config["rho"] * np.log(low + times * (high - low))


def ve_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """ScoreSdeVe's: n levels, log sigma linear, then clean data, t = (sigma / sigma_max)^(1/7); told are levels off by sampling_eps."""
    low, high, eps = config["sigma_min"], config["sigma_max"], config["sampling_eps"]
    levels = np.exp(np.linspace(np.log(high), np.log(low), steps))
    return np.append((levels / high) ** (1 / 7), 0.0), low * (high / low) ** np.linspace(1, eps, steps)
