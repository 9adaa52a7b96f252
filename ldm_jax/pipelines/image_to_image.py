"""Pictures from a picture and a prompt: SDEdit, a depth, SDXL's refiner, and the way back to noise (DDIM inversion).

    x_t = alpha(t) z + sigma(t) eps at the last floor(strength n) steps of the grid, then on as from noise

(Meng et al. 2022, arXiv:2108.01073.) Inversion runs the same grid upwards without noise (Song et al. 2021,
arXiv:2010.02502, section 4.3).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.process import corrupt
from ldm_jax.pipelines import fitting, loop
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.components import Parts, multiple, on_device
from ldm_jax.pipelines.conditions import OWN_SIZES, Sizes
from ldm_jax.pipelines.prompts import texts
from ldm_jax.pipelines.text_to_image import (
    Prompts,
    Size,
    count_of,
    fits,
    handover,
    pictures,
    shape_of,
    tell,
    text_to_image,
)


def framed(parts: Parts, images: Any, size: Size) -> tuple[list, tuple[int, int]]:
    """(pictures, (H, W)): cut to multiples that the networks take where size is None, which is said (fitting.framed)."""
    if parts.autoencoder is None:
        raise ValueError(f"{parts.name} has no autoencoder: it draws pixels and takes no picture")
    if size is not None:
        shape_of(parts, size)
    return fitting.framed(fitting.rows_of(images), size, multiple(parts, L.factor(parts.autoencoder.module)))


def encoded(parts: Parts, images: Any, size: Size, count: int, scaled: bool = True) -> tuple[Array, tuple[int, int]]:
    """(latents f32[count, h, w, C] of pictures, their (H, W)); size=None: that of the pictures (framed)."""
    rows, size = framed(parts, images, size)
    with on_device(parts, parts.autoencoder) as params:
        z = L.encode(parts.autoencoder, params, L.pixels(rows, size), scaled, parts.tile)
    return jnp.asarray(L.repeated("images", np.asarray(z), count)), size


def image_to_image(
    parts: Parts,
    prompts: Prompts,
    images: Any,
    negative: Prompts | None = None,
    *,
    strength: float = 0.8,
    start: float | None = None,
    depth: Any = None,
    steps: int = 50,
    guidance: float = 7.5,
    sampler: str | None = None,
    seed: int = 0,
    first: int = 0,
    latents: Any = None,
    size: Size = None,
    num: int | None = None,
    rescale: float = 0.0,
    sizes: Sizes = OWN_SIZES,
    decode: bool = True,
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """f32[N, H, W, 3] in [0, 1] that begin with `images`: PIL, u8 or floats in [0, 1], one or N; see text_to_image for the rest.

    strength  how much of the grid is run, in (0, 1]: small keeps the picture, 1 keeps next to nothing; latent consistency models
              run all of the steps over so much of the way
    start     instead of strength: `images` are latents f32[N, h, w, C] that another network left at this fraction of the way
    depth     f32[N or 1, H', W'] of any scale, for a network that is told one (StableDiffusionDepth2ImgPipeline)
    latents   the noise that is mixed in

    Raises ValueError for what does not fit, a strength that runs no step among it.
    """
    deep = fits(parts, 0, 1) == 1
    if deep != (depth is not None):
        raise ValueError(f"{parts.name} {'needs' if deep else 'takes no'} depth")
    count = count_of(prompts, images, num)
    scale = L.factor(parts.autoencoder.module) if parts.autoencoder else 1
    if start is None:
        scaled_to, (z, size) = size, encoded(parts, images, size, count)
    else:
        z = jnp.asarray(L.repeated("images", np.asarray(images, np.float32), count))
        size = tuple(n * scale for n in z.shape[1:3])
    shape, size = shape_of(parts, size)
    told = tell(parts, texts("prompts", prompts, count), negative, guidance, size, sizes)
    if deep:
        if start is None:
            own = fitting.size_of(fitting.rows_of(images)[0])
            depth = fitting.over(np.asarray(depth, np.float32), own, size, scaled_to is not None)
        near = jnp.asarray(L.repeated("depth", L.depth_map(depth, shape[:2]), count))
        told = [cond | {"channels": near} for cond in told]
    distilled = parts.name.startswith("LatentConsistencyModel")
    times, schedule = parts.schedule.at(steps, size, sampler, strength if start is None else 1.0, distilled=distilled)
    if start is None:
        eps = L.initial(latents, seed, count, shape, first)
        x = corrupt(schedule.process, z, eps, times[0])
    else:
        x, times = z, times[handover(schedule, times, start) :]
        if len(times) < 2:
            raise ValueError(f"start {start} leaves none of {steps} steps")
    x = loop.run(
        parts,
        schedule,
        x,
        times,
        told,
        # Who goes on where another left off must not draw its noise once more.
        L.step_keys(seed, count, first, use=1 if start is None else 2),
        scales=loop.Scales(guidance, rescale=rescale),
        batch_size=batch_size,
        quiet=quiet,
    )
    return pictures(parts, x, decode)


def invert(
    parts: Parts,
    prompts: Prompts,
    images: Any,
    *,
    steps: int = 50,
    sampler: str = "ddim",
    size: Size = None,
    num: int | None = None,
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """The noise f32[N, h, w, C], of about unit variance, from which the same prompts draw `images` again without guidance.

    The error is that of the steps, up and down. Song et al. 2021 (DDIM), section 4.3. Raises ValueError for a sampler that draws noise,
    and as image_to_image does.
    """
    fits(parts, 0)
    count = count_of(prompts, images, num)
    z, size = encoded(parts, images, size, count)
    told = tell(parts, texts("prompts", prompts, count), None, 1.0, size)
    times, schedule = parts.schedule.at(steps, size, sampler)
    if schedule.method().stochastic:
        raise ValueError(f"sampler {sampler!r} draws noise; inversion needs one that does not")
    x = z
    if schedule.process.sigma(times[-1]) > 0:
        x = corrupt(schedule.process, z, jnp.zeros_like(z), times[-1])
    x = loop.run(
        parts,
        schedule,
        x,
        times[::-1],
        told,
        L.step_keys(0, count),
        batch_size=batch_size,
        quiet=quiet,
    )
    return np.asarray(x / schedule.noise_scale(times[0]))


def vary(
    parts: Parts,
    prompts: Prompts,
    images: Any,
    source: Prompts = "",
    *,
    steps: int = 50,
    sampler: str = "ddim",
    **options,
) -> np.ndarray:
    """Variations of `images`: inverted under `source`, what they show, and drawn anew under `prompts` (text_to_image's options)."""
    size, shared = options.pop("size", None), {k: options[k] for k in ("batch_size", "quiet") if k in options}
    count = count_of(prompts, images, options.pop("num", None))
    eps = invert(parts, texts("source", source, count), images, steps=steps, sampler=sampler, size=size, **shared)
    scale = L.factor(parts.autoencoder.module)
    size = tuple(n * scale for n in eps.shape[1:3])
    prompts = texts("prompts", prompts, count)
    return text_to_image(parts, prompts, steps=steps, sampler=sampler, latents=eps, size=size, **options)
