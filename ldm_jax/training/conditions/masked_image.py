"""A picture of which a part is missing, as further channels of the network's input: the inpainting network of Rombach et al. 2022
(arXiv:2112.10752, section 4.5).

    channels = [m, encode(x (1 - m))]          m = 1 where the picture is drawn anew

m is drawn from the key of the row. It is everything with probability `everything`; else a box, or a stroke of a brush (as the masks of
Suvorov et al. 2022, LaMa, arXiv:2109.07161, section 2.3). In latents every f-th pixel of m lies beside the latent of the masked
picture, as published inpainting networks take it. What is missing is grey. The null is a picture of which everything is missing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.training import first_stage
from ldm_jax.training.conditioning import Condition
from ldm_jax.training.images import from_entry
from ldm_jax.training.task import Context

POINTS = 5  # of a stroke


def box(key: jax.Array, side: int, least: float, most: float) -> jax.Array:
    """f32[side, side, 1], 1 in a box of sides between least and most of the picture's, at a random place within it."""
    k_size, k_place = jax.random.split(key)
    size = side * jax.random.uniform(k_size, (2,), minval=least, maxval=most)
    corner = jax.random.uniform(k_place, (2,)) * (side - size)
    at = jnp.arange(side) + 0.5
    inside = [(corner[i] <= at) & (at < corner[i] + size[i]) for i in (0, 1)]
    return (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)[..., None]


def brush(key: jax.Array, side: int, least: float, most: float) -> jax.Array:
    """f32[side, side, 1], 1 on a line through random points, whose width is between least / 2 and most / 2 of the picture's side."""
    k_points, k_width = jax.random.split(key)
    points = side * jax.random.uniform(k_points, (POINTS, 2))
    radius = side * jax.random.uniform(k_width, (), minval=least, maxval=most) / 4
    at = jnp.stack(jnp.meshgrid(*[jnp.arange(side) + 0.5] * 2, indexing="ij"), -1)
    begin, along = points[:-1], points[1:] - points[:-1]
    # The nearest point of each segment, as a share of its length.
    share = jnp.einsum("hwsc,sc->hws", at[:, :, None] - begin, along) / jnp.maximum((along**2).sum(-1), 1e-6)
    nearest = begin + jnp.clip(share, 0, 1)[..., None] * along
    distance = jnp.linalg.norm(at[:, :, None] - nearest, axis=-1).min(-1)
    return (distance < radius).astype(jnp.float32)[..., None]


def mask(key: jax.Array, side: int, least: float, most: float, boxes: float, everything: float) -> jax.Array:
    """f32[side, side, 1] of 0 and 1, drawn as the module docstring says."""
    k_kind, k_shape = jax.random.split(key)
    u = jax.random.uniform(k_kind, (2,))
    shape = jnp.where(u[0] < boxes, box(k_shape, side, least, most), brush(k_shape, side, least, most))
    return jnp.where(u[1] < everything, 1.0, shape)


def make(
    context: Context, *, least: float = 0.2, most: float = 0.8, boxes: float = 0.5, everything: float = 0.1
) -> Condition:
    """config.condition.masked_image: 1 + C further channels, of 'image', and of 'mask' f32[B, H, W, 1] where the batch has one.

    `least`, `most`: sides of a box as shares of the picture's, widths of a brush as half of that; `boxes`: the share of boxes, the rest
    are strokes; `everything`: the share of masks that leave nothing. Raises ValueError unless 0 < least <= most <= 1.
    """
    if not 0 < least <= most <= 1:
        raise ValueError(
            f"config.condition.masked_image has least={least}, most={most}; expected 0 < least <= most <= 1"
        )
    side, stage = context.space.shape[0], context.stage
    by = 1 if stage is None else side // stage.shape[0]

    def read(frozen, batch, keys):
        del frozen
        x, m = from_entry(batch["image"]), batch.get("mask")
        if m is None:
            m = jax.vmap(lambda key: mask(key, side, least, most, boxes, everything))(keys)
        return {"mask": m, "image": x * (1 - m)}

    def encode(params, frozen, value):
        del params
        around = first_stage.encode(stage, frozen, value["image"])
        return {"channels": jnp.concatenate([value["mask"][:, ::by, ::by], around], -1)}

    return Condition(
        "masked_image",
        read,
        encode,
        null={"mask": np.ones((side, side, 1), np.float32), "image": np.zeros((side, side, 3), np.float32)},
        needs=("image",),
        takes=("image", "mask"),
        show=lambda value: value["image"],
    )
