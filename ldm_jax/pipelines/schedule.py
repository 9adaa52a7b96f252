"""What a published scheduler_config.json says, in terms of ldm_jax.diffusion.

A file names a class of diffusers' and its options. They fix the process, what the network predicts and is fed, the grid of n steps,
the scale of the initial noise, a clipping of the clean estimate, and an update rule, which is one of SAMPLERS:

    schedule = load(folder)
    times, schedule = schedule.at(steps)                     as published; at(steps, sampler="dpmpp_2m"): another update rule
    x_T = schedule.noise_scale(times[0]) * noise
    denoise = schedule.clipped(make_denoiser(..., schedule.process, schedule.prediction))
    x = sample(schedule.method(), denoise, schedule.process, x_T, times, key)

Entry i of a table of N is t = (i + 1) / N, and a noise level s = sigma / alpha between two entries lies where log s does on the line
between theirs. Three spacings of n entries (Lin et al. 2024, arXiv:2305.08891, table 2), and four of n levels between two ends:

    leading    (n - 1 - i) (N // n) + offset           karras        (s_max^(1/7) + u (s_min^(1/7) - s_max^(1/7)))^7, u from 0 to 1
    trailing   round(N - i N / n) - 1                  exponential   log s linear (DPM-Solver's `lu` with its exponent 1 too)
    linspace   N - 1 to 0, both included               beta          s at the quantiles of Beta(0.6, 0.6)

DPM-Solver, UniPC and DEIS take the first n of n + 1 instead. Everything ends where the class ends: at clean data, t = 0, or at the
table's first entry, t = 1 / N (set_alpha_to_one false, final_sigmas_type 'sigma_min'). No last denoise is due anywhere.

It is equal to diffusers 0.42, whose oddities published networks are judged by (tests/oracle/test_schedule.py).
"""

import functools
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import betaincinv

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.process import Process, per_row
from ldm_jax.diffusion.samplers import SAMPLERS, Sampler
from ldm_jax.weights.format import options as read_options

Config = Mapping[str, Any]
Size = tuple[int, int] | None
# Times f64[n + 1] of a grid of n steps, and what the network is fed at the first n of them.
Grid = tuple[np.ndarray, np.ndarray]

PREDICTIONS = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x",
    "original_sample": "x",
    "flow_prediction": "flow",
}
# alpha^2 at the last entry of a table of zero terminal SNR, in the classes that divide by alpha.
SMALLEST = 2.0**-24
# Below this number of steps DPM-Solver and DEIS lower the order of the last two.
FEW_STEPS = 15
# Times this close are one: further from the next one of any grid, and more than what single precision makes of one.
SAME_TIME = 1e-6


class Clip(NamedTuple):
    """The clean estimate x is clipped to [-bound, bound]; with a percentile to [-s, s] and divided by s, that percentile of |x| over
    a row, 1 <= s <= bound (Saharia et al. 2022, Imagen, arXiv:2205.11487, section 2.3). keep_eps: eps stays the network's,
    as in diffusers' DDIM, else it is what explains x_t with the new x."""

    bound: float = 1.0
    percentile: float | None = None
    keep_eps: bool = False


class Boundary(NamedTuple):
    """f = c_skip x_t + c_out F of a consistency function, F being the clean estimate (scaling, of LCM) or the raw output (sigma_min, of CM).

    LCM: c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), u = scaling times the time input, d = 1/2 (Luo et al. 2023,
    arXiv:2310.04378). CM: those of EDM with sigma - sigma_min for sigma, but under the root (Song et al. 2023, arXiv:2303.01469,
    appendix C)."""

    scaling: float | None = None
    sigma_min: float = 0.0


class Schedule(NamedTuple):
    """A scheduler's file, read; hashable. `at` gives the one for a number of steps and an update rule.

    name, config      class and options, defaults filled in
    process           with the time input that the network is fed
    prediction        kind, a name in PREDICTIONS of diffusion.prediction
    sampler, choices  the update rule: a name in SAMPLERS and its options, as pairs
    prior             what unit noise is multiplied by to become x_T in the scaling x_t = alpha x + sigma eps; None: sigma(t_0)
    clip, boundary    what is done to the clean estimate, see there
    learned_variance  whether the output has twice the channels
    alpha_to_one      the file's set_alpha_to_one, None where it has none: how a grid ends under another update rule
    jump              (stride, end): steps go to t - stride, or end, where that leaves the table, and not to the grid's next time
    repeated          PNDM's: one evaluation a step, the first step in two
    """

    name: str
    config: tuple[tuple[str, Any], ...]
    process: Process
    prediction: str
    sampler: str
    choices: tuple[tuple[str, Any], ...] = ()
    prior: float | None = 1.0
    clip: Clip | None = None
    boundary: Boundary | None = None
    learned_variance: bool = False
    alpha_to_one: bool | None = None
    jump: tuple[float, float] | None = None
    repeated: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """`choices` as keywords."""
        return dict(self.choices)

    def at(
        self,
        steps: int,
        size: Size = None,
        sampler: str | None = None,
        strength: float = 1.0,
        sigmas: tuple[float, ...] | None = None,
    ) -> tuple[np.ndarray, "Schedule"]:
        """(times f32[n + 1], the schedule of that run), for `steps` steps of the update rule `sampler`, None: the published one.

        Another update rule changes nothing but itself: it takes the file's grid, prediction, time inputs, noise and clipping. Its
        grid ends as the file's set_alpha_to_one says, if that is there (a rule's own class may not read it: Euler's does not).
        strength < 1 leaves the last int(steps strength) steps, for an image noised to times[0]: image-to-image as diffusers
        counts it. size is (H, W) in pixels, for a flow whose shift depends on it; sigmas f[steps] are a flow's own levels before
        its shift, where a pipeline has such. The schedule is the same one for different steps wherever the rule and the time
        input are, so that a program compiled for it serves them all.

        Published PNDM asks twice in its first step: n = steps + 1, the second time twice (a float apart). DDIMInverse's times rise.
        Raises ValueError for steps that the class does not have, for an unknown sampler, and for a strength without a step.
        """
        config, kind = dict(self.config), CLASSES[self.name]
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        first = steps - min(int(steps * strength), steps)
        if not 0 < strength <= 1 or first == steps:
            raise ValueError(
                f"strength {strength} of {steps} steps runs none; expected a number in (0, 1], and at least one step"
            )
        times, inputs = kind.grid(config, steps, size, sigmas)
        name, choices = kind.rule(config, steps)
        if sampler in (None, name):
            run = self._replace(sampler=name, choices=tuple(sorted(choices.items())))
            if self.name in ("DDIMScheduler", "PNDMScheduler"):
                times, inputs, run = _as_table(run, config, times, inputs, first)
        else:
            if sampler not in SAMPLERS:
                raise ValueError(f"sampler {sampler!r} is unknown; there are {', '.join(sorted(SAMPLERS))}")
            run = self._replace(sampler=sampler, choices=())
            if self.boundary is not None and self.boundary.scaling is not None:
                run = run._replace(boundary=None)
            if self.alpha_to_one is not None and self.name != "DDIMInverseScheduler":
                last = 0.0 if self.alpha_to_one else 1 / config["num_train_timesteps"]
                times = np.append(times[:-1], min(last, times[-2]))
        if run.clip is not None:
            run = run._replace(clip=run.clip._replace(keep_eps=run.sampler == "ddim"))
        times, inputs = np.asarray(times[first:], np.float32), np.asarray(inputs[first:], np.float32)
        told = np.asarray(run.process.time_input(jnp.asarray(times[:-1])))
        if np.abs(told - inputs).max() > 3e-6 * max(np.abs(inputs).max(), 1):
            run = run._replace(process=_fed(run.process, tuple(times[:-1].tolist()), tuple(inputs.tolist())))
        return times, run

    def times(self, steps: int, size: Size = None) -> np.ndarray:
        """The published grid f32[n + 1], see `at`."""
        return self.at(steps, size)[0]

    def noise_scale(self, t: float) -> float:
        """What unit noise is multiplied by to become the state at t = times[0]."""
        return float(self.process.sigma(jnp.float32(t))) if self.prior is None else self.prior

    def method(self, **options: Any) -> Sampler:
        """The update rule; options go before the file's. ValueError for one that the rule does not have."""
        make = SAMPLERS[self.sampler]
        if unknown := sorted(set(options) - set(inspect.signature(make).parameters)):
            raise ValueError(f"sampler {self.sampler!r} has no option {unknown[0]!r}")
        if self.repeated:
            return _pseudo_linear(self.prediction, self.jump)
        sampler = make(**(self.options | options))
        return sampler if self.jump is None else _jumping(sampler, self.jump)

    def clipped(self, denoise: Denoiser) -> Denoiser:
        """The Denoiser with the file's clipping, and what makes a consistency function of it."""
        if self.clip is None and self.boundary is None:
            return denoise
        process, clip, boundary = self.process, self.clip, self.boundary

        def published(x_t: Array, t: Array):
            t = jnp.asarray(t, x_t.dtype)
            clean = denoise(x_t, t)
            alpha, sigma = (per_row(f(t), x_t) for f in (process.alpha, process.sigma))
            x = clean.x
            if boundary is not None and boundary.scaling is None:
                x = _consistency(process.sigma_data, boundary.sigma_min, x_t, x, sigma)
            if clip is not None:
                x = _bounded(clip, x)
            if boundary is not None and boundary.scaling is not None:
                u = per_row(boundary.scaling * process.time_input(t), x_t)
                x = 0.25 / (u**2 + 0.25) * x_t + u / jnp.sqrt(u**2 + 0.25) * x
            if clip is not None and clip.keep_eps:
                return clean._replace(x=x)
            return clean._replace(x=x, eps=jnp.where(x == clean.x, clean.eps, (x_t - alpha * x) / sigma))

        return published


def _bounded(clip: Clip, x: Array) -> Array:
    if clip.percentile is None:
        return jnp.clip(x, -clip.bound, clip.bound)
    size = jnp.quantile(jnp.abs(x).reshape(x.shape[0], -1), clip.percentile, axis=1)
    s = per_row(jnp.minimum(jnp.maximum(size, 1), clip.bound), x)
    return jnp.clip(x, -s, s) / s


def _consistency(sigma_data: float, sigma_min: float, x_t: Array, x: Array, sigma: Array) -> Array:
    """CM's f from the clean estimate x of the kind 'edm': the same output, its other weights."""
    d = sigma_data
    skip, own_skip = d**2 / (sigma**2 + d**2), d**2 / ((sigma - sigma_min) ** 2 + d**2)
    return own_skip * x_t + (1 - sigma_min / sigma) * (x - skip * x_t)


@functools.lru_cache(maxsize=128)
def _fed(process: Process, times: tuple[float, ...], inputs: tuple[float, ...]) -> Process:
    """The process whose network is fed inputs[i] at times[i], and elsewhere what it was."""

    def time_input(t: Array) -> Array:
        t = P.as_time(t)
        distance = jnp.abs(t[..., None] - jnp.asarray(times, t.dtype))
        near = jnp.argmin(distance, -1)
        met = jnp.min(distance, -1) < SAME_TIME
        return jnp.where(met, jnp.asarray(inputs, t.dtype)[near], process.time_input(t))

    return process._replace(time_input=time_input)


# ---- update rules that leave the grid ----


def _target(jump: tuple[float, float] | None, t: Array, s: Array) -> Array:
    """Where a step from t goes: to s, or to t - stride, or to `end` where that lies before the table's first entry, 1 / N."""
    if jump is None:
        return s
    stride, end = jump
    return jnp.where(t - stride > SAME_TIME, t - stride, end)


def _jumping(sampler: Sampler, jump: tuple[float, float]) -> Sampler:
    """The one-step sampler with steps of N // n entries on a grid whose steps are others: diffusers' DDIM wherever N / n is not whole.

    The state is then at another level than the network is told next.
    """

    def step(denoise: Denoiser, process: Process, carry: Any, t: Array, s: Array, keys: Array | None) -> Any:
        return sampler.step(denoise, process, carry, t, _target(jump, t, s), keys)

    return sampler._replace(step=step)


# Weights of the last four outputs, the latest first, at the 1st, 2nd, ... evaluation. The 2nd repeats the 1st step (Heun).
PSEUDO_LINEAR = (
    (1.0, 0.0, 0.0, 0.0),
    (1 / 2, 1 / 2, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class Repeated(NamedTuple):
    """x [B, ...] now; the state that the first step left, and its time; the last three outputs; evaluations so far."""

    x: Array
    origin: Array
    t: Array
    outputs: Array
    count: Array


def _pseudo_linear(kind: str, jump: tuple[float, float] | None) -> Sampler:
    """plms with one evaluation a step, on a grid t_0, t_1, t_1, t_2, ...: the second one goes back and does the first step again.

    So are its states met by whoever changes them between evaluations (editing.preserve), and so image-to-image begins, which in
    diffusers cuts that grid anywhere. What is extrapolated is the network's output itself, eps or v.
    """

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Repeated:
        return Repeated(x_T, x_T, times[0], jnp.zeros((3, *x_T.shape), x_T.dtype), jnp.zeros((), jnp.int32))

    def step(denoise: Denoiser, process: Process, carry: Repeated, t: Array, s: Array, keys: Array | None) -> Repeated:
        clean = denoise(carry.x, t)
        output = target(kind, process, clean.x, clean.eps, t)
        outputs = jnp.concatenate([output[None], carry.outputs])
        again = carry.count == 1
        w = jnp.asarray(PSEUDO_LINEAR, output.dtype)[jnp.minimum(carry.count, len(PSEUDO_LINEAR) - 1)]
        output = jnp.tensordot(w, outputs, 1)
        x = jnp.where(again, carry.origin, carry.x)
        start = jnp.where(again, carry.t if jump is None else t + jump[0], t)
        end = jnp.where(again, t, _target(jump, t, s))
        if kind == "v":
            output = process.alpha(start) * output + process.sigma(start) * x
        x_0 = (x - process.sigma(start) * output) / process.alpha(start)
        moved = process.alpha(end) * x_0 + process.sigma(end) * output
        return Repeated(
            moved,
            jnp.where(carry.count == 0, carry.x, carry.origin),
            carry.t,
            jnp.where(again, carry.outputs, outputs[:3]),
            carry.count + 1,
        )

    return Sampler(init, step, order=2, evaluations=1)


def _as_table(
    run: Schedule, config: Config, times: np.ndarray, inputs: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray, Schedule]:
    """DDIM's and PNDM's own run of a grid: their steps are N // n entries, and PNDM's second time stands twice."""
    size, steps = config["num_train_timesteps"], len(inputs)
    stride, end = size // steps, times[-1]
    straight = (np.diff(inputs) == -stride).all() and inputs[-1] < stride
    if inputs[-1] >= stride:
        times = np.append(times[:-1], (inputs[-1] + 1 - stride) / size)
    if run.name == "PNDMScheduler" and run.sampler == "plms":
        # At its second evaluation a run that begins with the repeated time goes back by N // n entries, not to where it began.
        straight = straight and first != 1
        second = np.nextafter(np.float32(times[1]), np.float32(0)) if steps > 1 else times[1]
        times = np.concatenate([times[:2], [second], times[2:]]) if steps > 1 else times
        inputs = np.concatenate([inputs[:2], inputs[1:]])
        run = run._replace(repeated=True)
    elif run.name == "PNDMScheduler" and (not straight or stride % 2 or steps < 4 or first):
        raise ValueError(
            f"PNDMScheduler: skip_prk_steps is False, expected True for {steps} steps of {size} with timestep_spacing "
            f"{config['timestep_spacing']!r}: its Runge-Kutta steps want 4 and more, equal and even, from the first one on"
        )
    return times, inputs, run if straight else run._replace(jump=(stride / size, float(end)))


# ---- tables of betas, and the grids on them ----


def _chosen(name: str, config: Config, key: str, known: Mapping[Any, Any]) -> Any:
    """known[config[key]]; ValueError naming the class, the option and the value for any other."""
    if config[key] not in known:
        raise ValueError(f"{name}: {key} is {config[key]!r}, expected one of {', '.join(map(repr, known))}")
    return known[config[key]]


def _line(low: float, high: float, n: int) -> np.ndarray:
    """n numbers on a line in single precision, from either end to the middle."""
    low, high, i = np.float32(low), np.float32(high), np.arange(n)
    step = float((high - low) / np.float32(n - 1))
    return np.where(i < n // 2, low + step * i, high - step * (n - 1 - i)).astype(np.float32)


def _betas(config: Config) -> np.ndarray:
    """f64[N] of beta_schedule or trained_betas, with 1 - beta rounded to single precision as published tables have it.

    Whether a level that lies on an entry is told as that entry or the one before hangs on those roundings.
    """
    n, low, high = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
    elif config["beta_schedule"] == "linear":
        betas = _line(low, high, n)
    elif config["beta_schedule"] == "scaled_linear":
        betas = _line(low**0.5, high**0.5, n) ** 2
    else:  # Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)
    return 1 - (np.float32(1) - betas).astype(np.float64)


BETA_SCHEDULES = dict.fromkeys(("linear", "scaled_linear", "squaredcos_cap_v2"))


def _table(name: str, config: Config, divides: bool = False) -> tuple[np.ndarray, Process]:
    """(f64[N] betas, their process); of a class that divides by alpha a terminal SNR of zero is 2^-24 instead."""
    if config["trained_betas"] is None:
        _chosen(name, config, "beta_schedule", BETA_SCHEDULES)
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr"):
        betas = P.rescale_zero_terminal_snr(betas)
        if divides:
            betas[-1] = 1 - SMALLEST / np.prod(1 - betas[:-1])
    if len(betas) != config["num_train_timesteps"]:
        raise ValueError(f"{name}: trained_betas has {len(betas)} entries, expected {config['num_train_timesteps']}")
    return betas, P.discrete_vp(betas)


def _levels(config: Config) -> np.ndarray:
    """sigma / alpha f64[N] of the table, in the classes that divide by alpha."""
    betas, _ = _table("", config, divides=True)
    bar = np.cumprod(1 - betas).astype(np.float32)
    return np.sqrt((1 - bar) / bar).astype(np.float64)


def _within(index: np.ndarray, config: Config, steps: int) -> np.ndarray:
    if index.min() < 0 or index.max() >= config["num_train_timesteps"]:
        raise ValueError(
            f"steps is {steps}, which leaves the table: its entries are 0 to {config['num_train_timesteps'] - 1}, this grid's "
            f"{index.min():g} to {index.max():g}"
        )
    return index


def _index(config: Config, steps: int, whole: bool = True) -> np.ndarray:
    """Entries f64[n] of `timestep_spacing`; linspace rounded or not."""
    size, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if steps > size:
        raise ValueError(f"steps is {steps}, expected at most {size}, the size of the table")
    if spacing == "linspace":
        index = np.linspace(0, size - 1, steps)[::-1]
        index = index.round() if whole else index.astype(np.float32).astype(float)
    elif spacing == "leading":
        index = np.arange(steps)[::-1] * float(size // steps) + config["steps_offset"]
    else:
        index = np.arange(size, 0, -size / steps)[:steps].round() - 1
    return _within(index, config, steps)


def _inner_index(config: Config, steps: int) -> np.ndarray:
    """The entries of DPM-Solver, UniPC and DEIS: the first n of n + 1, but for `trailing`."""
    size, spacing = config["num_train_timesteps"], config.get("timestep_spacing", "linspace")
    # Levels noisier than lambda_min_clipped are left out.
    clipped = int((-np.log(_levels(config)) < config.get("lambda_min_clipped", -math.inf)).sum())
    last = size - clipped
    if steps > last:
        raise ValueError(f"steps is {steps}, expected at most {last}, the entries of the table that are used")
    if spacing == "linspace":
        index = np.linspace(0, last - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        index = np.arange(1, steps + 1)[::-1] * float(last // (steps + 1)) + config["steps_offset"]
    else:
        index = np.arange(last, 0, -size / steps)[:steps].round() - 1
    return _within(index, config, steps)


SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def _spacing(config: Config) -> str | None:
    """The option in SPACINGS that is on."""
    return next((key for key in SPACINGS if config.get(key)), None)


def _respaced(spacing: str, config: Config, low: float, high: float, steps: int) -> np.ndarray:
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


def _places(levels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where levels lie between the entries of a table, on the line of log(sigma / alpha); below the first one sigma / alpha is on it."""
    if levels.max() > table[-1] * (1 + 1e-6):
        raise ValueError(f"the noisiest level is {levels.max():g}, expected at most the table's, {table[-1]:g}")
    logs, sought = np.log(table.astype(np.float32)), np.log(np.maximum(levels, 1e-10))
    low = np.clip(np.searchsorted(logs, sought, side="right") - 1, 0, len(table) - 2)
    along = np.clip((logs[low] - sought) / (logs[low] - logs[low + 1]), 0, 1)
    return np.where(levels < table[0], levels / table[0] - 1, (1 - along) * low + along * (low + 1))


# ---- grids: (config, steps, size, sigmas) -> Grid ----


def _alpha_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """DDIM's, PNDM's and DDPM's: entries, and an end."""
    n, index = config["num_train_timesteps"], _index(config, steps)
    return np.append((index + 1) / n, 0.0 if config.get("set_alpha_to_one", True) else 1 / n), index


def _inverse_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """DDIMInverse's: upwards, the network being told the entry that each step goes to."""
    n, index = config["num_train_timesteps"], _index(config, steps)[::-1]
    if (np.diff(index) != n // steps).any() or index[0] >= n // steps:
        raise ValueError(
            f"DDIMInverseScheduler: steps is {steps} with timestep_spacing {config['timestep_spacing']!r}, expected a number "
            f"that divides {n}"
        )
    return np.append(0.0 if config["set_alpha_to_one"] else 1 / n, (index + 1) / n), index


def _sigma_levels(config: Config, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(levels f64[n + 1], the table's f64[N], the time inputs f64[n] if the levels were not spaced anew) of the classes whose
    state is x_t / alpha: Euler, Heun, LMS, KDPM2. sigma / alpha, not its logarithm, is on the line between entries."""
    table, index, spacing = _levels(config), _index(config, steps, whole=False), _spacing(config)
    levels = np.interp(index, np.arange(len(table)), table)
    end = table[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    if config.get("interpolation_type") == "log_linear":
        levels = np.geomspace(table[-1], table[0], steps + 1)
        if spacing is None:
            return levels, table, index
    if spacing is None:
        return np.append(levels, end), table, index
    return np.append(_respaced(spacing, config, levels[-1], levels[0], steps), end), table, None


def _sigma_grid(config: Config, steps: int, size: Size, sigmas: Any, rounded: bool = False) -> Grid:
    """rounded: Karras's levels are told as whole entries (KDPM2)."""
    levels, table, inputs = _sigma_levels(config, steps)
    places = _places(levels, table)
    if inputs is None:
        inputs = np.maximum(places[:-1], 0)
        inputs = inputs.round() if rounded and config["use_karras_sigmas"] else inputs
    return (places + 1) / len(table), inputs


def _euler_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    if not _continuous(config):
        return _sigma_grid(config, steps, size, sigmas)
    levels, _, _ = _sigma_levels(config, steps)
    return (levels / _top(config)) ** (1 / 7), 0.25 * np.log(levels[:-1])


def _inner_grid(config: Config, steps: int, size: Size, sigmas: Any, ends: str | None = None, rounds=()) -> Grid:
    """DPM-Solver's, UniPC's and DEIS's. The network is told whole entries, rounded in the spacings `rounds`, else cut off."""
    n, spacing = config["num_train_timesteps"], _spacing(config)
    index, table = _inner_index(config, steps), _levels(config)
    places = index
    if spacing is not None:
        places = _places(_respaced(spacing, config, table[0], table[-1], steps), table)
        index = np.maximum(places, 0)
        index = index.round() if spacing in rounds else np.floor(index)
    final = config.get("final_sigmas_type", "zero")
    end = 0.0 if final == "zero" else 1 / n
    return np.append((places + 1) / n, end), index


def _dpm_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    if config["use_flow_sigmas"]:
        return _backward_flow(config, steps)
    # The published code's exception for the cosine table.
    rounds = () if config["beta_schedule"] == "squaredcos_cap_v2" else ("use_karras_sigmas", "use_lu_lambdas")
    return _inner_grid(config, steps, size, sigmas, rounds=rounds)


def _deis_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """The last level stands twice where levels were spaced, else the table's first ends the grid."""
    if config["use_flow_sigmas"]:
        times, inputs = _backward_flow(config, steps)
        return np.append(times[:-1], times[-2]), inputs
    times, inputs = _inner_grid(config, steps, size, sigmas, rounds=("use_karras_sigmas",))
    return np.append(times[:-1], 1 / config["num_train_timesteps"] if _spacing(config) is None else times[-2]), inputs


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Esser et al. 2024 (SD3, arXiv:2403.03206), equation 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _backward_flow(config: Config, steps: int) -> Grid:
    """n levels of a flow from 1 - 1 / N down, shifted, and 0."""
    n = config["num_train_timesteps"]
    levels = _shifted(1 - np.linspace(1, 1 / n, steps + 1), config["flow_shift"])[:0:-1]
    return np.append(levels, 0.0), np.floor(levels * n)


def _unipc_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    if not config["use_flow_sigmas"]:
        return _inner_grid(config, steps, size, sigmas, rounds=("use_karras_sigmas",))
    n, spacing = config["num_train_timesteps"], _spacing(config)
    if spacing is not None:
        table = _levels(config)
        levels = _respaced(spacing, config, table[0], table[-1], steps)
        levels = levels / (levels + 1)
    else:
        levels = _given(sigmas, steps, np.linspace(1, 1 / n, steps + 1)[:-1])
        levels = _to_terminal(_shifted(levels, config["flow_shift"]), config["shift_terminal"])
        levels[0] -= 1e-6 if abs(levels[0] - 1) < 1e-6 else 0  # alpha = 0 has no log-SNR
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


def _flow_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """FlowMatchEuler's. Its own levels run between the shifted ends of its table, and are shifted once more."""
    n, shift, dynamic = config["num_train_timesteps"], config["shift"], config["use_dynamic_shifting"]
    ends = np.array([1.0, 1 / n])
    levels = _given(sigmas, steps, np.linspace(*(ends if dynamic else _shifted(ends, shift)), steps))
    if dynamic:
        if size is None:
            raise ValueError(
                "FlowMatchEulerDiscreteScheduler: use_dynamic_shifting is True, expected the size of the image"
            )
        low, high = config["base_image_seq_len"], config["max_image_seq_len"]
        # A token is 16 x 16 pixels.
        along = (size[0] // 16 * (size[1] // 16) - low) / (high - low)
        mu = config["base_shift"] + along * (config["max_shift"] - config["base_shift"])
        shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
    levels = _to_terminal(_shifted(levels, shift), config["shift_terminal"])
    spacing = _spacing(config)
    if spacing is not None:
        levels = _respaced(spacing, config, levels[-1], levels[0], steps)
    return np.append(levels, 0.0), levels * n


def _distilled_grid(config: Config, steps: int, size: Size, sigmas: Any, end: float = 0.0) -> Grid:
    """LCM's and TCD's: n of the original_inference_steps that they were distilled on. TCD ends at the table's first entry."""
    n, original = config["num_train_timesteps"], config["original_inference_steps"]
    if steps > original:
        raise ValueError(f"steps is {steps}, expected at most original_inference_steps, {original}")
    entries = np.arange(original, 0, -1) * (n // original) - 1
    index = entries[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)].astype(float)
    return np.append((index + 1) / n, end / n), index


def _consistency_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """CM's: equal steps of EDM's time from sigma_max, then sigma_min, t = 0."""
    n = config["num_train_timesteps"]
    if steps > n:
        raise ValueError(f"steps is {steps}, expected at most num_train_timesteps, {n}")
    times = 1 - np.arange(steps) * (n // steps) / max(n - 1, 1)
    low, high = (config[key] ** (1 / config["rho"]) for key in ("sigma_min", "sigma_max"))
    return np.append(times, 0.0), 250 * config["rho"] * np.log(low + times * (high - low))


def _ve_grid(config: Config, steps: int, size: Size, sigmas: Any) -> Grid:
    """ScoreSdeVe's: n levels, log sigma linear, then clean data; the network is told levels between them, by sampling_eps."""
    low, high, eps = config["sigma_min"], config["sigma_max"], config["sampling_eps"]
    levels = np.exp(np.linspace(np.log(high), np.log(low), steps))
    told = low * (high / low) ** np.linspace(1, eps, steps)
    return np.append((levels / high) ** (1 / 7), 0.0), told


# ---- facts: (name, config) -> fields of Schedule ----


def _kind(name: str, config: Config, *known: str) -> str:
    return _chosen(name, config, "prediction_type", {key: PREDICTIONS[key] for key in known})


def _clip(config: Config) -> Clip | None:
    if config.get("thresholding"):
        return Clip(config["sample_max_value"], config["dynamic_thresholding_ratio"])
    return Clip(config["clip_sample_range"]) if config.get("clip_sample") else None


def _spaced(name: str, config: Config) -> None:
    _chosen(name, config, "timestep_spacing", dict.fromkeys(("leading", "trailing", "linspace")))


def _alpha_facts(name: str, config: Config) -> dict[str, Any]:
    _spaced(name, config)
    clip = _clip(config)
    kinds = ("epsilon", "v_prediction") if name == "PNDMScheduler" else ("epsilon", "v_prediction", "sample")
    no_length = config["timestep_spacing"] == "linspace" or not config["steps_offset"]
    if clip and not config.get("set_alpha_to_one", True) and config["timestep_spacing"] != "trailing" and no_length:
        # A step from the first entry to itself, which clips and does nothing else.
        raise ValueError(
            f"{name}: set_alpha_to_one is False, expected True beside a clipping that its last step alone does"
        )
    learned = config.get("variance_type", "").startswith("learned")
    return {
        "process": _table(name, config)[1],
        "prediction": _kind(name, config, *kinds),
        "clip": clip,
        "learned_variance": learned,
    }


def _sigma_facts(name: str, config: Config) -> dict[str, Any]:
    _spaced(name, config)
    kinds = ("epsilon", "v_prediction") + (() if "KDPM2" in name or "Ancestral" in name else ("sample",))
    return {
        "process": _table(name, config, divides=True)[1],
        "prediction": _kind(name, config, *kinds),
        "prior": 1.0 if config["timestep_spacing"] == "leading" else None,
        "clip": _clip(config),
    }


def _continuous(config: Config) -> bool:
    return config["timestep_type"] == "continuous" and config["prediction_type"] == "v_prediction"


def _top(config: Config) -> float:
    """The noisiest level that there can be, of a network that is told log(sigma) / 4."""
    return max(config["sigma_max"] or 0, _levels(config)[-1])


def _power(top: float, preserving: bool) -> Process:
    """sigma / alpha = top t^7, so that t = 0 is clean data and Karras's levels are nearly uniform in t; variance preserving or exploding."""

    def level(t: Array) -> Array:
        return top * t**7

    def alpha(t: Array) -> Array:
        return jax.lax.rsqrt(1 + level(t) ** 2) if preserving else jnp.ones_like(t)

    return Process(
        alpha=lambda t: alpha(P.as_time(t)),
        sigma=lambda t: alpha(P.as_time(t)) * level(P.as_time(t)),
        time_input=lambda t: 0.25 * jnp.log(level(t)) if preserving else level(t),
        t_of_log_snr=lambda value: (jnp.exp(-0.5 * value) / top) ** (1 / 7),
    )


def _euler_facts(name: str, config: Config) -> dict[str, Any]:
    facts = _sigma_facts(name, config | {"prediction_type": config["prediction_type"].replace("original_", "")})
    _chosen(name, config, "interpolation_type", dict.fromkeys(("linear", "log_linear")))
    _chosen(name, config, "timestep_type", dict.fromkeys(("discrete", "continuous")))
    _chosen(name, config, "final_sigmas_type", dict.fromkeys(("zero", "sigma_min")))
    return facts | ({"process": _power(_top(config), True)} if _continuous(config) else {})


def _flow_process(n: int) -> Process:
    return P.flow()._replace(time_input=lambda t: n * t)


def _inner_facts(name: str, config: Config) -> dict[str, Any]:
    if "timestep_spacing" in config:
        _spaced(name, config)
    if "final_sigmas_type" in config:
        _chosen(name, config, "final_sigmas_type", dict.fromkeys(("zero", "sigma_min")))
    _chosen(name, config, "solver_order", dict.fromkeys((1, 2, 3)))
    process, kinds = _table(name, config, divides=True)[1], ("epsilon", "v_prediction", "sample")
    spacing, final = _spacing(config), config.get("final_sigmas_type", "zero")
    if config["use_flow_sigmas"]:
        process, kinds = _flow_process(config["num_train_timesteps"]), ("epsilon", "sample", "flow_prediction")
        if final != "zero":
            raise ValueError(f"{name}: final_sigmas_type is {final!r}, expected 'zero' beside use_flow_sigmas")
        if spacing is not None and (name, spacing) != ("UniPCMultistepScheduler", "use_karras_sigmas"):
            raise ValueError(f"{name}: {spacing} is True, expected False beside use_flow_sigmas")
    return {
        "process": process,
        "prediction": _kind(name, config, *kinds),
        "clip": _clip(config),
        "learned_variance": config.get("variance_type") is not None,
    }


def _unipc_facts(name: str, config: Config) -> dict[str, Any]:
    _chosen(name, config, "solver_type", UNIPC)
    spacing, final = _spacing(config), config["final_sigmas_type"]
    if final == "sigma_min" and spacing is not None:
        # The last level stands twice, and is corrected once more there.
        raise ValueError(f"{name}: final_sigmas_type is 'sigma_min', expected 'zero' beside {spacing}")
    if final == "zero" and not config["lower_order_final"] and config["solver_order"] > 1:
        raise ValueError(f"{name}: lower_order_final is False, expected True beside final_sigmas_type 'zero'")
    if config["shift_terminal"] is not None and not config["use_flow_sigmas"]:
        raise ValueError(f"{name}: shift_terminal is {config['shift_terminal']}, expected None without use_flow_sigmas")
    return _inner_facts(name, config)


def _dpm_facts(name: str, config: Config) -> dict[str, Any]:
    algorithm = _chosen(name, config, "algorithm_type", ALGORITHMS)
    _chosen(name, config, "solver_type", DPM_SOLVERS)
    if algorithm == "dpmsolver" and config["final_sigmas_type"] == "zero":
        raise ValueError(f"{name}: final_sigmas_type is 'zero', expected 'sigma_min' beside algorithm_type 'dpmsolver'")
    if algorithm == "sde-dpmsolver++" and config["solver_order"] == 3:
        # Its second difference has a weight that tends to -1 as steps shrink: weak order 1.
        raise ValueError(f"{name}: solver_order is 3, expected 1 or 2 beside algorithm_type 'sde-dpmsolver++'")
    if algorithm == "dpmsolver" and config["use_flow_sigmas"]:
        raise ValueError(f"{name}: algorithm_type is 'dpmsolver', expected one with ++ beside use_flow_sigmas")
    return _inner_facts(name, config)


def _deis_facts(name: str, config: Config) -> dict[str, Any]:
    _chosen(name, config, "algorithm_type", dict.fromkeys(("deis", "dpmsolver", "dpmsolver++")))
    _chosen(name, config, "solver_type", dict.fromkeys(("logrho", "midpoint", "heun", "bh1", "bh2")))
    return _inner_facts(name, config)


def _distilled_facts(name: str, config: Config) -> dict[str, Any]:
    original, n = config["original_inference_steps"], config["num_train_timesteps"]
    if not 1 <= original <= n:
        raise ValueError(f"{name}: original_inference_steps is {original}, expected 1 to {n}")
    return {
        "process": _table(name, config)[1],
        "prediction": _kind(name, config, "epsilon", "v_prediction", "sample"),
        # TCD's file has the options of a clipping, its step does none.
        "clip": _clip(config) if name == "LCMScheduler" else None,
        "boundary": Boundary(scaling=config["timestep_scaling"]) if name == "LCMScheduler" else None,
    }


def _flow_facts(name: str, config: Config) -> dict[str, Any]:
    _chosen(name, config, "time_shift_type", dict.fromkeys(("exponential", "linear")))
    return {"process": _flow_process(config["num_train_timesteps"]), "prediction": "flow"}


def _ve_facts(name: str, config: Config) -> dict[str, Any]:
    return {"process": _power(config["sigma_max"], False), "prediction": "score", "prior": config["sigma_max"]}


def _consistency_facts(name: str, config: Config) -> dict[str, Any]:
    edm = P.edm(*(config[key] for key in ("sigma_min", "sigma_max", "rho", "sigma_data")))
    return {
        "process": edm._replace(time_input=lambda t: 1000 * edm.time_input(t)),
        "prediction": "edm",
        "prior": config["sigma_max"],
        "clip": Clip(1.0) if config["clip_denoised"] else None,
        "boundary": Boundary(sigma_min=config["sigma_min"]),
    }


# ---- update rules: (config, steps) -> (name in SAMPLERS, its options) ----

Rule = Callable[[Config, int], tuple[str, dict[str, Any]]]

VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned",
}
ALGORITHMS = {
    "dpmsolver++": "dpmsolver++",
    "deis": "dpmsolver++",
    "dpmsolver": "dpmsolver",
    "sde-dpmsolver++": "sde-dpmsolver++",
}
# Values of another class's files are read as the default, as published.
DPM_SOLVERS = {
    "midpoint": "midpoint",
    "heun": "heun",
    "logrho": "midpoint",
    "bh1": "midpoint",
    "bh2": "midpoint",
}
UNIPC = {
    "bh1": "uni_pc",
    "bh2": "uni_pc_bh2",
    "midpoint": "uni_pc_bh2",
    "heun": "uni_pc_bh2",
    "logrho": "uni_pc_bh2",
}


def _always(name: str, **options: Any) -> Rule:
    return lambda config, steps: (name, options)


def _ddpm_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    variance = _chosen("DDPMScheduler", config, "variance_type", VARIANCES)
    noisy = variance != "small" and _index(config, steps)[-1] > 0
    return "ddpm", {"variance": variance} | ({"last_noise": True} if noisy else {})


def _pndm_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return ("plms" if config["skip_prk_steps"] else "pndm"), {}


def _dpm_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    algorithm, solver = ALGORITHMS[config["algorithm_type"]], DPM_SOLVERS[config["solver_type"]]
    order, few = config["solver_order"], config["lower_order_final"] and steps < FEW_STEPS
    if order == 1:
        return ("euler_ancestral" if algorithm == "sde-dpmsolver++" else "euler"), {}
    final = (2, 1) if few else (1,) if config["euler_at_final"] else ()
    if config["final_sigmas_type"] == "sigma_min" and _spacing(config) is not None:
        final = final[:-1]  # the last level stands twice, and that last step does nothing
    elif config["final_sigmas_type"] == "zero" and order == 2:
        final = ()  # a step into sigma = 0 is of order 1 anyway
    options = {"final": final} if final else {}
    if order == 3:
        name = "dpmpp_3m" if algorithm == "dpmsolver++" else "dpm_solver_3m"
        return name, options | ({"solver": solver} if solver != "midpoint" else {})
    names = {
        ("dpmsolver++", "midpoint"): "dpmpp_2m",
        ("dpmsolver++", "heun"): "res_multistep",
        ("dpmsolver", "midpoint"): "dpm_solver_2m",
        ("dpmsolver", "heun"): "deis_2",
        ("sde-dpmsolver++", "midpoint"): "dpmpp_2m_sde",
        ("sde-dpmsolver++", "heun"): "dpmpp_2m_sde_heun",
    }
    return names[algorithm, solver], options


def _deis_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    order, few = config["solver_order"], config["lower_order_final"] and steps < FEW_STEPS
    repeated = _spacing(config) is not None or config["use_flow_sigmas"]
    final = ((2,) if repeated else (2, 1)) if few else ()
    return ("euler", "deis_2", "deis_3")[order - 1], {"final": final} if final and order > 1 else {}


def _unipc_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    final = (2, 1) if config["lower_order_final"] else ()
    return UNIPC[config["solver_type"]], {"order": config["solver_order"], "final": final}


def _flow_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return ("lcm" if config["stochastic_sampling"] else "euler"), {}


def _ve_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return "predictor_corrector", {"snr": config["snr"], "corrections": config["correct_steps"]}


def _consistency_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return "lcm", {"sigma_min": config["sigma_min"]}


# ---- the classes, their options and defaults ----


class Kind(NamedTuple):
    """known: options and defaults as published; the functions above; fixed: options that must have one of these values."""

    known: dict[str, Any]
    facts: Callable[[str, Config], dict[str, Any]]
    grid: Callable[[Config, int, Size, Any], Grid]
    rule: Rule
    fixed: dict[str, tuple] = {}  # noqa: RUF012 (never written to)


BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
LATENT = BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
SPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
ZERO_SNR = {"rescale_betas_zero_snr": False}
INNER = (
    BETAS
    | THRESHOLD
    | SPACED
    | {"solver_order": 2, "lower_order_final": True, "use_flow_sigmas": False, "flow_shift": 1.0}
)
# use_dynamic_shifting of these takes a number that no file holds.
STATIC = {"use_dynamic_shifting": (False,), "time_shift_type": ("exponential",)}
DISTILLED = (
    LATENT
    | THRESHOLD
    | CLIP
    | LEADING
    | ZERO_SNR
    | {"beta_schedule": "scaled_linear", "clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0}
    | {"set_alpha_to_one": True}
)

CLASSES: dict[str, Kind] = {
    "DDIMScheduler": Kind(
        BETAS | CLIP | THRESHOLD | LEADING | ZERO_SNR | {"set_alpha_to_one": True},
        _alpha_facts,
        _alpha_grid,
        _always("ddim"),
    ),
    "DDIMInverseScheduler": Kind(
        BETAS | CLIP | LEADING | ZERO_SNR | {"set_alpha_to_one": True}, _alpha_facts, _inverse_grid, _always("ddim")
    ),
    "DDPMScheduler": Kind(
        BETAS | CLIP | THRESHOLD | LEADING | ZERO_SNR | {"variance_type": "fixed_small"},
        _alpha_facts,
        _alpha_grid,
        _ddpm_rule,
    ),
    "PNDMScheduler": Kind(
        BETAS | LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False}, _alpha_facts, _alpha_grid, _pndm_rule
    ),
    "EulerDiscreteScheduler": Kind(
        BETAS
        | LINSPACE
        | SPACED
        | ZERO_SNR
        | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"}
        | {"sigma_min": None, "sigma_max": None},
        _euler_facts,
        _euler_grid,
        _always("euler"),
    ),
    "EulerAncestralDiscreteScheduler": Kind(
        BETAS | LINSPACE | ZERO_SNR, _sigma_facts, _sigma_grid, _always("euler_ancestral")
    ),
    "LMSDiscreteScheduler": Kind(BETAS | LINSPACE | SPACED, _sigma_facts, _sigma_grid, _always("lms")),
    "HeunDiscreteScheduler": Kind(
        LATENT | LINSPACE | SPACED | CLIP | {"clip_sample": False}, _sigma_facts, _sigma_grid, _always("heun")
    ),
    "KDPM2DiscreteScheduler": Kind(
        LATENT | LINSPACE | SPACED, _sigma_facts, functools.partial(_sigma_grid, rounded=True), _always("dpm_2")
    ),
    "KDPM2AncestralDiscreteScheduler": Kind(
        LATENT | LINSPACE | SPACED,
        _sigma_facts,
        functools.partial(_sigma_grid, rounded=True),
        _always("dpm_2_ancestral"),
    ),
    "DPMSolverMultistepScheduler": Kind(
        INNER
        | LINSPACE
        | ZERO_SNR
        | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False}
        | {"final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None},
        _dpm_facts,
        _dpm_grid,
        _dpm_rule,
        STATIC | {"variance_type": (None, "learned", "learned_range")},
    ),
    "UniPCMultistepScheduler": Kind(
        INNER
        | LINSPACE
        | ZERO_SNR
        | {
            "solver_type": "bh2",
            "final_sigmas_type": "zero",
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
        _unipc_facts,
        _unipc_grid,
        _unipc_rule,
        STATIC | {"predict_x0": (True,), "disable_corrector": ((),), "solver_p": (None,)},
    ),
    "DEISMultistepScheduler": Kind(
        INNER | LINSPACE | {"algorithm_type": "deis", "solver_type": "logrho"},
        _deis_facts,
        _deis_grid,
        _deis_rule,
        STATIC,
    ),
    "LCMScheduler": Kind(DISTILLED, _distilled_facts, _distilled_grid, _always("lcm")),
    "TCDScheduler": Kind(
        DISTILLED, _distilled_facts, functools.partial(_distilled_grid, end=1.0), _always("tcd", gamma=0.3)
    ),
    "FlowMatchEulerDiscreteScheduler": Kind(
        SPACED
        | {
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "use_dynamic_shifting": False,
            "base_shift": 0.5,
            "max_shift": 1.15,
        }
        | {"base_image_seq_len": 256, "max_image_seq_len": 4096, "shift_terminal": None, "stochastic_sampling": False}
        | {"time_shift_type": "exponential"},
        _flow_facts,
        _flow_grid,
        _flow_rule,
        {"invert_sigmas": (False,)},
    ),
    "ScoreSdeVeScheduler": Kind(
        {"num_train_timesteps": 2000, "snr": 0.15, "sigma_min": 0.01, "sigma_max": 1348.0, "sampling_eps": 1e-5}
        | {"correct_steps": 1},
        _ve_facts,
        _ve_grid,
        _ve_rule,
    ),
    "CMStochasticIterativeScheduler": Kind(
        {
            "num_train_timesteps": 40,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "sigma_data": 0.5,
            "rho": 7.0,
            "clip_denoised": True,
        },
        _consistency_facts,
        _consistency_grid,
        _consistency_rule,
        {"s_noise": (1.0,)},
    ),
}


def _config(source: str | pathlib.Path | Config) -> tuple[str, Config]:
    """(where it is from, the options)."""
    if isinstance(source, Mapping):
        return "scheduler config", source
    path = pathlib.Path(source)
    if path.is_dir():
        inside = path / "scheduler" / "scheduler_config.json"
        path = inside if inside.is_file() else path / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a scheduler_config.json")
    try:
        return str(path), json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def load(source: str | pathlib.Path | Config) -> Schedule:
    """The Schedule of a scheduler_config.json: the file, its folder, a pipeline's folder, or what it holds.

    An option of another class of CLASSES is no error: published files carry them along, and their own class does not read them.
    set_alpha_to_one is one of those, see Schedule.at. Raises ValueError naming the class, the option and the value for a class or
    an option that is unknown, and for a value that is not honoured.
    """
    where, found = _config(source)
    name = found.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{where}: _class_name is {name!r}, expected one of {', '.join(CLASSES)}")
    kind = CLASSES[name]
    others = {key for other in CLASSES.values() for key in (*other.known, *other.fixed)}
    fixed = {key: kind.fixed[key] for key in kind.fixed}
    config = read_options(name, found, kind.known, fixed=fixed, unused=others - set(kind.known) - set(fixed))
    wanted = [key for key in SPACINGS if config.get(key)]
    if len(wanted) > 1:
        raise ValueError(
            f"{name}: {wanted[0]} and {wanted[1]} are both True, expected at most one spacing of the levels"
        )
    facts = kind.facts(name, config)
    sampler, choices = kind.rule(config, config["num_train_timesteps"])
    return Schedule(
        name,
        tuple(sorted(config.items())),
        sampler=sampler,
        choices=tuple(sorted(choices.items())),
        alpha_to_one=found.get("set_alpha_to_one"),
        **facts,
    )
