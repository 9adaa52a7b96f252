"""Pictures from prompts: Stable Diffusion 1, 2 and XL, latent consistency models (Rombach et al. 2022; Podell et al. 2023).

SDXL's base hands over to its refiner at a fraction of the way: `end` stops the one, `start` of image_to_image begins the other, both at
the first step whose network time is below round(N - fraction N), of N training steps.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.editing import slerp
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines import loop
from ldm_jax.pipelines.components import Parts, latent_size, on_device
from ldm_jax.pipelines.conditions import OWN_SIZES, Sizes, conditions, guidance_embedding
from ldm_jax.pipelines.prompts import texts
from ldm_jax.schedules import Schedule

Prompts = str | Sequence[str]
Size = tuple[int, int] | None


def tell(
    parts: Parts,
    prompts: Sequence[str],
    negative: Prompts | None,
    guidance: float,
    size: tuple[int, int],
    sizes: Sizes = OWN_SIZES,
    clip_skip: int = 0,
) -> list[dict[str, Array]]:
    """The loop's conditions for N prompts: these alone, or these and what they are guided away from.

    A network that is told its guidance scale is not guided besides, and a scale of at most 1 means unguided: as the published
    pipelines have it, whose distilled kin (Turbo) are drawn from with 0.
    """
    embedded = guidance_embedding(parts, guidance, len(prompts))
    cond = conditions(parts, prompts, size, sizes, clip_skip=clip_skip) | embedded
    if embedded or guidance <= 1:
        return [cond]
    away = None if negative is None else texts("negative", negative, len(prompts))
    return [cond, conditions(parts, away, size, sizes, negative=True, count=len(prompts), clip_skip=clip_skip)]


def fits(parts: Parts, *beside: int) -> int:
    """How many channels the denoiser is told besides a latent's. ValueError unless it is one of these, and takes prompts."""
    if not parts.text:
        raise ValueError(f"{parts.name} takes no prompt")
    extra = parts.denoiser.module.in_channels - channels(parts)
    if extra not in beside:
        raise ValueError(
            f"{parts.name}: its network is told {extra} channels besides a latent's, expected "
            f"{' or '.join(map(str, beside))} here; inpaint gives it a mask, edit a picture, image_to_image a depth"
        )
    return extra


def channels(parts: Parts) -> int:
    """Channels of a latent, which are the first of the denoiser's input."""
    if parts.autoencoder is None:
        return parts.denoiser.module.in_channels
    return parts.autoencoder.module.latent_channels


def shape_of(parts: Parts, size: Size) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """((h, w, C) of a latent, (H, W) of its picture)."""
    scale = 1 if parts.autoencoder is None else L.factor(parts.autoencoder.module)
    h, w = latent_size(parts, size, scale)
    return (h, w, channels(parts)), (h * scale, w * scale)


def count_of(prompts: Prompts, images: Any, num: int | None) -> int:
    """How many pictures are asked for: `num`, or as many as the longer of prompts and images. ValueError for none."""
    many = 1 if isinstance(prompts, str) else len(prompts)
    several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
    count = max(many, len(images) if several else 1) if num is None else num
    if count < 1 or many < 1:
        raise ValueError(f"{count} images of {many} prompts: expected at least one of each")
    return count


def handover(schedule: Schedule, times: np.ndarray, fraction: float) -> int:
    """How many steps of the grid f[n + 1] lie before `fraction` of the way. ValueError unless it is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of the way is {fraction}, expected a number in (0, 1]")
    levels = schedule.process.levels or 1000
    inputs = np.asarray(schedule.process.time_input(jnp.asarray(times[:-1])))
    return int((inputs >= round(levels - fraction * levels)).sum()) if fraction < 1 else len(times) - 1


def pictures(parts: Parts, z: Array, decode: bool = True) -> np.ndarray:
    """Latents -> f32[N, H, W, 3] in [0, 1]; the latents without decode."""
    if not decode:
        return np.asarray(z)
    if parts.autoencoder is None:
        # NCSN++ was trained on pixels in [0, 1], everything else on [-1, 1].
        return np.clip(np.asarray(z) if parts.name == "ScoreSdeVePipeline" else np.asarray(z) / 2 + 0.5, 0, 1)
    with on_device(parts, parts.autoencoder) as params:
        return L.decode(parts.autoencoder, params, z, parts.tile)


def text_to_image(
    parts: Parts,
    prompts: Prompts,
    negative: Prompts | None = None,
    *,
    steps: int = 50,
    guidance: float = 7.5,
    sampler: str | None = None,
    seed: int = 0,
    first: int = 0,
    latents: Any = None,
    size: Size = None,
    num: int | None = None,
    rescale: float = 0.0,
    clip_skip: int = 0,
    sizes: Sizes = OWN_SIZES,
    end: float = 1.0,
    decode: bool = True,
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """f32[N, H, W, 3] in [0, 1], one for each prompt (or `num`, of one); with decode=False the latents f32[N, h, w, C].

    negative    prompts guided away from, one or N; None: none
    guidance    scale of classifier-free guidance, at most 1: none; rescale in [0, 1] pulls the spread back (Lin et al. 2023)
    sampler     update rule, a name of `ldm samplers`; None: the published one. Grid and noise stay those of the pipeline's file
    latents     initial noise f32[N or 1, h, w, C] of unit variance; None: drawn from the seed, image i from (seed, i) alone
    first       the number of the first image: several calls draw what one would
    size        (H, W) in pixels; None: what the network was trained for
    end         stop at this fraction of the way and return what is there (decode=False)

    Raises ValueError for what does not fit.
    """
    fits(parts, 0)
    count = count_of(prompts, None, num)
    shape, size = shape_of(parts, size)
    conds = tell(parts, texts("prompts", prompts, count), negative, guidance, size, sizes, clip_skip)
    times, schedule = parts.schedule.at(steps, size, sampler)
    if end != 1:
        times, schedule = times[: handover(schedule, times, end) + 1], schedule.unfinished()
    eps = L.initial(latents, seed, count, shape, first)
    z = loop.run(
        parts,
        schedule,
        eps * schedule.noise_scale(times[0]),
        times,
        conds,
        L.step_keys(seed, count, first),
        scales=loop.Scales(guidance, rescale=rescale),
        batch_size=batch_size,
        quiet=quiet,
    )
    return pictures(parts, z, decode)


def interpolate(
    parts: Parts,
    prompts: tuple[str, str] | str,
    seeds: tuple[int, int] | int = 0,
    *,
    num: int = 8,
    negative: str | None = None,
    steps: int = 50,
    guidance: float = 7.5,
    sampler: str | None = None,
    size: Size = None,
    decode: bool = True,
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """f32[num, H, W, 3] in [0, 1] on the way from one prompt to another, or from one seed to another, or both; see text_to_image.

    Noise turns along the great circle (Song et al. 2021, DDIM, appendix D.5), text states move on the straight line.
    """
    fits(parts, 0)
    if not isinstance(prompts, str) and len(prompts) != 2:
        raise ValueError(f"{len(prompts)} prompts to go between, expected 2")
    first, last = (prompts, prompts) if isinstance(prompts, str) else prompts
    one, two = seeds if isinstance(seeds, (tuple, list)) else (seeds, seeds)
    shape, size = shape_of(parts, size)
    w = jnp.linspace(0.0, 1.0, num)
    ends = tell(parts, [first, last], negative, guidance, size)

    def between(value: Array) -> Array:
        along = w.reshape(-1, *[1] * (value.ndim - 1))
        return (1 - along) * value[:1] + along * value[1:]

    conds = [{name: between(value) for name, value in cond.items()} for cond in ends]
    eps = slerp(*(jnp.repeat(L.noise(seed, 1, shape), num, 0) for seed in (one, two)), w)
    times, schedule = parts.schedule.at(steps, size, sampler)
    z = loop.run(
        parts,
        schedule,
        eps * schedule.noise_scale(times[0]),
        times,
        conds,
        # One path's noise for all: frames differ by what is interpolated alone.
        jnp.repeat(L.step_keys(one, 1), num, 0),
        scales=loop.Scales(guidance),
        batch_size=batch_size,
        quiet=quiet,
    )
    return pictures(parts, z, decode)
