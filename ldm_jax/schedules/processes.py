"""The processes of published schedulers, by the options of their scheduler_config.json.

A table has N entries; entry i, with i from 0 to N - 1, is t = (i + 1) / N, and the network takes i. A noise level sigma / alpha
between two entries has its place where log(sigma / alpha) lies between theirs. Below the first entry the level is linear in t.

The numbers are those of diffusers 0.42, single precision included: its rounding decides whether a level that lies on an entry is
passed to the network as that entry or as the one before.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.process import Process
from ldm_jax.schedules.family import Config
from ldm_jax.schedules.options import is_on, one_of

# alpha^2 at the last entry of a table of zero terminal SNR, in the classes that divide by alpha.
SMALLEST = 2.0**-24
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def _line(low: float, high: float, n: int) -> np.ndarray:
    """f32[n] from low to high in equal steps, computed from both ends to the middle as torch.linspace does."""
    low, high, i = np.float32(low), np.float32(high), np.arange(n)
    step = float((high - low) / np.float32(n - 1))
    return np.where(i < n // 2, low + step * i, high - step * (n - 1 - i)).astype(np.float32)


def betas(config: Config, divides: bool = False) -> np.ndarray:
    """f64[N] of beta_schedule or trained_betas, with 1 - beta rounded to single precision.

    divides: the class divides by alpha, so a terminal SNR of zero becomes alpha^2 = 2^-24. Raises ValueError for trained_betas of
    another number than num_train_timesteps.
    """
    n, low, high = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        table = np.asarray(config["trained_betas"], np.float32)
        if len(table) != n:
            raise ValueError(f"trained_betas has {len(table)} entries, expected num_train_timesteps, {n}")
    elif config["beta_schedule"] == "linear":
        table = _line(low, high, n)
    elif config["beta_schedule"] == "scaled_linear":
        table = _line(low**0.5, high**0.5, n) ** 2
    else:  # Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        table = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)
    alphas = np.float32(1) - table
    if is_on(config, "rescale_betas_zero_snr"):
        # Lin et al. 2023 (arXiv:2305.08891), algorithm 1, as in process.rescale_zero_terminal_snr but in single precision.
        root = np.sqrt(np.cumprod(alphas.astype(np.float64)).astype(np.float32))
        bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        alphas = 1 - (1 - np.append(bar[0], bar[1:] / bar[:-1]))
    table = 1 - alphas.astype(np.float64)
    if is_on(config, "rescale_betas_zero_snr") and divides:
        table[-1] = 1 - SMALLEST / np.prod(1 - table[:-1])
    return table


def table_process(name: str, config: Config, divides: bool = False) -> Process:
    """The process of a table of betas, see `betas`."""
    if config["trained_betas"] is None:
        one_of(name, config, "beta_schedule", *BETA_SCHEDULES)
    process = P.discrete_vp(betas(config, divides))
    # Below the first entry there is no other: the network takes 0 there.
    return process._replace(time_input=lambda t: jnp.maximum(process.time_input(t), 0))


def table_levels(config: Config) -> np.ndarray:
    """sigma / alpha f64[N] of a table's entries, in the classes that divide by alpha."""
    bar = np.cumprod(1 - betas(config, divides=True)).astype(np.float32)
    return np.sqrt((1 - bar) / bar).astype(np.float64)


def places(levels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """f64[n], where `levels` lie among those of the entries, `table`: 2.5 is halfway between entries 2 and 3.

    Raises ValueError for a level that is noisier than the last entry.
    """
    if levels.max() > table[-1] * (1 + 1e-6):
        raise ValueError(f"the noisiest level is {levels.max():g}, expected at most the table's, {table[-1]:g}")
    logs, sought = np.log(table.astype(np.float32)), np.log(np.maximum(levels, 1e-10))
    low = np.clip(np.searchsorted(logs, sought, side="right") - 1, 0, len(table) - 2)
    along = np.clip((logs[low] - sought) / (logs[low] - logs[low + 1]), 0, 1)
    return np.where(levels < table[0], levels / table[0] - 1, (1 - along) * low + along * (low + 1))


def flow_process(n: int) -> Process:
    """The rectified flow, alpha = 1 - t and sigma = t, whose network takes n t."""
    return P.flow()._replace(time_input=lambda t: n * t)


def power_process(top: float, preserving: bool) -> Process:
    """The process of sigma / alpha = top t^7: t = 0 is clean data, and Karras's levels are nearly uniform in t.

    preserving: alpha^2 + sigma^2 = 1, and the network takes log(sigma / alpha) / 4. Otherwise alpha = 1, and it takes sigma.
    """

    def level(t: Array) -> Array:
        return top * P.as_time(t) ** 7

    def alpha(t: Array) -> Array:
        return jax.lax.rsqrt(1 + level(t) ** 2) if preserving else jnp.ones_like(P.as_time(t))

    return Process(
        alpha=alpha,
        sigma=lambda t: alpha(t) * level(t),
        time_input=lambda t: 0.25 * jnp.log(level(t)) if preserving else level(t),
        t_of_log_snr=lambda value: (jnp.exp(-0.5 * value) / top) ** (1 / 7),
    )
