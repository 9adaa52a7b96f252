"""Scales of guidance: a number, a traced scalar, [B], or a function of t that returns one of these.

dynamic   neutral + max(floor, (scale - neutral) shape(t))      Wang et al. 2024 (arXiv:2404.13040), equation 4
within    scale on t_lo <= t <= t_hi, else neutral              Kynkaanniemi et al. 2024 (arXiv:2404.07724)
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.process import per_row

Scale = Array | float | Callable[[Array], Array]

# Weights of mean 1 over 0 <= t <= 1: how the extra scale is spread over time. Wang et al. 2024 (arXiv:2404.13040),
# section 4. linear and cosine grow towards the data, and they find these to help; sine and inverse_linear fall.
SHAPES: dict[str, Callable[[Array], Array]] = {
    "linear": lambda t: 2 * (1 - t),
    "cosine": lambda t: 1 + jnp.cos(math.pi * t),
    "inverse_linear": lambda t: 2 * t,
    "sine": lambda t: 1 - jnp.cos(math.pi * t),
    "v": lambda t: 2 * jnp.abs(1 - 2 * t),
    "inverse_v": lambda t: 2 - 2 * jnp.abs(1 - 2 * t),
}


def powered_cosine(power: float) -> Callable[[Array], Array]:
    """The shape (1 - cos(pi (1 - t)^power)) / 2: 0 at the noise, 1 at the data. Wang et al. 2024, their `pcs`.

    Raises ValueError unless power > 0.
    """
    if not power > 0:
        raise ValueError(f"power is {power}, expected a number > 0")
    return lambda t: 0.5 - 0.5 * jnp.cos(math.pi * (1 - t) ** power)


def dynamic(
    scale: Scale, shape: str | Callable[[Array], Array] = "linear", floor: float = -math.inf, neutral: float = 1.0
) -> Callable[[Array], Array]:
    """A scale that depends on t: neutral + max(floor, (scale - neutral) shape(t)).

    Wang et al. 2024 (arXiv:2404.13040), equation 4, where the extra scale is called omega; floor is their `clamp`.
    shape is a name in SHAPES or a function of t, e.g. powered_cosine(2). neutral is the scale that does nothing: 1 for
    cfg, 0 for CFG++ and for gradients. Raises ValueError for an unknown name.
    """
    if isinstance(shape, str) and shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}, expected a function of t or one of {sorted(SHAPES)}")
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    return lambda t: neutral + jnp.maximum((value(scale, t) - neutral) * shape(t), floor)


def within(scale: Scale, t_lo: float, t_hi: float, neutral: float = 1.0) -> Callable[[Array], Array]:
    """scale on t_lo <= t <= t_hi, else neutral: an interval for one scale of several.

    Raises ValueError unless t_lo <= t_hi.
    """
    if isinstance(t_lo, int | float) and isinstance(t_hi, int | float) and not t_lo <= t_hi:
        raise ValueError(f"guidance interval is {t_lo}..{t_hi}, expected t_lo <= t_hi")
    return lambda t: jnp.where((t >= t_lo) & (t <= t_hi), value(scale, t), neutral)


def value(scale: Scale, t: Array) -> Array:
    """The scale at t, a scalar or [B]."""
    return scale(t) if callable(scale) else jnp.asarray(scale)


def at(scale: Scale, t: Array, like: Array) -> Array:
    """The scale at t, with the axes of `like` [B, ...] after the first."""
    return per_row(value(scale, t), like)


# No published recipe is near this; larger scales leave the range of single precision within a few steps.
LARGEST_SCALE = 1000.0


def check_scale(name: str, scale: float) -> None:
    """ValueError unless the scale called `name` is a number from -1000 to 1000."""
    if not abs(scale) <= LARGEST_SCALE:
        raise ValueError(f"{name} is {scale}; expected a number of at most {LARGEST_SCALE:g}")


def check_rescale(name: str, rescale: float) -> None:
    """ValueError unless the rescale called `name` is in [0, 1]."""
    if not 0 <= rescale <= 1:
        raise ValueError(f"{name} is {rescale}; expected a number in [0, 1]")
