"""Editing by instruction: InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800).

    x = x(none) + s_I (x(image) - x(none)) + s_T (x(image, text) - x(image))        (equation 3)

The network sees [x_t, encode(image)]; 'none' has the empty prompt and zeros for the picture. With s_T <= 1 or s_I < 1 there is no
guidance, as published: x(image, text) alone.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines import loop
from ldm_jax.pipelines.components import Parts
from ldm_jax.pipelines.conditions import conditions
from ldm_jax.pipelines.image_to_image import encoded
from ldm_jax.pipelines.prompts import texts
from ldm_jax.pipelines.text_to_image import Prompts, Size, channels, count_of, fits, pictures, shape_of


def edit(
    parts: Parts,
    prompts: Prompts,
    images: Any,
    negative: Prompts | None = None,
    *,
    steps: int = 100,
    guidance: float = 7.5,
    image_guidance: float = 1.5,
    sampler: str | None = None,
    seed: int = 0,
    first: int = 0,
    latents: Any = None,
    size: Size = None,
    num: int | None = None,
    rescale: float = 0.0,
    decode: bool = True,
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """f32[N, H, W, 3] in [0, 1]: `images` as the instructions `prompts` change them.

    guidance is that of the text, image_guidance that of the picture: more keeps more of it. A guidance of at most 1 or an
    image_guidance below 1 is none at all. The rest as in text_to_image. Raises ValueError for a network that is not told a
    picture, and for what does not fit.
    """
    fits(parts, channels(parts))
    count = count_of(prompts, images, num)
    # The picture is told unscaled, as in training.
    around, size = encoded(parts, images, size, count, scaled=False)
    shape, size = shape_of(parts, size)
    both = conditions(parts, texts("prompts", prompts, count), size)
    told = [both | {"channels": around}]
    if guidance > 1 and image_guidance >= 1:
        away = None if negative is None else texts("negative", negative, count)
        away = conditions(parts, away, size, negative=True, count=count)
        told += [away | {"channels": around}, away | {"channels": jnp.zeros_like(around)}]
    times, schedule = parts.schedule.at(steps, size, sampler)
    eps = L.initial(latents, seed, count, shape, first)
    z = loop.run(
        parts,
        schedule,
        eps * schedule.noise_scale(times[0]),
        times,
        told,
        L.step_keys(seed, count, first),
        scales=loop.Scales(guidance, image_guidance, rescale),
        batch_size=batch_size,
        quiet=quiet,
    )
    return pictures(parts, z, decode)
