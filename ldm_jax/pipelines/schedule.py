"""A published scheduler_config.json in terms of ldm_jax.diffusion: process, prediction, grid, noise, clipping, update rule.

    schedule = load(folder)
    times, schedule = schedule.at(steps)        as published; at(steps, sampler="dpmpp_2m"): another update rule, all else the file's
    x_T = schedule.noise_scale(times[0]) * noise
    denoise = schedule.clipped(make_denoiser(apply, params, schedule.process, schedule.prediction))
    x = sample(schedule.method(), denoise, schedule.process, x_T, times, key)

This is diffusers' 0.42 loop of that scheduler, of which published networks are judged, its oddities included. No last denoise is due:
a grid ends where its class ends. schedulers.py has the classes, published_grids.py the grids.
"""

import functools
import inspect
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import Clean, check_times, target
from ldm_jax.diffusion.process import Process, per_row
from ldm_jax.diffusion.samplers import SAMPLERS, Sampler
from ldm_jax.pipelines.published_grids import LEVEL_SPACINGS, Config, Size
from ldm_jax.pipelines.schedulers import CLASSES, OPTIONS, Boundary, Clip, modern
from ldm_jax.weights import files
from ldm_jax.weights.format import options as read_options
from ldm_jax.weights.format import tuples

# Times this close are one: further apart in any grid, and more than what single precision makes of one.
SAME_TIME = 1e-6


class Schedule(NamedTuple):
    """What `load` reads, or `at` makes of it for a number of steps and an update rule. Hashable.

    name, config      class and options, defaults filled in
    stated            those that the file itself has, which go over to another class (spacing.py)
    process           with the time input that the network is fed
    prediction        kind, a name in PREDICTIONS of diffusion.prediction
    sampler, choices  the update rule: a name in SAMPLERS and its options, as pairs
    prior             what unit noise is multiplied by to become x_T in the scaling x_t = alpha x + sigma eps; None: sigma(t_0)
    clip, boundary    what is done to the clean estimate, see there
    learned_variance  whether the rule wants an output of twice the channels
    alpha_to_one      the file's set_alpha_to_one, None where it has none: how a grid ends under another update rule
    jump              (stride, end): steps go to t - stride, to `end` where that leaves the table, whatever the next time is
    repeated          one evaluation a step, the second one repeats the first step (PNDM)
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
    stated: tuple[tuple[str, Any], ...] = ()

    def at(
        self,
        steps: int,
        size: Size = None,
        sampler: str | None = None,
        strength: float = 1.0,
        sigmas: tuple[float, ...] | None = None,
        distilled: bool = False,
    ) -> tuple[np.ndarray, "Schedule"]:
        """(times f32[n + 1], the schedule of that run), for `steps` steps of the update rule `sampler`, None: the published one.

        Another update rule changes nothing but itself: it takes the file's grid, prediction, time inputs, noise and clipping. Its
        grid ends as the file's set_alpha_to_one says, if that is there (a rule's own class may not read it: Euler's does not).
        strength < 1 leaves the last int(steps strength) steps, for an image noised to times[0]: image-to-image as diffusers
        counts it. distilled=True takes all `steps` of LCM's file from the part of its own steps that strength leaves, as
        LatentConsistencyModelImg2ImgPipeline does; other classes have no such part. size is (H, W) in pixels, for a flow whose
        shift depends on it; sigmas f[steps] are a flow's own levels before its shift, where a pipeline has such. Schedules for
        several numbers of steps are equal, and one program compiled for them, wherever neither rule nor time input depends on
        that number.

        Published PNDM asks twice in its first step: n = steps + 1, the second time twice (a float apart). DDIMInverse's times rise.
        Raises ValueError for steps that the class does not have, for an unknown sampler, for a strength without a step, and for an
        epsilon network at a time of nothing but noise (rescale_betas_zero_snr).
        """
        config, kind = dict(self.config), CLASSES[self.name]
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        part = {"strength": strength} if distilled and self.name == "LCMScheduler" else {}
        first = 0 if part else steps - min(int(steps * strength), steps)
        if not 0 < strength <= 1 or first == steps:
            raise ValueError(
                f"strength {strength} of {steps} steps runs none; expected a number in (0, 1], and at least one step"
            )
        times, inputs = kind.grid(config, steps, size, sigmas, **part)
        name, choices = kind.rule(config, steps)
        if sampler in (None, name):
            run = self._replace(sampler=name, choices=tuple(sorted(choices.items())))
            if self.name in ("DDIMScheduler", "PNDMScheduler"):
                times, inputs, run = _by_stride(run, config, times, inputs, first)
        else:
            if sampler not in SAMPLERS:
                raise ValueError(f"sampler {sampler!r} is unknown; there are {', '.join(sorted(SAMPLERS))}")
            run = self._replace(sampler=sampler, choices=())
            if self.boundary is not None and self.boundary.scaling is not None:
                run = run._replace(boundary=None)
            falling, table = times[0] > times[-1], self.process.levels
            if self.alpha_to_one is not None and falling and table is not None:
                times = np.append(times[:-1], 0.0 if self.alpha_to_one else min(1 / table, times[-2]))
        if run.clip is not None:
            run = run._replace(clip=run.clip._replace(keep_eps=run.sampler == "ddim"))
        times, inputs = times[first:].astype(np.float32), inputs[first:].astype(np.float32)
        check_times(self.prediction, run.process, times[:-1])
        return times, run._replace(process=_feeding(run.process, times[:-1], inputs))

    def noise_scale(self, t: float) -> float:
        """What unit noise is multiplied by to become the state at t = times[0]."""
        return float(self.process.sigma(jnp.float32(t))) if self.prior is None else self.prior

    def unfinished(self) -> "Schedule":
        """The schedule for the first part of a grid that another network goes on with: no step is the last, none is of lower order."""
        final = (("final", ()),) if "final" in inspect.signature(SAMPLERS[self.sampler]).parameters else ()
        return self._replace(choices=(*(c for c in self.choices if c[0] != "final"), *final))

    def method(self, **options: Any) -> Sampler:
        """The update rule; options (eta, ...) go before the file's. ValueError for one that the rule does not have."""
        make = SAMPLERS[self.sampler]
        if unknown := sorted(set(options) - set(inspect.signature(make).parameters)):
            raise ValueError(f"sampler {self.sampler!r} has no option {unknown[0]!r}")
        if self.repeated:
            return _pseudo_linear(self.prediction, self.jump)
        sampler = make(**(dict(self.choices) | options))
        return sampler if self.jump is None else _jumping(sampler, self.jump)

    def clipped(self, denoise: Denoiser) -> Denoiser:
        """The Denoiser with the file's clipping, and with what makes a consistency function of it."""
        if self.clip is None and self.boundary is None:
            return denoise
        process, clip, boundary = self.process, self.clip, self.boundary
        distilled = boundary is not None and boundary.scaling is not None

        def published(x_t: Array, t: Array) -> Clean:
            t = jnp.asarray(t, x_t.dtype)
            clean = denoise(x_t, t)
            x = clean.x
            alpha, sigma = (per_row(f(t), x_t) for f in (process.alpha, process.sigma))
            if boundary is not None and not distilled:
                # The network's output is in x with the weights of the kind 'edm'.
                d, s = process.sigma_data, sigma - boundary.sigma_min
                x = d**2 / (s**2 + d**2) * x_t + s / sigma * (x - d**2 / (sigma**2 + d**2) * x_t)
            if clip is not None:
                x = _bounded(clip, x)
            if distilled:
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


def _feeding(process: Process, times: np.ndarray, inputs: np.ndarray) -> Process:
    """The process whose network is fed inputs[i] at times[i]: itself where it is, to single precision."""
    own = np.asarray(process.time_input(jnp.asarray(times)))
    if np.abs(own - inputs).max() <= 3e-6 * max(np.abs(inputs).max(), 1):
        return process
    return _fed(process, tuple(times.tolist()), tuple(inputs.tolist()))


@functools.lru_cache(maxsize=128)
def _fed(process: Process, times: tuple[float, ...], inputs: tuple[float, ...]) -> Process:
    def time_input(t: Array) -> Array:
        t = P.as_time(t)
        distance = jnp.abs(t[..., None] - jnp.asarray(times, t.dtype))
        met = jnp.min(distance, -1) < SAME_TIME
        return jnp.where(met, jnp.asarray(inputs, t.dtype)[jnp.argmin(distance, -1)], process.time_input(t))

    return process._replace(time_input=time_input)


# ---- DDIM and PNDM, whose steps are N // n entries whatever the next time of their grid is ----


def _by_stride(
    run: Schedule, config: Config, times: np.ndarray, inputs: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray, Schedule]:
    """(times, inputs, schedule) of diffusers' own: a jump where such steps leave the grid, and PNDM's second time twice."""
    size, steps = config["num_train_timesteps"], len(inputs)
    stride, end = size // steps, float(times[-1])
    straight = (np.diff(inputs) == -stride).all() and inputs[-1] < stride
    if inputs[-1] >= stride:
        times = np.append(times[:-1], (inputs[-1] + 1 - stride) / size)
    if run.sampler == "plms":
        # A run that begins with the repeated time goes back by a stride at its second evaluation, not to where it began.
        straight = straight and first != 1
        if steps > 1:
            times = np.insert(times, 2, np.nextafter(np.float32(times[1]), np.float32(0)))
            inputs = np.insert(inputs, 2, inputs[1])
        run = run._replace(repeated=True)
    elif run.sampler == "pndm" and (not straight or stride % 2 or steps < 4 or first or run.prediction != "eps"):
        raise ValueError(
            "PNDMScheduler: skip_prk_steps is False, expected True but for at least 4 whole runs of equal, even steps of an "
            f"epsilon network; steps is {steps} of {size}, timestep_spacing {config['timestep_spacing']!r}"
        )
    return times, inputs, run if straight else run._replace(jump=(stride / size, end))


def _end_of_step(jump: tuple[float, float] | None, t: Array, s: Array) -> Array:
    """s, or what the jump says. Upwards, in inversion, no class of diffusers has one."""
    if jump is None:
        return s
    stride, end = jump
    return jnp.where(s > t, s, jnp.where(t - stride > SAME_TIME, t - stride, end))


def _jumping(sampler: Sampler, jump: tuple[float, float]) -> Sampler:
    """The one-step sampler with such steps; the state is then at another level than the network is told next."""

    def step(denoise: Denoiser, process: Process, carry: Any, t: Array, s: Array, keys: Array | None) -> Any:
        return sampler.step(denoise, process, carry, t, _end_of_step(jump, t, s), keys)

    return sampler._replace(step=step)


# Weights of the last four outputs, the latest first, at the 1st, 2nd, ... evaluation; the 2nd is Heun's.
PSEUDO_LINEAR = (
    (1.0, 0.0, 0.0, 0.0),
    (1 / 2, 1 / 2, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class Repeated(NamedTuple):
    """x [B, ...] now; the state and the time that the first step left; the last three outputs; evaluations so far."""

    x: Array
    origin: Array
    t: Array
    outputs: Array
    count: Array


def _pseudo_linear(kind: str, jump: tuple[float, float] | None) -> Sampler:
    """plms with one evaluation a step, on a grid t_0, t_1, t_1, t_2, ...: the second one goes back and does the first step again.

    So its states are met by whoever changes them between evaluations (editing.preserve), and so image-to-image begins, which in
    diffusers cuts that grid anywhere. What is extrapolated is the network's output itself, eps or v.
    """

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Repeated:
        return Repeated(x_T, x_T, times[0], jnp.zeros((3, *x_T.shape), x_T.dtype), jnp.zeros((), jnp.int32))

    def step(denoise: Denoiser, process: Process, carry: Repeated, t: Array, s: Array, keys: Array | None) -> Repeated:
        again = carry.count == 1
        clean = denoise(carry.x, t)
        outputs = jnp.concatenate([target(kind, process, clean.x, clean.eps, t)[None], carry.outputs])
        weights = jnp.asarray(PSEUDO_LINEAR, carry.x.dtype)[jnp.minimum(carry.count, len(PSEUDO_LINEAR) - 1)]
        eps = jnp.tensordot(weights, outputs, 1)
        x = jnp.where(again, carry.origin, carry.x)
        start = jnp.where(again, carry.t if jump is None else t + jump[0], t)
        end = jnp.where(again, t, _end_of_step(jump, t, s))
        if kind == "v":
            eps = process.alpha(start) * eps + process.sigma(start) * x
        x_0 = (x - process.sigma(start) * eps) / process.alpha(start)
        return Repeated(
            process.alpha(end) * x_0 + process.sigma(end) * eps,
            jnp.where(carry.count == 0, carry.x, carry.origin),
            carry.t,
            jnp.where(again, carry.outputs, outputs[:3]),
            carry.count + 1,
        )

    return Sampler(init, step, order=2, evaluations=1)


# ---- reading ----


def _config(source: str | pathlib.Path | Config) -> tuple[str, Config]:
    """(where it is from, the options)."""
    if not isinstance(source, (str, pathlib.Path)):
        return "scheduler config", source
    path = pathlib.Path(source)
    if path.is_dir():
        inside = path / "scheduler" / "scheduler_config.json"
        path = inside if inside.is_file() else path / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a scheduler_config.json")
    return str(path), files.read_json(path)


def load(source: str | pathlib.Path | Config) -> Schedule:
    """The Schedule of a scheduler_config.json: the file, its folder, a pipeline's folder, or what it holds.

    An option of another class of CLASSES is no error: published files carry them along, and their own class does not read them;
    options of early versions of diffusers are read as today's (schedulers.modern).
    set_alpha_to_one is one of those, see Schedule.at. To read a file as another class, as diffusers' from_config does, hand in
    config | {"_class_name": ...}. Raises ValueError naming the class, the option and the value for a class or an option that is
    unknown, and for a value that is not honoured.
    """
    where, found = _config(source)
    name = found.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{where}: _class_name is {name!r}, expected one of {', '.join(CLASSES)}")
    kind, found = CLASSES[name], modern(name, found)
    config = read_options(name, found, kind.known, fixed=kind.fixed, unused=OPTIONS - set(kind.known) - set(kind.fixed))
    spacings = [key for key in LEVEL_SPACINGS if config.get(key)]
    if len(spacings) > 1:
        raise ValueError(f"{name}: {spacings[0]} and {spacings[1]} are both True, expected at most one of them")
    try:
        facts = kind.facts(name, config)
        sampler, choices = kind.rule(config, config["num_train_timesteps"])
    except ValueError:
        raise
    except Exception as error:  # a text where a number belongs: it shows as nearly any exception
        raise ValueError(f"{name}: an option is of another type than expected ({error})") from error
    return Schedule(
        name,
        tuple(sorted(config.items())),
        sampler=sampler,
        choices=tuple(sorted(choices.items())),
        alpha_to_one=found.get("set_alpha_to_one"),
        stated=tuple(sorted((key, tuples(value)) for key, value in found.items() if key in OPTIONS)),
        **facts,
    )
