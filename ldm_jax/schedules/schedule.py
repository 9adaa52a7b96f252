"""The Schedule of a published scheduler_config.json: process, prediction, grid, initial noise, clipping and update rule.

    schedule = load(folder)
    times, schedule = schedule.at(steps)      # the update rule of the file; at(steps, sampler="dpmpp_2m") takes another one
    x_T = schedule.noise_scale(times[0]) * noise
    denoise = schedule.clipped(make_denoiser(apply, params, schedule.process, schedule.prediction))
    x = sample(schedule.method(), denoise, schedule.process, x_T, times, key)

computes what the loop of diffusers 0.42 computes with that scheduler, oddities included, because published networks are judged by
it. The grid ends where the grid of the class ends, so no denoising follows the last step.
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
from ldm_jax.diffusion.prediction import Clean, check_times
from ldm_jax.diffusion.process import Process, per_row
from ldm_jax.diffusion.samplers import SAMPLERS, Sampler
from ldm_jax.schedules.classes import CLASSES, OPTIONS
from ldm_jax.schedules.ddim import SAME_TIME
from ldm_jax.schedules.family import Clip, Config, Estimate, Grid, Loop, Size, Steps
from ldm_jax.schedules.options import is_on, modern
from ldm_jax.schedules.spacing import LEVEL_SPACINGS
from ldm_jax.weights import files
from ldm_jax.weights.format import options as read_options
from ldm_jax.weights.format import tuples


class Schedule(NamedTuple):
    """What `load` reads; `at` returns a copy for a number of steps and an update rule. Hashable, so that programs are cached by it.

    name, config      the class in CLASSES, and all its options as pairs, defaults included
    sampler, choices  the update rule: a name in diffusion.samplers.SAMPLERS, and options of it as pairs
    alpha_to_one      set_alpha_to_one of the file, None if it has none: where the grid ends under another update rule
    stated            the options that the file itself sets, as pairs: another class reads them in respacing.py
    loop              changes how the sampler steps (family.Loop), under the rule of the file; None: not at all
    The other fields are those of family.Facts.
    """

    name: str
    config: tuple[tuple[str, Any], ...]
    process: Process
    prediction: str
    sampler: str
    choices: tuple[tuple[str, Any], ...] = ()
    prior: float | None = 1.0
    clip: Clip | None = None
    parametrization: Estimate | None = None
    boundary: Estimate | None = None
    learned_variance: bool = False
    alpha_to_one: bool | None = None
    loop: Loop | None = None
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
        """(times f32[n + 1], the schedule of such a run), for n = `steps` steps of the update rule `sampler` (None: the file's).

        Another update rule changes nothing but the rule: the grid, the prediction, the time inputs, the initial noise and the clipping
        remain those of the file. The grid then ends as set_alpha_to_one says, if the file has that option, although the class of the
        new rule may not read it (Euler's does not).

        size       (H, W) in pixels, for a flow whose shift depends on it
        strength   below 1, the grid is the last int(steps strength) steps, for an image that is noised to times[0] (image to image
                   as diffusers counts it)
        sigmas     f[steps], the levels that a pipeline prescribes to a flow, before its shift
        distilled  for LCM: all `steps` are taken, out of the part of the distillation's steps that strength leaves, as in
                   LatentConsistencyModelImg2ImgPipeline. Other classes count as before

        The schedules of several numbers of steps are equal, so that one compiled program serves them, unless the rule or a time input
        depends on the number. PNDM evaluates twice in its first step: n = steps + 1, and the second time occurs twice, a float
        apart. DDIMInverse's times rise.
        Raises ValueError for a number of steps that the class does not have, an unknown sampler, a strength that leaves no step, and
        a network that predicts eps at a time where x_t is nothing but noise (rescale_betas_zero_snr).
        """
        config, row = dict(self.config), CLASSES[self.name]
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        in_grid = distilled and row.takes_strength
        first = 0 if in_grid else steps - min(int(steps * strength), steps)
        if not 0 < strength <= 1 or first == steps:
            raise ValueError(
                f"strength {strength} of {steps} steps runs none; expected a number in (0, 1], and at least one step"
            )
        grid = row.grid(config, Steps(steps, size, sigmas, strength if in_grid else 1.0))
        rule, choices = row.rule(config, steps)
        if sampler in (None, rule):
            run = self._replace(sampler=rule, choices=tuple(sorted(choices.items())))
            if row.loop is not None:
                grid, loop = row.loop(config, grid, first)
                run = run._replace(loop=loop)
        else:
            if sampler not in SAMPLERS:
                raise ValueError(f"sampler {sampler!r} is unknown; there are {', '.join(sorted(SAMPLERS))}")
            run, grid = self._replace(sampler=sampler, choices=(), boundary=None), self._with_final_alpha(grid)
        if run.clip is not None:
            run = run._replace(clip=run.clip._replace(keep_eps=run.sampler == "ddim"))
        times, inputs = (values[first:].astype(np.float32) for values in grid)
        check_times(self.prediction, run.process, times[:-1])
        return times, run._replace(process=_with_inputs(run.process, times[:-1], inputs))

    def _with_final_alpha(self, grid: Grid) -> Grid:
        """The grid with the end that set_alpha_to_one says, where the file has it and times fall on a table."""
        times, table = grid.times, self.process.levels
        if self.alpha_to_one is None or table is None or times[0] <= times[-1]:
            return grid
        return grid._replace(times=np.append(times[:-1], 0.0 if self.alpha_to_one else min(1 / table, times[-2])))

    def noise_scale(self, t: float) -> float:
        """The factor of unit noise that makes the state at t = times[0]."""
        return float(self.process.sigma(jnp.float32(t))) if self.prior is None else self.prior

    def unfinished(self) -> "Schedule":
        """The schedule for the first part of a grid that another network continues: no step is the last one, none has lower order."""
        final = (("final", ()),) if "final" in inspect.signature(SAMPLERS[self.sampler]).parameters else ()
        return self._replace(choices=(*(c for c in self.choices if c[0] != "final"), *final))

    def method(self, **options: Any) -> Sampler:
        """The update rule; options (eta, ...) replace the file's. Raises ValueError for one that the rule does not have."""
        make = SAMPLERS[self.sampler]
        if unknown := sorted(set(options) - set(inspect.signature(make).parameters)):
            raise ValueError(f"sampler {self.sampler!r} has no option {unknown[0]!r}")
        sampler = make(**(dict(self.choices) | options))
        return sampler if self.loop is None else self.loop(sampler)

    def clipped(self, denoise: Denoiser) -> Denoiser:
        """The Denoiser with `parametrization`, `clip` and `boundary` applied to its clean estimate, in this order."""
        process, clip = self.process, self.clip
        if clip is None and self.parametrization is None and self.boundary is None:
            return denoise

        def published(x_t: Array, t: Array) -> Clean:
            t = jnp.asarray(t, x_t.dtype)
            clean = denoise(x_t, t)
            x = clean.x
            alpha, sigma = (per_row(f(t), x_t) for f in (process.alpha, process.sigma))
            if self.parametrization is not None:
                x = self.parametrization(process, x, x_t, t)
            if clip is not None:
                x = clip(x)
            if self.boundary is not None:
                x = self.boundary(process, x, x_t, t)
            if clip is not None and clip.keep_eps:
                return clean._replace(x=x)
            return clean._replace(x=x, eps=jnp.where(x == clean.x, clean.eps, (x_t - alpha * x) / sigma))

        return published


def _with_inputs(process: Process, times: np.ndarray, inputs: np.ndarray) -> Process:
    """The process whose time input is inputs[i] at times[i]; the process itself if it has these inputs to single precision."""
    present = np.asarray(process.time_input(jnp.asarray(times)))
    if np.abs(present - inputs).max() <= 3e-6 * max(np.abs(inputs).max(), 1):
        return process
    return _looking_up(process, tuple(times.tolist()), tuple(inputs.tolist()))


# A compiled program is bound to the process: equal times and inputs have to give the same one.
@functools.lru_cache(maxsize=128)
def _looking_up(process: Process, times: tuple[float, ...], inputs: tuple[float, ...]) -> Process:
    def time_input(t: Array) -> Array:
        t = P.as_time(t)
        distance = jnp.abs(t[..., None] - jnp.asarray(times, t.dtype))
        on_grid = jnp.min(distance, -1) < SAME_TIME
        return jnp.where(on_grid, jnp.asarray(inputs, t.dtype)[jnp.argmin(distance, -1)], process.time_input(t))

    return process._replace(time_input=time_input)


# ---- reading ----


def _read(source: str | pathlib.Path | Config) -> tuple[str, Config]:
    """(where the options come from, the options)."""
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
    """The Schedule of a scheduler_config.json: of the file, its folder, the folder of a pipeline, or the options themselves.

    Options of other classes in CLASSES are accepted and ignored, since published files carry them along; set_alpha_to_one is one that
    counts, see Schedule.at. Options of early versions of diffusers are read as today's (options.modern). To read a file as another
    class, as diffusers' from_config does, pass config | {"_class_name": ...}.

    Raises ValueError that names the class, the option and the value: for a class or an option that is unknown, and for a value that is
    not supported.
    """
    where, config = _read(source)
    name = config["_class_name"] if "_class_name" in config else None
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{where}: _class_name is {name!r}, expected one of {', '.join(CLASSES)}")
    row, stated = CLASSES[name], modern(name, config)
    config = read_options(
        name, stated, row.options, fixed=row.fixed, unused=OPTIONS - set(row.options) - set(row.fixed)
    )
    spacings = [key for key in LEVEL_SPACINGS if is_on(config, key)]
    if len(spacings) > 1:
        raise ValueError(f"{name}: {spacings[0]} and {spacings[1]} are both True, expected at most one of them")
    try:
        facts = row.facts(name, config)
        sampler, choices = row.rule(config, config["num_train_timesteps"])
    except ValueError:
        raise
    except Exception as error:  # text in the place of a number raises nearly any exception
        raise ValueError(f"{name}: an option is of another type than expected ({error})") from error
    return Schedule(
        name,
        tuple(sorted(config.items())),
        sampler=sampler,
        choices=tuple(sorted(choices.items())),
        alpha_to_one=stated["set_alpha_to_one"] if "set_alpha_to_one" in stated else None,
        stated=tuple(sorted((key, tuples(value)) for key, value in stated.items() if key in OPTIONS)),
        **facts._asdict(),
    )
