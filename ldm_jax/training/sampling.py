"""The model of a diffusion run, and the function that draws its images: it is traced, and compiles once for any number of them.

    keys -> x_T = prior_std noise -> sampling.backwards -> the first stage's decoder -> images near [-1, 1]

Image i depends on the parameters, the settings, the seed and i alone (sampling.keys). ldm_jax/sampling/ holds what runs and published
pipelines share; here lies what a run alone has: the text encoder that is trained with the denoiser, the whitened latents of its
first stage, and a last denoising where a grid ends with noise left.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.grids import GRIDS
from ldm_jax.diffusion.prediction import check_times
from ldm_jax.diffusion.process import Process, prior_std
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.sampling import keys as item_keys
from ldm_jax.sampling import model as core
from ldm_jax.sampling.backwards import Scales, backwards
from ldm_jax.sampling.settings import (
    EXACT,
    METHODS,
    NEUTRAL,
    SCHEDULES,
    SHARED,
    THRESHOLDS,
    Rule,
    Settings,
    check,
    check_fit,
    guidance_of,
    is_guided,
    pairs,
)
from ldm_jax.training import conditioning as conditions
from ldm_jax.training import first_stage as stages

__all__ = ["EXACT", "METHODS", "NEUTRAL", "SCHEDULES", "SHARED", "THRESHOLDS", "Model", "Settings", "check"]


class Model(NamedTuple):
    """Everything that turns noise into images, but for the parameters.

    denoiser, conditioning, stage  the network, what it is conditioned on, and the first stage (None: pixels)
    shape                          of one x, of any rank: (h, w, C) of pixels or latents
    data                           the space of the data, before the first stage
    classifier                     what guides besides (classifier_guidance.Transform), whose parameters lie under its name
    """

    denoiser: Any
    conditioning: conditions.Conditioning
    stage: stages.FirstStage | None
    process: Process
    prediction: str
    shape: tuple[int, ...]
    learned_variance: bool = False
    data: core.Space = stages.IMAGES
    classifier: Any = None


def network(model: Model) -> core.Model:
    """The model as sampling/ takes it; its parameters are those of the run, in which the denoiser's lie under its name."""
    apply = core.Network(model.denoiser, "denoiser")
    transforms = () if model.classifier is None else (model.classifier,)
    return core.Model(apply, model.process, model.prediction, space(model), model.learned_variance, transforms)


def classes(model: Model) -> int:
    """How many classes images are drawn for: those of the denoiser, or of the classifier that guides one without classes; 0: none."""
    guide = model.classifier
    return model.conditioning.num_classes or (0 if guide is None else guide.module.num_classes)


def init(model: Model, key: jax.Array, params: dict[str, Any]) -> Any:
    """Fresh parameters of the denoiser, beside those of its conditions in `params`."""

    def of_row(frozen: Any) -> core.Cond:
        return conditions.encode(model.conditioning, params, frozen, conditions.nothing(model.conditioning, 1))

    # By shapes alone: what a row without conditions looks like is no business of fresh parameters.
    shapes = jax.eval_shape(of_row, frozen(model))
    x, cond = core.joined(jnp.zeros((1, *model.shape)), jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
    return model.denoiser.init(key, x, jnp.zeros(1), cond)["params"]


def space(model: Model) -> core.Space:
    """What the run models: pixels, or the whitened latents of its first stage, whose parameters are `first_stage.frozen`."""
    stage = model.stage
    if stage is None:
        return model.data._replace(shape=model.shape)

    def encode(frozen: Any, images: jax.Array) -> jax.Array:
        # The mean of the posterior: its spread is far below the noise of any step.
        return stages.encode(stage, frozen, images)

    def decode(frozen: Any, x: jax.Array) -> jax.Array:
        return stages.to_image(stage, frozen, x)

    return model.data._replace(shape=model.shape, encode=encode, decode=decode, bounded=False)


def check_model(model: Model, settings: Settings) -> None:
    """Raise ValueError for settings that are right by themselves, but do not fit this model."""
    check_fit(settings, model.shape[-1], conditions.conditional(model.conditioning), space(model).bounded)
    check_times(model.prediction, model.process, make_times(model, settings)[:-1])


def frozen(model: Model, preview: stages.FirstStage | None = None) -> dict[str, Any]:
    """The parameters that compiled functions are handed and nobody trains: of the first stage, of the conditions, of the preview."""
    result = stages.frozen(model.stage) | conditions.frozen(model.conditioning)
    return result | ({} if preview is None else {"preview": stages.frozen(preview)})


def evaluations(settings: Settings) -> float:
    """Calls of the denoiser for one image, as the sampler states them (a last step into clean data may save one)."""
    return SAMPLERS[settings.name](**settings.options).evaluations * settings.steps


def make_times(model: Model, settings: Settings) -> jax.Array:
    """Grid f32[steps + 1]; an argument of the compiled function, so that it may change without a compilation."""
    grid = GRIDS[settings.grid](model.process, settings.steps, **settings.grid_options)
    return jnp.asarray(grid, jnp.float32)


def ends_in_noise(process: Process) -> bool:
    """Whether grids of this process end where noise is left: most grids of VP, VE and EDM do, those of flow end at clean data."""
    return float(process.sigma(jnp.float32(process.t_min))) > 0


Generate = Callable[[Any, Any, jax.Array, dict[str, jax.Array], jax.Array, jax.Array], jax.Array]


def make_generate(model: Model, settings: Settings, preview: stages.FirstStage | None = None) -> Generate:
    """generate(params, frozen, keys key[B], batch, times, scale f32[]) -> images f32[B, H, W, 3], near [-1, 1].

    frozen: those of the first stage and of the conditions; batch: what the conditions read, 'label' and 'tokens' or more. preview: an
    autoencoder, with its parameters in frozen['preview'], that decodes in the place of the first stage.

    scale is that of the guidance, settings.guidance or any other. It is ignored where nothing is guided: no condition may be dropped,
    or cfg or apg is set to a guidance of 1 on the constant schedule, which compiles the conditional estimate alone.
    Raises ValueError as `check` and `check_model`.
    """
    check(settings)
    check_model(model, settings)
    last, takes = ends_in_noise(model.process), model.conditioning
    guided = conditions.conditional(takes) and is_guided(settings)
    decode = network(model if preview is None else model._replace(stage=preview)).space.decode
    drawn, rule, guidance = network(model), Rule(settings.name, pairs(settings.options)), guidance_of(settings)

    def generate(params, frozen, keys, batch, times, scale):
        x_T = prior_std(model.process, times[0]) * item_keys.noise(keys, model.shape)
        values = conditions.read(takes, frozen, batch, keys, drawing=True)
        conds = [conditions.encode(takes, params, frozen, values)]
        if model.classifier is not None:
            conds[0] |= {"target": batch["label"]}
        if guided:
            conds.append(conditions.encode(takes, params, frozen, conditions.away(takes, values)))
        x = backwards(
            drawn, guidance, rule(), params, x_T, times, item_keys.step_keys(keys), conds, Scales(scale), last=last
        )
        return decode(frozen if preview is None else frozen["preview"], x)

    return generate


image_keys = item_keys.image_keys
