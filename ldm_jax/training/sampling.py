"""Noise backwards, as one function that compiles once: keys -> x_T -> one lax.scan over the grid -> decode -> images.

Image i depends on the parameters, the settings, the seed and i alone: its noise comes from fold_in(key(seed), i), so neither the
batch it is drawn in nor the number of devices changes it.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.denoiser import make_denoiser, make_pair
from ldm_jax.diffusion.grids import GRIDS
from ldm_jax.diffusion.guidance import cfg
from ldm_jax.diffusion.process import Process, prior_std
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.training import conditioning as conditions
from ldm_jax.training import first_stage as stages


class Settings(NamedTuple):
    """How to draw: a name in SAMPLERS, steps on a grid in GRIDS, guidance (1: none) on t_lo <= t <= t_hi, its rescale; what
    the sampler's and the grid's functions take besides.
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


class Model(NamedTuple):
    """Everything that turns noise into images, but for the parameters."""

    denoiser: Any
    conditioning: conditions.Conditioning
    stage: stages.FirstStage | None
    process: Process
    prediction: str
    shape: tuple[int, int, int]
    learned_variance: bool = False


def check(settings: Settings) -> None:
    """Raise ValueError naming the setting that is off, and what there is."""
    for kind, name, known in (("sampler", settings.name, SAMPLERS), ("grid", settings.grid, GRIDS)):
        if name not in known:
            raise ValueError(f"{kind} {name!r} is unknown; there are {', '.join(sorted(known))}")
    for kind, function, options in (
        (f"sampler {settings.name!r}", SAMPLERS[settings.name], settings.options),
        (f"grid {settings.grid!r}", GRIDS[settings.grid], settings.grid_options),
    ):
        unknown = sorted(set(options) - set(inspect.signature(function).parameters))
        if unknown:
            raise ValueError(f"{kind} has no option {unknown[0]!r}")
    if settings.steps < 1:
        raise ValueError(f"steps is {settings.steps}; expected at least 1")
    if not 0 <= settings.t_lo < settings.t_hi <= 1:
        raise ValueError(f"guidance interval {settings.t_lo}..{settings.t_hi}: expected 0 <= t_lo < t_hi <= 1")


def evaluations(settings: Settings) -> float:
    """Calls of the denoiser an image, as the sampler states them (a last step into clean data may save one)."""
    return SAMPLERS[settings.name](**settings.options).evaluations * settings.steps


def image_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """key[N]: one for each image index."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(indices, jnp.uint32))


def make_times(model: Model, settings: Settings) -> jax.Array:
    """Grid f32[steps + 1]; an argument of the compiled function, so that it may change without a compilation."""
    grid = GRIDS[settings.grid](model.process, settings.steps, **settings.grid_options)
    return jnp.asarray(grid, jnp.float32)


Generate = Callable[[Any, Any, jax.Array, dict[str, jax.Array], jax.Array, jax.Array], jax.Array]


def make_generate(model: Model, settings: Settings) -> Generate:
    """generate(params, frozen, keys key[B], told {'label', 'tokens'}, times, scale f32[]) -> images f32[B, H, W, 3], near [-1, 1]."""
    check(settings)
    sampler = SAMPLERS[settings.name](**settings.options)
    # Most grids of VP, VE and EDM end where noise is left; those of flow at clean data.
    noisy_end = float(model.process.sigma(jnp.float32(model.process.t_min))) > 0
    guided = settings.guidance != 1.0 and conditions.conditional(model.conditioning)

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
            denoise = cfg(pair, scale, settings.t_lo, settings.t_hi, settings.rescale)
        else:
            denoise = make_denoiser(apply, weights, model.process, model.prediction, cond, **learned)
        x = sample(sampler, denoise, model.process, x_T, times, step_keys)
        if noisy_end:
            left = model.process.sigma(times[-1]) > 0
            x = jax.lax.cond(left, lambda x: denoise(x, times[-1]).x, lambda x: x, x)
        return stages.to_image(model.stage, frozen, x)

    return generate
