"""Pictures without words, of classes where there are any: DDPM, ADM, NCSN++, consistency models in pixels, DiT, LDM in latents."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.pipelines import latents as L
from ldm_jax.pipelines import loop
from ldm_jax.pipelines.components import Parts
from ldm_jax.pipelines.conditions import labels as numbered
from ldm_jax.pipelines.text_to_image import Size, pictures, shape_of


def draw(
    parts: Parts,
    num: int = 1,
    labels: Sequence[int] | None = None,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    sampler: str | None = None,
    seed: int = 0,
    first: int = 0,
    latents: Any = None,
    size: Size = None,
    decode: bool = True,
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """f32[num, H, W, 3] in [0, 1]; image first + i has label first + i of `labels`, repeated in order
    (None: every class in turn).

    guidance, above 1, is for networks with a null class, the one after the last (DiT). The rest as in text_to_image. Raises ValueError
    for a pipeline that takes prompts, for a label that is not there, and for what does not fit.
    """
    if parts.text:
        raise ValueError(f"{parts.name} takes prompts: use text_to_image")
    if num < 1:
        raise ValueError(f"num is {num}, expected at least 1")
    shape, size = shape_of(parts, size)
    classes = numbered(parts, labels, first + num)
    told = [{} if classes is None else {"label": jnp.asarray(classes[first:])}]
    if guidance > 1:
        null = getattr(parts.denoiser.module, "num_classes", None)
        if null is None:
            raise ValueError(f"guidance is {guidance}, but {parts.name} has no null class to guide away from")
        told.append({"label": jnp.full(num, null, jnp.int32)})
    times, schedule = parts.schedule.at(steps, size, sampler)
    eps = L.initial(latents, seed, num, shape, first)
    z = loop.run(
        parts,
        schedule,
        eps * schedule.noise_scale(times[0]),
        times,
        told,
        L.step_keys(seed, num, first),
        scales=loop.Scales(guidance),
        batch_size=batch_size,
        quiet=quiet,
    )
    return pictures(parts, z, decode)
