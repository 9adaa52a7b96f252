"""Drawing anew where a mask is white, by a network trained for it or by any other.

9 channels   the network sees [x_t, mask, encode(picture outside the mask)]             (Rombach et al. 2022, section 4.5)
4 channels   outside the mask every step is replaced by the picture's own path          (editing.preserve; Song et al. 2021)
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import corrupt
from ldm_jax.pipelines import fitting, loop
from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines.components import Parts, multiple
from ldm_jax.pipelines.conditions import OWN_SIZES, Sizes
from ldm_jax.pipelines.image_to_image import encoded, framed
from ldm_jax.pipelines.prompts import texts
from ldm_jax.pipelines.text_to_image import Prompts, Size, channels, count_of, fits, pictures, shape_of, tell


def inpaint(
    parts: Parts,
    prompts: Prompts,
    images: Any,
    masks: Any,
    negative: Prompts | None = None,
    *,
    strength: float = 1.0,
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
    """f32[N, H, W, 3] in [0, 1]: `images` drawn anew where `masks` (f32[N or 1, H, W, 1] in [0, 1], u8 or PIL; 1/2 and more) are white.

    strength 1 begins with noise alone, less with the noised picture (image_to_image). The rest as in text_to_image. Raises
    ValueError for what does not fit.
    """
    extra = fits(parts, 0, 1 + channels(parts))
    count = count_of(prompts, images, num)
    whole, asked = fitting.rows_of(images), size
    rows, size = framed(parts, whole, asked)
    shape, size = shape_of(parts, size)
    scale = L.factor(parts.autoencoder.module)
    masks = fitting.masked(fitting.rows_of(masks, 1), whole, asked, multiple(parts, scale))
    x = L.pixels(rows, size)
    z, _ = encoded(parts, x, size, count)
    x = L.repeated("images", x, count)
    mask = L.repeated("masks", (L.pixels(masks, size, 1) >= 0.5).astype(np.float32), count)
    small = jnp.asarray(L.shrink(mask, scale))
    told = tell(parts, texts("prompts", prompts, count), negative, guidance, size, sizes)
    eps = L.initial(latents, seed, count, shape, first)
    held = None
    if extra:
        # The hole is grey, 0 of [-1, 1], as in training.
        around, _ = encoded(parts, 0.5 + (x - 0.5) * (mask < 0.5), size, count)
        told = [cond | {"channels": jnp.concatenate([small, around], -1)} for cond in told]
    else:
        held = loop.Held(z, 1 - small, eps)
    times, schedule = parts.schedule.at(steps, size, sampler, strength)
    if strength == 1:
        start = eps * schedule.noise_scale(times[0])
    else:
        start = corrupt(schedule.process, z, eps, times[0])
    z = loop.run(
        parts,
        schedule,
        start,
        times,
        told,
        L.step_keys(seed, count, first),
        scales=loop.Scales(guidance, rescale=rescale),
        held=held,
        batch_size=batch_size,
        quiet=quiet,
    )
    return pictures(parts, z, decode)
