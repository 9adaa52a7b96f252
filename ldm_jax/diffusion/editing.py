"""Editing with an unconditional or a conditional denoiser: start from an image, keep a region, interpolate latent noise.

Keeping a region turns a Sampler into a Sampler, so that every method, grid and guidance works with it. After each step to s
the kept region is what the process makes of the original,

    x_s <- keep (alpha_s x + sigma_s eps) + (1 - keep) x_s,

which is the original itself where a grid ends in clean data. `preserve` does only that. `repaint` also adds noise again and repeats the
steps, so that the free region adapts to the kept one (Lugmayr et al. 2022, arXiv:2201.09865).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.process import Process, corrupt, per_row
from ldm_jax.diffusion.samplers.sampler import Sampler, noise
from ldm_jax.diffusion.samplers.sde import transition


def remaining(times: Array, i: Array | int) -> Array:
    """times f[n + 1] from entry i on, padded to n + 1 entries by repeating the last (as grids.pad does); i may be traced."""
    last = times.shape[0] - 1
    return times[jnp.minimum(jnp.arange(last + 1) + i, last)]


def noised_start(process: Process, x: Array, eps: Array, times: Array, strength: float | Array) -> tuple[Array, Array]:
    """(x_t, times') with which `sample` edits x [B, ...]: times' are the last floor(n strength) steps of the grid times f[n + 1].

    x_t = alpha x + sigma eps at their start.

    SDEdit, Meng et al. 2022 (arXiv:2108.01073), algorithm 1; image-to-image as diffusers counts it, min(int(n strength), n)
    steps. times' is padded to n + 1 entries, so that one compiled program serves every strength, which may be traced. 0 runs
    no step and gives x at times[-1]; 1 runs the whole grid, and the result depends on x unless alpha(times[0]) is 0. n counts the
    entries of times: pass a grid before padding it. Raises ValueError for a concrete strength outside [0, 1].
    """
    times = jnp.asarray(times)
    n = times.shape[0] - 1
    if isinstance(strength, jax.core.Tracer):
        run = jnp.clip(jnp.floor(n * strength), 0, n).astype(jnp.int32)
    else:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}, expected a number in [0, 1]")
        run = min(int(n * strength), n)
    times = remaining(times, n - run)
    return corrupt(process, x, eps, times[0]), times


def _checked(x: Array, keep: Array) -> tuple[Array, Array]:
    x, keep = jnp.asarray(x), jnp.asarray(keep)
    try:
        fits = np.broadcast_shapes(x.shape, keep.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"keep has shape {keep.shape}, expected one that broadcasts to that of x, {x.shape}")
    return x, keep.astype(x.dtype)


def _moved(carry: Any, x: Array) -> Any:
    """The carry with another state x; x is a field of the carry, or of the carry inside it."""
    if "x" in carry._fields:
        return carry._replace(x=x)
    holder = next(name for name in carry._fields if hasattr(getattr(carry, name), "x"))
    return carry._replace(**{holder: _moved(getattr(carry, holder), x)})


def preserve(sampler: Sampler, x: Array, keep: Array, eps: Array) -> Sampler:
    """The sampler with the region where keep is 1 held to x's own path alpha_t x + sigma_t eps at every time of the grid.

    x [B, ...] is clean; keep, in [0, 1], broadcasts to it (masks are [B, H, W, 1]); eps [B, ...] is fixed noise, best that of x_T
    itself. Inpainting by replacement: Song et al. 2021 (arXiv:2011.13456), appendix I.2; diffusers' inpainting with a network that was
    not trained for it. It does not draw from the conditional distribution, because the estimate of the free region depends on the kept
    region only through x_t: see repaint. Order, evaluations and randomness are those of the sampler. Where the grid ends with sigma > 0
    the kept region has that noise. Raises ValueError for shapes that do not fit.
    """
    x, keep = _checked(x, keep)
    if eps.shape != x.shape:
        raise ValueError(f"eps has shape {eps.shape}, expected that of x, {x.shape}")

    def held(process, x_t, t):
        return keep * corrupt(process, x, eps, t) + (1 - keep) * x_t

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Any:
        return sampler.init(process, held(process, x_T, times[0]), times, keys)

    def step(denoise: Denoiser, process: Process, carry: Any, t: Array, s: Array, keys: Array | None) -> Any:
        carry = sampler.step(denoise, process, carry, t, s, keys)
        return _moved(carry, held(process, carry.x, s))

    return sampler._replace(init=init, step=step)


class Repainting(NamedTuple):
    """x [B, ...] now; the inner sampler's carry; the grid, how many of its steps are real and how many were taken."""

    x: Array
    inner: Any
    times: Array
    last: Array
    steps: Array


def repaint(sampler: Sampler, x: Array, keep: Array, *, jump_length: int = 10, resample: int = 10) -> Sampler:
    """RePaint: `preserve` with fresh noise at each step, and with every block of jump_length steps run `resample` times.

    Between two runs of a block x_s is noised to the level where the block began (sde.transition).

    Lugmayr et al. 2022 (arXiv:2201.09865), algorithm 1 with the jumps of its figures 9 and 10; its defaults are 250 steps, 10 and
    10. Blocks are counted from the data end of the grid, and the first one, out of pure noise, is run once, as in the
    published schedule and in diffusers. A jump starts the inner sampler anew: a multistep method forgets its history.

    Stochastic. Order of the inner sampler. n steps cost n + (resample - 1) jump_length (ceil(n / jump_length) - 1) of its steps;
    `evaluations` is an upper bound, resample times those of the sampler. For small or irregular holes, where preserve leaves seams. x_T
    is pure noise or that of noised_start. Raises ValueError for shapes that do not fit, and unless both numbers are at least 1.
    """
    x, keep = _checked(x, keep)
    for name, value in (("jump_length", jump_length), ("resample", resample)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")

    def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> Repainting:
        last = jnp.sum(times[:-1] != times[1:], dtype=jnp.int32)  # the rest is padding
        return Repainting(x_T, sampler.init(process, x_T, times, keys), times, last, jnp.zeros((), jnp.int32))

    def step(
        denoise: Denoiser, process: Process, carry: Repainting, t: Array, s: Array, keys: Array | None
    ) -> Repainting:
        times, here = carry.times, carry.steps
        left = carry.last - here - 1
        repeats = (left % jump_length == 0) & (left + jump_length < carry.last)

        def visit(i, inner):
            """The step itself (i = 0), then those of the block's repeats, the first of each after a jump."""
            place = (i - 1) % jump_length
            at = jnp.where(i == 0, here, here + 1 - jump_length + place)
            fresh = [jax.vmap(jax.random.fold_in, (0, None))(keys, 3 * i + use) for use in range(3)]

            def jump(inner):
                a, b = transition(process, s, times[at])
                x_t = a * inner.x + b * noise(fresh[0], inner.x)
                return sampler.init(process, x_t, remaining(times, at), fresh[1])

            inner = jax.lax.cond((i > 0) & (place == 0), jump, lambda inner: inner, inner)
            inner = sampler.step(denoise, process, inner, times[at], times[at + 1], fresh[1])
            kept = corrupt(process, x, noise(fresh[2], inner.x), times[at + 1])
            return _moved(inner, keep * kept + (1 - keep) * inner.x)

        count = 1 + jnp.where(repeats, (resample - 1) * jump_length, 0)
        inner = jax.lax.fori_loop(0, count, visit, carry.inner)
        return Repainting(inner.x, inner, times, carry.last, here + 1)

    return sampler._replace(init=init, step=step, evaluations=resample * sampler.evaluations, stochastic=True)


def _length(x: Array) -> Array:
    """Euclidean length of each row, [B, 1, ...], with gradient 0 where it is 0."""
    square = jnp.sum(x**2, tuple(range(1, x.ndim)), keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def slerp(a: Array, b: Array, w: Array) -> Array:
    """sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b, theta the angle between the rows of a and b [B, ...].

    w is a number or [B], possibly traced: 0 gives a, 1 gives b. Shoemake 1985; for latent noise Song et al. 2021 (DDIM,
    arXiv:2010.02502), appendix D.5. Rows of equal length keep their length, so that noise keeps its unit variance; a straight line
    would lose up to half of it. Parallel and opposite rows, and rows of zeros, are interpolated linearly.
    """
    long_a, long_b = _length(a), _length(b)
    unit_a, unit_b = (row / jnp.where(size > 0, size, 1) for row, size in ((a, long_a), (b, long_b)))
    # Kahan's angle is accurate for nearly parallel rows, where arccos of the dot product is not.
    theta = 2 * jnp.arctan2(_length(unit_a - unit_b), _length(unit_a + unit_b))
    tiny = math.sqrt(jnp.finfo(a.dtype).eps)
    arc = (tiny < theta) & (theta < math.pi - tiny) & (long_a > 0) & (long_b > 0)
    theta, w = jnp.where(arc, theta, 1), per_row(w, a)
    first = jnp.where(arc, jnp.sin((1 - w) * theta) / jnp.sin(theta), 1 - w)
    second = jnp.where(arc, jnp.sin(w * theta) / jnp.sin(theta), w)
    return first * a + second * b
