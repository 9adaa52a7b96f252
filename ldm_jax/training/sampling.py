"""Noise backwards, as one function that compiles once: keys -> x_T -> one lax.scan over the grid -> decode -> images.

Image i depends on the parameters, the settings, the seed and i alone: its noise comes from fold_in(key(seed), i), so neither the
batch it is drawn in nor the number of devices changes it.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import guidance, seeds
from ldm_jax.diffusion.denoiser import Denoiser, Pair, make_denoiser, make_pair
from ldm_jax.diffusion.grids import GRIDS
from ldm_jax.diffusion.prediction import PREDICTIONS, check_times
from ldm_jax.diffusion.process import Process, prior_std
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.training import conditioning as conditions
from ldm_jax.training import first_stage as stages


def _powered_cosine(
    scale: guidance.Scale, power: float, floor: float = -math.inf, neutral: float = 1.0
) -> Callable[[jax.Array], jax.Array]:
    return guidance.dynamic(scale, guidance.powered_cosine(power), floor, neutral)


# The guidances that need no more than the conditional and the unconditional estimate, each with the scale that adds nothing
# to its base: the conditional one, but for CFG++ the unconditional.
NEUTRAL = {"cfg": 1.0, "cfg_pp": 0.0, "cfg_zero": 1.0, "apg": 1.0}
METHODS = {name: guidance.GUIDANCES[name] for name in NEUTRAL}
# What those of them that know of it take from the settings of the same name.
SHARED = ("t_lo", "t_hi", "rescale")

# How the scale goes over time: (scale, neutral=, **options) -> scale.
SCHEDULES = {
    "constant": lambda scale, neutral: scale,
    **{name: functools.partial(guidance.dynamic, shape=name) for name in guidance.SHAPES},
    "powered_cosine": _powered_cosine,
}

# What is done to the estimate after guidance, for data in a known range (pixels): (denoise, process, **options) -> denoise.
THRESHOLDS = {
    "none": lambda denoise, process: denoise,
    "static": guidance.static_threshold,
    "dynamic": guidance.dynamic_threshold,
}


class Settings(NamedTuple):
    """How to draw: a name in SAMPLERS, steps on a grid in GRIDS, the scale of guidance (1: none, for cfg and apg) on
    t_lo <= t <= t_hi, its rescale, its name in METHODS, in SCHEDULES and in THRESHOLDS; what the functions of these names take besides.

    The keys of config.sampler, with the defaults that a run had before there was such a key.
    """

    name: str = "heun"
    steps: int = 25
    grid: str = "uniform"
    guidance: float = 1.0
    t_lo: float = 0.0
    t_hi: float = 1.0
    rescale: float = 0.0
    options: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    grid_options: dict[str, Any] = {}  # noqa: RUF012
    guidance_method: str = "cfg"
    guidance_options: dict[str, Any] = {}  # noqa: RUF012
    guidance_schedule: str = "constant"
    schedule_options: dict[str, Any] = {}  # noqa: RUF012
    threshold: str = "none"
    threshold_options: dict[str, Any] = {}  # noqa: RUF012


class Model(NamedTuple):
    """Everything that turns noise into images, but for the parameters."""

    denoiser: Any
    conditioning: conditions.Conditioning
    stage: stages.FirstStage | None
    process: Process
    prediction: str
    shape: tuple[int, int, int]
    learned_variance: bool = False


def _check_named(
    kind: str, name: str, known: dict[str, Callable], options: dict[str, Any], given: tuple[str, ...]
) -> None:
    """Raise ValueError unless known[name] takes just these options, `given` being arguments that are none."""
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown; there are {', '.join(sorted(known))}")
    takes = {key: p.default for key, p in inspect.signature(known[name]).parameters.items() if key not in given}
    required = {key for key, default in takes.items() if default is inspect.Parameter.empty}
    for key, value in options.items():
        if key not in takes:
            raise ValueError(f"{kind} {name!r} has no option {key!r}; it has {', '.join(takes) or 'none'}")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{kind} {name!r}: {key} is {value}; expected a number")
        numeric = isinstance(takes[key], int | float) and not isinstance(takes[key], bool)
        if (numeric or key in required) and isinstance(value, str | bool):
            raise ValueError(f"{kind} {name!r}: {key} is {value!r}; expected a number")
    for key in sorted(required - set(options)):
        raise ValueError(f"{kind} {name!r} needs its option {key!r}")


def check(settings: Settings) -> None:
    """Raise ValueError naming the setting that is off, and what there is."""
    s = settings
    _check_named("sampler", s.name, SAMPLERS, s.options, ())
    _check_named("grid", s.grid, GRIDS, s.grid_options, ("process", "n"))
    own = ("pair", "scale", "process", *SHARED)
    _check_named("guidance method", s.guidance_method, METHODS, s.guidance_options, own)
    own = ("scale", "neutral", "shape")
    _check_named("guidance schedule", s.guidance_schedule, SCHEDULES, s.schedule_options, own)
    _check_named("threshold", s.threshold, THRESHOLDS, s.threshold_options, ("denoise", "process"))
    if s.steps < 1:
        raise ValueError(f"steps is {s.steps}; expected at least 1")
    if not 0 <= s.t_lo < s.t_hi <= 1:
        raise ValueError(f"guidance interval {s.t_lo}..{s.t_hi}: expected 0 <= t_lo < t_hi <= 1")
    guidance.check_scale("guidance", s.guidance)
    guidance.check_rescale("rescale", s.rescale)
    takes = inspect.signature(METHODS[s.guidance_method]).parameters
    for key in SHARED:
        value, default = getattr(s, key), Settings._field_defaults[key]
        if key not in takes and value != default:
            raise ValueError(f"guidance method {s.guidance_method!r} has no {key}: it is {value}, expected {default}")
    kind = s.guidance_options.get("kind", "flow")
    if kind not in PREDICTIONS:
        raise ValueError(f"guidance method {s.guidance_method!r}: kind is {kind!r}; there are {', '.join(PREDICTIONS)}")
    # Building is free, and says which value is out of range before anything is restored or written.
    SAMPLERS[s.name](**s.options)
    THRESHOLDS[s.threshold](guide(s, None, s.guidance, None, kind), None, **s.threshold_options)


def check_model(model: Model, settings: Settings) -> None:
    """Raise ValueError for settings that are sound, but do not fit this model."""
    s, channels = settings, settings.guidance_options.get("channels")
    # The other methods act at scale 1 too: CFG++ keeps the unconditional noise, CFG-Zero* begins with a step that stands still.
    if s.guidance_method != "cfg" and not conditions.conditional(model.conditioning):
        raise ValueError(f"guidance method {s.guidance_method!r} needs a condition, and this model is told nothing")
    if isinstance(channels, int) and channels > model.shape[-1]:
        raise ValueError(f"guidance on {channels} channels; the model has {model.shape[-1]}")
    if s.threshold != "none" and model.stage is not None:
        raise ValueError(
            f"threshold {s.threshold!r} keeps pixels in [-1, 1]; this model draws latents, whose range is not known: expected 'none'"
        )
    check_times(model.prediction, model.process, make_times(model, s)[:-1])


def guide(settings: Settings, pair: Pair, scale: guidance.Scale, process: Process, prediction: str) -> Denoiser:
    """The guidance of `settings`, before its threshold. pair(x_t, t) -> (Clean told, Clean told nothing); scale may be traced.

    CFG-Zero* works on the network's own velocity where it predicts one (flow, v), else on the flow's.
    """
    method = METHODS[settings.guidance_method]
    scale = SCHEDULES[settings.guidance_schedule](
        scale, neutral=NEUTRAL[settings.guidance_method], **settings.schedule_options
    )
    given = {key: getattr(settings, key) for key in SHARED}
    given |= {"process": process, "kind": prediction if prediction in ("flow", "v") else "flow"}
    takes = inspect.signature(method).parameters
    given = {key: value for key, value in given.items() if key in takes}
    return method(pair, scale, **(given | settings.guidance_options))


def evaluations(settings: Settings) -> float:
    """Calls of the denoiser an image, as the sampler states them (a last step into clean data may save one)."""
    return SAMPLERS[settings.name](**settings.options).evaluations * settings.steps


def image_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """key[N]: one for each image index, of a seed from 0 to 2**64 - 1."""
    return jax.vmap(lambda i: jax.random.fold_in(seeds.key(seed), i))(jnp.asarray(indices, jnp.uint32))


def make_times(model: Model, settings: Settings) -> jax.Array:
    """Grid f32[steps + 1]; an argument of the compiled function, so that it may change without a compilation."""
    grid = GRIDS[settings.grid](model.process, settings.steps, **settings.grid_options)
    return jnp.asarray(grid, jnp.float32)


Generate = Callable[[Any, Any, jax.Array, dict[str, jax.Array], jax.Array, jax.Array], jax.Array]


def make_generate(model: Model, settings: Settings) -> Generate:
    """generate(params, frozen, keys key[B], told {'label', 'tokens'}, times, scale f32[]) -> images f32[B, H, W, 3], near [-1, 1].

    scale is that of the guidance, settings.guidance or any other. It is ignored where nothing is guided: the model is told
    nothing, or cfg or apg is set to a guidance of 1 on the constant schedule, which compiles the conditional estimate alone.
    Raises ValueError as `check` and `check_model`.
    """
    check(settings)
    check_model(model, settings)
    sampler = SAMPLERS[settings.name](**settings.options)
    # Most grids of VP, VE and EDM end where noise is left; those of flow at clean data.
    noisy_end = float(model.process.sigma(jnp.float32(model.process.t_min))) > 0
    conditional = conditions.conditional(model.conditioning)
    off = settings.guidance == 1.0 and settings.guidance_schedule == "constant"
    guided = conditional and not (off and settings.guidance_method in ("cfg", "apg"))

    learned = {"learned_variance": model.learned_variance}

    def apply(params, x, t, cond):
        return model.denoiser.apply({"params": params}, x, t, cond)

    def generate(params, frozen, keys, told, times, scale):
        noise_keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys)
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys)
        noise = jax.vmap(lambda k: jax.random.normal(k, model.shape))(noise_keys)
        x_T = prior_std(model.process, times[0]) * noise
        cond = conditions.condition(model.conditioning, params, told)
        weights = params["denoiser"]
        if guided:
            uncond = conditions.nothing(model.conditioning, params, len(keys))
            pair = make_pair(apply, weights, model.process, model.prediction, cond, uncond, **learned)
            denoise = guide(settings, pair, scale, model.process, model.prediction)
        else:
            denoise = make_denoiser(apply, weights, model.process, model.prediction, cond, **learned)
        denoise = THRESHOLDS[settings.threshold](denoise, model.process, **settings.threshold_options)
        x = sample(sampler, denoise, model.process, x_T, times, step_keys)
        if noisy_end:
            left = model.process.sigma(times[-1]) > 0
            x = jax.lax.cond(left, lambda x: denoise(x, times[-1]).x, lambda x: x, x)
        return stages.to_image(model.stage, frozen, x)

    return generate
