"""A diffusion run as something that pipelines draw from: everything that `ldm generate` does for published models, it does for runs.

Its conditions are those of training/conditions, of words, classes and pictures; its space is that of its first stage, or pixels; its
course is its process with a grid by name. The same seed and settings draw what `ldm sample` draws.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.data import tokenize
from ldm_jax.diffusion.prediction import check_times
from ldm_jax.diffusion.process import prior_std
from ldm_jax.models.autoencoder_kl import Posterior
from ldm_jax.pipelines import Pipeline
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.drawable import Asked, Course, Frame, Takes
from ldm_jax.pipelines.kinds import Kind
from ldm_jax.sampling.model import Space
from ldm_jax.sampling.settings import Rule, Settings, check, is_guided, pairs
from ldm_jax.training import conditioning as conditions
from ldm_jax.training import sampling
from ldm_jax.training.restore import Restored

UNDROPPED = "no condition of this run was ever dropped, so that there is nothing to guide away from"


def tiled(module: nn.Module, tile: int) -> tuple[Callable[[Any, Array], Array], Callable[[Any, Array], Array]]:
    """(encode, decode) of a space of whitened latents, through the first stage in tiles of `tile` pixels."""
    functions = L.TILED[type(module)]

    def encode(frozen: Any, images: Array) -> Array:
        out = functions.tiled_encode(module, frozen["autoencoder"], images, tile)
        z = (out.mean if isinstance(out, Posterior) else out).astype(jnp.float32)
        return (z - frozen["mean"]) / frozen["std"]

    def decode(frozen: Any, x: Array) -> Array:
        return functions.tiled_decode(module, frozen["autoencoder"], x * frozen["std"] + frozen["mean"], tile)

    return encode, decode


def hashable(module: nn.Module) -> nn.Module:
    """The module with tuples in place of lists, which a config from JSON has: compiled programs are stored under it."""
    lists = {key: tuple(value) for key, value in vars(module).items() if isinstance(value, list)}
    return module.clone(**lists) if lists else module


def space_of(model: sampling.Model, tile: int | None) -> Space:
    """What the run models, its first stage in tiles of `tile` pixels. ValueError for a first stage that has no tiles."""
    space, stage = sampling.space(model), model.stage
    if tile is not None:
        what = "in pixels" if stage is None else f"with a {type(stage.network).__name__}"
        L.check_tile(tile, None if stage is None else stage.network, f"a run {what}")
        encode, decode = tiled(stage.network, tile)
        space = space._replace(encode=encode, decode=decode)
    return space._replace(encode=jax.jit(space.encode), decode=jax.jit(space.decode))


def frame_of(run: Restored) -> Frame:
    """The sizes of the run's images: pictures are scaled to its resolution unless another size is asked for."""
    module, shape = run.model.denoiser, run.model.shape
    factor = run.experiment.input.resolution // shape[0]
    halves = module.patch_size if hasattr(module, "patch_size") else getattr(module, "multiple", 1)
    learned = getattr(module, "pos_embed", "sincos") == "learned"
    fixed = "its network has learned positions, of the size that it was trained at" if learned else None
    return Frame(factor, factor * halves, shape[:2], shape[-1], fixed, resizes=True)


def course(
    model: sampling.Model,
    space: Space,
    settings: Settings,
    size: tuple[int, int],
    *,
    strength: float = 1.0,
    start: float | None = None,
    end: float = 1.0,
    distilled: bool = False,
) -> Course:
    """The grid of the settings, or its last int(strength steps) steps. Raises ValueError for what does not fit."""
    if start is not None or end != 1:
        raise ValueError("start and end go with pipelines that hand over to one another; a run draws the whole way")
    check(settings)
    steps = settings.steps
    first = steps - min(int(steps * strength), steps)
    if not 0 < strength <= 1 or first == steps:
        raise ValueError(
            f"strength {strength} of {steps} steps runs none; expected a number in (0, 1], and at least one step"
        )
    times = np.asarray(sampling.make_times(model, settings))[first:]
    check_times(model.prediction, model.process, times[:-1])
    return Course(
        times,
        sampling.network(model)._replace(space=space),
        Rule(settings.name, pairs(settings.options)),
        prior_std(model.process, times[0]),
        sampling.ends_in_noise(model.process),
    )


def pipeline(run: Restored, name: str, *, offload: bool = False, tile: int | None = None) -> Pipeline:
    """The run, called `name` in messages, with the ways of drawing as methods.

    offload  keep the parameters in the host's memory, and on the device while they are used
    tile     encode and decode pictures in tiles of so many pixels

    Raises ValueError for a first stage that has no tiles.
    """
    model = run.model._replace(denoiser=hashable(run.model.denoiser))
    if model.classifier is not None:
        model = model._replace(classifier=model.classifier._replace(module=hashable(model.classifier.module)))
    conditioning, classes = model.conditioning, sampling.classes(model)
    tokenizer, text = run.experiment.tokenizer, "prompts" in conditioning.takes
    if model.data.entry != "image":
        raise ValueError(f"{name} models {model.data.entry} of shape {model.shape}; pipelines draw images")
    if unknown := sorted(conditioning.needs - {"label", "tokens", "image"}):
        raise ValueError(f"{name} is conditioned on {unknown[0]!r} of its data; `ldm sample` reads it from there")
    space, conditional = space_of(model, tile), conditions.conditional(conditioning)
    settings = run.experiment.sampler
    trained = [c.name for c in conditioning.conditions if c.init is not None]
    labels_drop = all(c.drop != 0.0 for c in conditioning.conditions if "labels" in c.takes)
    params, frozen = (run.params, run.frozen) if offload else jax.device_put((run.params, run.frozen))

    @functools.partial(jax.jit, static_argnums=3)
    def encode(params: Any, frozen: Any, batch: dict[str, Array], absent: tuple[str, ...]) -> dict[str, Array]:
        rows = len(next(iter(batch.values()))) if batch else 1
        values = conditions.read(conditioning, frozen, batch, jax.random.split(jax.random.key(0), rows), drawing=True)
        if absent:
            nulls = conditions.away(conditioning, values)
            values |= {name: nulls[name] for name in absent}
        return conditions.encode(conditioning, params, frozen, values)

    @functools.cache
    def warn(prompts: tuple[str, ...]) -> None:
        for line in tokenize.lost(tokenizer, prompts, seconds=5):
            warnings.warn(line, stacklevel=2)

    def condition(asked: Asked) -> dict[str, Array]:
        batch = {}
        if conditioning.num_classes:
            batch["label"] = jnp.asarray(asked.labels)
        if text and asked.prompts is None:
            batch["tokens"] = np.tile(tokenizer.encode(""), (asked.count, 1))
        elif text:
            warn(tuple(dict.fromkeys(asked.prompts)))
            batch["tokens"] = np.stack([tokenizer.encode(prompt) for prompt in asked.prompts])
        if "image" in conditioning.needs:
            batch["image"] = jnp.asarray(2 * asked.images - 1)
        if "mask" in conditioning.takes:
            batch["mask"] = jnp.asarray(asked.masks)
        # Negative prompts stand in the place of the null.
        absent = [c for c in conditioning.conditions if asked.away and c.drop != 0.0]
        absent = tuple(c.name for c in absent if asked.prompts is None or "prompts" not in c.takes)
        cond = encode({name: params[name] for name in trained}, frozen, batch, absent)
        return cond if model.classifier is None or asked.away else cond | {"target": jnp.asarray(asked.labels)}

    return Pipeline(
        name=name,
        kind=Kind(text, settings.steps, settings.guidance),
        takes=Takes(
            text,
            classes or None,
            classes if conditional and labels_drop else None,
            image="image" in conditioning.takes,
            mask="mask" in conditioning.takes,
            reduces=max((c.reduces for c in conditioning.conditions), default=1),
        ),
        frame=frame_of(run),
        params=params,
        space=space,
        space_params={key: value for key, value in frozen.items() if key not in conditioning.names},
        condition=condition,
        embed_scale=lambda guidance, count: {},
        course=lambda settings, size, **span: course(model, space, settings, size, **span),
        guided=lambda settings: conditional and is_guided(settings),
        unguided="1 means unguided"
        if conditional
        else UNDROPPED
        if conditioning.conditions
        else "this run is conditioned on nothing",
        defaults=settings,
        sampler=settings.name,
        rescales="v",
        class_names=dict(enumerate(run.dataset["class_names"])),
        offload=offload,
        parts=run,
    )
