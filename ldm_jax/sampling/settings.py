"""How to draw, by names: sampler, grid, guidance, its schedule over time and its threshold; the tables of names and their checks.

METHODS, SCHEDULES and THRESHOLDS are plain dicts: a new method is one function of diffusion.guidance and one entry here, in NEUTRAL
too unless its neutral scale is 1.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

from ldm_jax.diffusion import guidance
from ldm_jax.diffusion.denoiser import Denoiser, Pair
from ldm_jax.diffusion.grids import GRIDS
from ldm_jax.diffusion.prediction import PREDICTIONS
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers import SAMPLERS

Options = tuple[tuple[str, Any], ...]


def _powered_cosine(
    scale: guidance.Scale, power: float, floor: float = -math.inf, neutral: float = 1.0
) -> Callable[[Array], Array]:
    return guidance.dynamic(scale, guidance.powered_cosine(power), floor, neutral)


# The guidances that need the conditional and the unconditional estimate and no more, each with its neutral scale: at this scale the
# result is the conditional estimate (for CFG++ the unconditional one).
NEUTRAL = {"cfg": 1.0, "cfg_pp": 0.0, "cfg_zero": 1.0, "apg": 1.0}
METHODS = {name: guidance.GUIDANCES[name] for name in NEUTRAL}
# At their neutral scale these are the conditional estimate exactly; the others act at that scale too: CFG++ keeps the unconditional
# noise, and CFG-Zero* begins with a step of zero velocity.
EXACT = ("cfg", "apg")
# Settings that some of the methods take as arguments of the same name.
SHARED = ("t_lo", "t_hi", "rescale")

# How the scale changes over time: (scale, neutral=, **options) -> scale.
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
    """How to draw, with the keys of config.sampler. The defaults are those of runs from before a key existed.

    name, options                        a sampler of SAMPLERS and its options
    steps, grid, grid_options            the number of steps, and a grid of GRIDS with its options
    guidance                             the scale; 1 is no guidance for cfg and apg
    t_lo, t_hi                           guidance acts at t_lo <= t <= t_hi alone
    rescale                              how far the spread of the guided estimate is pulled back, in [0, 1]
    guidance_method, guidance_options    a name of METHODS and its options
    guidance_schedule, schedule_options  a name of SCHEDULES and its options
    threshold, threshold_options         a name of THRESHOLDS and its options
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


def pairs(options: Mapping[str, Any]) -> Options:
    """Options as sorted pairs, which can be hashed."""
    return tuple(sorted(options.items()))


class Rule(NamedTuple):
    """A sampler by name, hashable: Rule(name, options)() is SAMPLERS[name](**options)."""

    name: str
    options: Options = ()

    def __call__(self) -> Any:
        return SAMPLERS[self.name](**dict(self.options))


class Guidance(NamedTuple):
    """The guidance of Settings, hashable: names and their options as pairs.

    rescale  a number: the spread of v = alpha eps - sigma x is pulled back by it, as the method does (Lin et al. 2023). None: the
             spread of what the network predicts is pulled back by Scales.rescale, as published pipelines do
    """

    method: str = "cfg"
    options: Options = ()
    schedule: str = "constant"
    schedule_options: Options = ()
    threshold: str = "none"
    threshold_options: Options = ()
    t_lo: float = 0.0
    t_hi: float = 1.0
    rescale: float | None = 0.0


def guidance_of(settings: Settings) -> Guidance:
    """The guidance of these settings."""
    s = settings
    return Guidance(
        s.guidance_method,
        pairs(s.guidance_options),
        s.guidance_schedule,
        pairs(s.schedule_options),
        s.threshold,
        pairs(s.threshold_options),
        s.t_lo,
        s.t_hi,
        s.rescale,
    )


def is_guided(settings: Settings) -> bool:
    """Whether the unconditional estimate is needed: not for cfg and apg at scale 1."""
    off = settings.guidance == 1.0 and settings.guidance_schedule == "constant"
    return not (off and settings.guidance_method in EXACT)


def scheduled(how: Guidance, scale: guidance.Scale) -> guidance.Scale:
    """The scale, a number or a traced scalar, as its schedule changes it over time."""
    return SCHEDULES[how.schedule](scale, neutral=NEUTRAL.get(how.method, 1.0), **dict(how.schedule_options))


def guide(how: Guidance, pair: Pair, scale: guidance.Scale, process: Process | None, prediction: str) -> Denoiser:
    """The guided estimate, before its threshold. pair(x_t, t) -> (Clean under the condition, Clean without); scale may be traced.

    CFG-Zero* works on the velocity that the network predicts (flow, v), or on the flow's where it predicts none.
    """
    method = METHODS[how.method]
    arguments = {"t_lo": how.t_lo, "t_hi": how.t_hi, "rescale": how.rescale or 0.0, "process": process}
    arguments["kind"] = prediction if prediction in ("flow", "v") else "flow"
    takes = inspect.signature(method).parameters
    arguments = {key: value for key, value in arguments.items() if key in takes}
    return method(pair, scheduled(how, scale), **(arguments | dict(how.options)))


def thresholded(how: Guidance, denoise: Denoiser, process: Process | None) -> Denoiser:
    """The estimate with the threshold of this guidance."""
    return THRESHOLDS[how.threshold](denoise, process, **dict(how.threshold_options))


def check_named(
    kind: str, name: str, table: Mapping[str, Callable], options: Mapping[str, Any], arguments: tuple[str, ...] = ()
) -> None:
    """Raise ValueError unless table[name] takes just these options; `arguments` are its parameters that are no options."""
    if name not in table:
        raise ValueError(f"{kind} {name!r} is unknown; there are {', '.join(sorted(table))}")
    takes = {key: p.default for key, p in inspect.signature(table[name]).parameters.items() if key not in arguments}
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
    """Raise ValueError that names the setting that is wrong, and what is possible."""
    s = settings
    check_sampler(s.name, s.options)
    check_named("grid", s.grid, GRIDS, s.grid_options, ("process", "n"))
    if s.steps < 1:
        raise ValueError(f"steps is {s.steps}; expected at least 1")
    check_guidance(s)


def check_sampler(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a sampler that is unknown, or has no such option or value."""
    check_named("sampler", name, SAMPLERS, options)
    # Building costs nothing, and says which value is out of range before anything is restored or written.
    SAMPLERS[name](**options)


def check_guidance(settings: Settings) -> None:
    """Raise ValueError for what is wrong with the guidance of these settings, its schedule, its interval or its threshold."""
    s = settings
    check_named(
        "guidance method", s.guidance_method, METHODS, s.guidance_options, ("pair", "scale", "process", *SHARED)
    )
    check_named("guidance schedule", s.guidance_schedule, SCHEDULES, s.schedule_options, ("scale", "neutral", "shape"))
    check_named("threshold", s.threshold, THRESHOLDS, s.threshold_options, ("denoise", "process"))
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
    named = guidance_of(s)
    thresholded(named, guide(named, None, s.guidance, None, kind), None)


def check_fit(settings: Settings, channels: int, conditional: bool, bounded: bool) -> None:
    """Raise ValueError for settings that are right by themselves, but do not fit a model of so many channels.

    conditional: whether the model is conditioned on anything; bounded: whether it models pixels, in a known range.
    """
    s, guided = settings, settings.guidance_options.get("channels")
    # The other methods act at scale 1 too: CFG++ keeps the unconditional noise, CFG-Zero* begins with a step of zero velocity.
    if s.guidance_method != "cfg" and not conditional:
        raise ValueError(
            f"guidance method {s.guidance_method!r} needs a condition, and this model is conditioned on nothing"
        )
    if isinstance(guided, int) and guided > channels:
        raise ValueError(f"guidance on {guided} channels; the model has {channels}")
    if s.threshold != "none" and not bounded:
        raise ValueError(
            f"threshold {s.threshold!r} keeps pixels in [-1, 1]; this model draws latents, whose range is not known: expected 'none'"
        )
