"""The same picture, small: the condition of super-resolution (Saharia et al. 2022, SR3, arXiv:2104.07636, section 2.3; Ho et al.
2022, CDM, arXiv:2106.15282, section 4).

    y = enlarge(reduce(x, f), f),      channels = [encode(sqrt(1 - s^2) y + s eps), s]

reduce is the mean over f x f pixels, enlarge is cubic. With `noise` above 0 the small picture is augmented in training (CDM, section
4.2): s is uniform in [0, noise] and a further channel; pictures are drawn at s = 0. The null is a grey picture.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import per_row
from ldm_jax.training import first_stage
from ldm_jax.training.conditioning import Condition
from ldm_jax.training.images import from_entry
from ldm_jax.training.task import Context


def reduce(x: jax.Array, factor: int) -> jax.Array:
    """The mean over factor x factor pixels: f32[B, H, W, C] -> f32[B, H / factor, W / factor, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // factor, factor, width // factor, factor, channels).mean((2, 4))


def enlarge(x: jax.Array, factor: int) -> jax.Array:
    """Cubic interpolation: f32[B, h, w, C] -> f32[B, factor h, factor w, C]."""
    batch, height, width, channels = x.shape
    return jax.image.resize(x, (batch, factor * height, factor * width, channels), "cubic")


def make(context: Context, *, factor: int = 4, noise: float = 0.0) -> Condition:
    """config.condition.low_resolution: C further channels of 'image', and one more for the level where `noise` is above 0.

    Raises ValueError where `factor` does not divide the resolution, and for noise outside [0, 1].
    """
    side, stage = context.space.shape[0], context.stage
    if side % factor:
        raise ValueError(
            f"config.condition.low_resolution.factor={factor} does not divide config.input.resolution={side}"
        )
    if not 0 <= noise <= 1:
        raise ValueError(f"config.condition.low_resolution.noise={noise}; expected a level in [0, 1]")

    def drawn(frozen, batch, keys):
        del frozen
        y = enlarge(reduce(from_entry(batch["image"]), factor), factor)
        return {"image": y, "level": jnp.zeros(len(keys))}

    def augmented(frozen, batch, keys):
        y = drawn(frozen, batch, keys)["image"]
        pairs = jax.vmap(jax.random.split)(keys)
        level = jax.vmap(lambda key: jax.random.uniform(key, (), maxval=noise))(pairs[:, 0])
        eps = jax.vmap(lambda key: jax.random.normal(key, y.shape[1:]))(pairs[:, 1])
        s = per_row(level, y)
        return {"image": jnp.sqrt(1 - s**2) * y + s * eps, "level": level}

    def encode(params, frozen, value):
        del params
        z = first_stage.encode(stage, frozen, value["image"])
        if not noise:
            return {"channels": z}
        level = jnp.broadcast_to(per_row(value["level"], z), (*z.shape[:-1], 1))
        return {"channels": jnp.concatenate([z, level], -1)}

    return Condition(
        "low_resolution",
        augmented if noise else drawn,
        encode,
        null={"image": np.zeros((side, side, 3), np.float32), "level": np.float32(0)},
        needs=("image",),
        takes=("image",),
        drawn=drawn,
        show=lambda value: value["image"],
        reduces=factor,
    )
