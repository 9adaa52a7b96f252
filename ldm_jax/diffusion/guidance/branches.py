"""Guidance by the difference of branches: cond + push, where the push is a weighted sum of differences between estimates.

    cfg, cfg_zero, apg      a conditional and an unconditional estimate     Ho & Salimans 2021; Fan et al. 2025; Sadat et al. 2024
    cfg_pp                  the same, on the unconditional noise            Chung et al. 2024
    autoguidance            a good and a bad network                        Karras et al. 2024
    third_branch, dual      three estimates
    interval                one denoiser on an interval of t, another elsewhere

The push is exactly zero at the scale called neutral.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser, Pair
from ldm_jax.diffusion.guidance.rows import dot, over, root
from ldm_jax.diffusion.guidance.scales import Scale, at, within
from ldm_jax.diffusion.prediction import Clean, target, to_clean
from ldm_jax.diffusion.process import Process, per_row

Triple = Callable[[Array, Array], tuple[Clean, Clean, Clean]]


def _along(*terms: tuple[Array, Clean, Clean]) -> Clean:
    """The sum of k (a - b) over (k, a, b): a Clean of x_t = 0."""
    return Clean(sum(k * (a.x - b.x) for k, a, b in terms), sum(k * (a.eps - b.eps) for k, a, b in terms))


def _guided(
    branches: Callable[[Array, Array], tuple[Clean, ...]],
    roles: tuple[str, ...],
    push: Callable[..., Clean],
    rescale: Array | float,
) -> Denoiser:
    """cond + push(t, *branches), where cond is the first branch; then the rescaling that cfg describes."""

    def denoise(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        estimates = branches(x_t, t)
        if len(estimates) != len(roles):
            raise ValueError(f"got {len(estimates)} branches, expected {len(roles)}: ({', '.join(roles)})")
        cond = estimates[0]
        by = push(t, *estimates)
        x, eps = cond.x + by.x, cond.eps + by.eps
        if isinstance(rescale, int | float) and rescale == 0:
            return Clean(x, eps, cond.log_var)
        # alpha by.x = -sigma by.eps, so that the push determines alpha / sigma. Where it is zero nothing is rescaled, and any
        # ratio is right.
        alpha, sigma = root(dot(by.eps, by.eps)), root(dot(by.x, by.x))
        norm = root(alpha**2 + sigma**2)
        alpha, sigma = over(alpha, norm), over(sigma, norm)
        v, v_cond = alpha * eps - sigma * x, alpha * cond.eps - sigma * cond.x
        axes = tuple(range(1, x_t.ndim))
        std_cond, std = (root(jnp.var(w, axes, keepdims=True)) for w in (v_cond, v))
        ratio = over(std_cond, std, 1.0)
        dv = per_row(rescale, x_t) * (ratio - 1) * v
        return Clean(x - sigma * dv, eps + alpha * dv, cond.log_var)

    return denoise


def cfg(
    pair: Pair,
    scale: Scale,
    t_lo: float = 0.0,
    t_hi: float = 1.0,
    rescale: Array | float = 0.0,
    channels: int | None = None,
) -> Denoiser:
    """Classifier-free guidance, x = x_c + (scale - 1) (x_c - x_u), and likewise for eps.

    1 is the conditional network itself, exactly. Ho & Salimans 2022 (arXiv:2207.12598), equation 6, with scale = 1 +
    their w. Outside t_lo <= t <= t_hi the scale is 1: Kynkaanniemi et al. 2024 (arXiv:2404.07724), equation 5; the pair
    is still evaluated there (see `interval`).

    rescale in [0, 1] (a number, traced scalar or [B]) pulls the guided prediction's standard deviation over a row
    back to that of the conditional one: Lin et al. 2023 (arXiv:2305.08891), equations 14-16, in their prediction,
    v = alpha eps - sigma x, whatever the network predicts.

    With `channels`, guidance applies to the first so many channels (last axis), and the others are those of the conditional
    network; None, the default, guides all, as diffusers' DiTPipeline does. Peebles & Xie 2023 (DiT, arXiv:2212.09748, appendix A)
    guide 3 of 4, and their published figures are made so.

    Raises ValueError unless t_lo <= t_hi and channels >= 1, and for anything but two branches; so do its relatives below.
    """
    scale = within(scale, t_lo, t_hi)
    if channels is not None and not (isinstance(channels, int) and channels >= 1):
        raise ValueError(f"channels is {channels!r}, expected a number of channels, at least 1")

    def push(t: Array, cond: Clean, uncond: Clean) -> Clean:
        by = at(scale, t, cond.x) - 1
        if channels is not None:
            by = by * (jnp.arange(cond.x.shape[-1]) < channels)
        return _along((by, cond, uncond))

    return _guided(pair, ("cond", "uncond"), push, rescale)


def autoguidance(
    strong: Denoiser, weak: Denoiser, scale: Scale, t_lo: float = 0.0, t_hi: float = 1.0, rescale: Array | float = 0.0
) -> Denoiser:
    """x = x_weak + scale (x_strong - x_weak): away from a smaller or less trained network under the same condition.

    Karras et al. 2024 (arXiv:2406.02507), equation 3. 1 is the strong network itself. There are two network calls,
    because the two networks may differ in shape; everything else is as in cfg.
    """
    return cfg(lambda x_t, t: (strong(x_t, t), weak(x_t, t)), scale, t_lo, t_hi, rescale)


def cfg_pp(pair: Pair, scale: Scale) -> Denoiser:
    """CFG++: x = x_u + scale (x_c - x_u) with the unconditional eps_u.

    Chung et al. 2024 (arXiv:2406.08070), algorithm 2. scale is their lambda, usually in [0, 1]; 0 is the unconditional
    network itself. The estimate does NOT explain x_t: alpha x + sigma eps_u differs from it by scale alpha (x_c - x_u). This
    is the idea of the method: the noise that a step puts back is then the noise that was in x_t. It works with samplers that step by
    alpha_s x + sigma_s eps: euler, ddim, ancestral and exponential multistep methods. One such step from t to s is that
    of cfg with the scale

        scale / (1 - sigma_s alpha_t / (alpha_s sigma_t)),

    large where steps are short. Methods that use the slope eps - k x (heun, rk4) would depend on the process's k.
    """

    def denoise(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        cond, uncond = pair(x_t, t)
        return uncond._replace(x=uncond.x + _along((at(scale, t, x_t), cond, uncond)).x)

    return denoise


def cfg_zero(
    pair: Pair,
    scale: Scale,
    process: Process,
    t_zero: float = 1.0,
    t_lo: float = 0.0,
    t_hi: float = 1.0,
    rescale: Array | float = 0.0,
    kind: str = "flow",
) -> Denoiser:
    """CFG-Zero*: v = s v_u + scale (v_c - s v_u) with s = <v_c, v_u> / |v_u|^2 of each row, and v = 0 from t_zero on.

    Fan et al. 2025 (arXiv:2503.18886), algorithm 1. v is the flow velocity eps - x, or the prediction of another kind
    (`v` for networks of VP). It is zero where t >= t_zero: by default in the first step of a grid that begins at t = 1.
    Give times[k - 1] for the first k steps, anything above 1 for none. Below t_zero scale 1 is the conditional network.
    """
    scale = within(scale, t_lo, t_hi)

    def push(t: Array, cond: Clean, uncond: Clean) -> Clean:
        v, v_u = (target(kind, process, clean.x, clean.eps, t) for clean in (cond, uncond))
        dv = (at(scale, t, v) - 1) * (v - over(dot(v, v_u), dot(v_u, v_u)) * v_u)
        return to_clean(kind, process, dv, jnp.zeros_like(dv), t)

    guided = _guided(pair, ("cond", "uncond"), push, rescale)

    def denoise(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean, still = guided(x_t, t), to_clean(kind, process, jnp.zeros_like(x_t), x_t, t)
        stop = per_row(t >= t_zero, x_t) > 0
        return clean._replace(x=jnp.where(stop, still.x, clean.x), eps=jnp.where(stop, still.eps, clean.eps))

    return denoise


def apg(
    pair: Pair,
    scale: Scale,
    eta: Array | float = 0.0,
    threshold: Array | float = math.inf,
    t_lo: float = 0.0,
    t_hi: float = 1.0,
    rescale: Array | float = 0.0,
) -> Denoiser:
    """Adaptive projected guidance, x = x_c + (scale - 1) (d_orthogonal + eta d_parallel), against oversaturation.

    d = (x_c - x_u) min(1, threshold / |x_c - x_u|), split along x_c, row by row. Sadat et al. 2024 (arXiv:2410.02416).
    eta = 1 without a threshold is cfg; scale 1 is the conditional network. eta, threshold: numbers, traced or [B].

    Their third part, a (negative) momentum of d from step to step, is left out: it is state, and a Denoiser has none.
    """
    scale = within(scale, t_lo, t_hi)

    def push(t: Array, cond: Clean, uncond: Clean) -> Clean:
        d = _along((1.0, cond, uncond))
        # d.eps is a multiple of d.x: both turn by the projection of each on x_c, and no sigma is divided by.
        unit = over(cond.x, dot(cond.x, cond.x))
        size, limit = root(dot(d.x, d.x)), per_row(threshold, d.x)
        # An infinite limit is kept out of the quotient, whose derivatives would be inf * 0.
        shorter = jnp.where(size > limit, over(jnp.where(size > limit, limit, 0), size), 1)
        weight = (at(scale, t, d.x) - 1) * shorter
        parallel = (per_row(eta, d.x) - 1) * cond.x
        return Clean(weight * (d.x + dot(d.x, unit) * parallel), weight * (d.eps + dot(d.eps, unit) * parallel))

    return _guided(pair, ("cond", "uncond"), push, rescale)


def third_branch(
    triple: Triple,
    scale: Scale,
    perturbed_scale: Scale,
    t_lo: float = 0.0,
    t_hi: float = 1.0,
    rescale: Array | float = 0.0,
) -> Denoiser:
    """x = x_c + (scale - 1) (x_c - x_u) + perturbed_scale (x_c - x_p): away from a perturbed network too.

    triple(x_t, t) -> (cond, uncond, perturbed). In perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377) x_p
    comes from the network whose self-attention maps are the identity; in skip-layer guidance (Stable Diffusion 3.5;
    Hyung et al. 2024, arXiv:2411.18664) from the network without some layers, and perturbed_scale is usually
    within(scale, t_lo, t_hi, 0), the early steps alone. scale 1 and perturbed_scale 0 are the conditional network
    itself; t_lo and t_hi hold for both.
    """
    scale, perturbed_scale = within(scale, t_lo, t_hi), within(perturbed_scale, t_lo, t_hi, 0.0)

    def push(t: Array, cond: Clean, uncond: Clean, perturbed: Clean) -> Clean:
        return _along((at(scale, t, cond.x) - 1, cond, uncond), (at(perturbed_scale, t, cond.x), cond, perturbed))

    return _guided(triple, ("cond", "uncond", "perturbed"), push, rescale)


def dual(
    triple: Triple,
    text_scale: Scale,
    image_scale: Scale,
    t_lo: float = 0.0,
    t_hi: float = 1.0,
    rescale: Array | float = 0.0,
) -> Denoiser:
    """x = x_0 + image_scale (x_i - x_0) + text_scale (x_ti - x_i), of two conditions, text and image.

    triple(x_t, t) -> (both, image alone, none). Brooks et al. 2023 (InstructPix2Pix, arXiv:2211.09800), equation 3.
    With both scales 1 it is the network under both conditions, exactly, and so it is outside the interval.
    """
    text_scale, image_scale = within(text_scale, t_lo, t_hi), within(image_scale, t_lo, t_hi)

    def push(t: Array, both: Clean, image: Clean, none: Clean) -> Clean:
        return _along((at(text_scale, t, both.x) - 1, both, image), (at(image_scale, t, both.x) - 1, image, none))

    return _guided(triple, ("both", "image", "none"), push, rescale)


def interval(guided: Denoiser, plain: Denoiser, t_lo: float, t_hi: float) -> Denoiser:
    """guided on t_lo <= t <= t_hi, plain elsewhere; when t is a scalar, only the one that is needed runs.

    Kynkaanniemi et al. 2024 (arXiv:2404.07724), equation 5, for any guidance: with plain the conditional network alone,
    steps outside cost one evaluation and not two. A batch of times evaluates both. Raises ValueError unless
    t_lo <= t_hi.
    """
    inside = within(1.0, t_lo, t_hi, 0.0)

    def denoise(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        if t.ndim == 0:
            return jax.lax.cond(inside(t) > 0, guided, plain, x_t, t)
        return jax.tree.map(lambda a, b: jnp.where(per_row(inside(t), a) > 0, a, b), guided(x_t, t), plain(x_t, t))

    return denoise
