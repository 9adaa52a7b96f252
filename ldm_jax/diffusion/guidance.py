"""Guidance makes a Denoiser out of Denoisers, so that every sampler works with every guidance.

Two estimates of one x_t differ by (dx, deps) with alpha dx + sigma deps = 0, so any multiple of a difference may be
added to an estimate and the sum still explains x_t. Most guidance is of this form, `cond + push`: the push is a
weighted sum of differences between branches, exactly zero at the scale called neutral. The rest shifts the score by
g = grad log p(y | x_t), which gives eps - sigma g and x + (sigma^2 / alpha) g, or clips x and recomputes eps from it. Only CFG++
gives a Clean that does not explain x_t.

`pair(x_t, t) -> (Clean, Clean)` holds the conditional and the unconditional estimate, in this order, and a triple one
more: denoiser.make_pair and make_branches, or any functions side by side, `lambda x_t, t: (*pair(x_t, t), third(x_t,
t))`. A negative prompt is the `uncond` of make_pair. A scale is a number, a traced scalar, [B], or a function of t that
returns one of these (`within`, `dynamic`): one compiled program serves every value.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser, Pair
from ldm_jax.diffusion.prediction import Clean, target, to_clean
from ldm_jax.diffusion.process import Process, per_row

Scale = Array | float | Callable[[Array], Array]
Triple = Callable[[Array, Array], tuple[Clean, Clean, Clean]]
Operator = Callable[[Array], Array]

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
    return lambda t: neutral + jnp.maximum((_value(scale, t) - neutral) * shape(t), floor)


def within(scale: Scale, t_lo: float, t_hi: float, neutral: float = 1.0) -> Callable[[Array], Array]:
    """scale on t_lo <= t <= t_hi, else neutral: an interval for one scale of several.

    Raises ValueError unless t_lo <= t_hi.
    """
    if isinstance(t_lo, int | float) and isinstance(t_hi, int | float) and not t_lo <= t_hi:
        raise ValueError(f"guidance interval is {t_lo}..{t_hi}, expected t_lo <= t_hi")
    return lambda t: jnp.where((t >= t_lo) & (t <= t_hi), _value(scale, t), neutral)


def _value(scale: Scale, t: Array) -> Array:
    return scale(t) if callable(scale) else jnp.asarray(scale)


def _at(scale: Scale, t: Array, like: Array) -> Array:
    return per_row(_value(scale, t), like)


def _dot(a: Array, b: Array) -> Array:
    """Inner product of each row, [B, 1, ...]."""
    return jnp.sum(a * b, tuple(range(1, a.ndim)), keepdims=True)


def _over(a: Array, b: Array, otherwise: float = 0.0) -> Array:
    """a / b where b > 0, else `otherwise`."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), otherwise)


def _root(a: Array) -> Array:
    """sqrt(a), of derivative 0 where a = 0, because dps differentiates through guidance."""
    return jnp.where(a > 0, jnp.sqrt(jnp.where(a > 0, a, 1)), 0)


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
        alpha, sigma = _root(_dot(by.eps, by.eps)), _root(_dot(by.x, by.x))
        norm = _root(alpha**2 + sigma**2)
        alpha, sigma = _over(alpha, norm), _over(sigma, norm)
        v, v_cond = alpha * eps - sigma * x, alpha * cond.eps - sigma * cond.x
        axes = tuple(range(1, x_t.ndim))
        std_cond, std = (_root(jnp.var(w, axes, keepdims=True)) for w in (v_cond, v))
        ratio = _over(std_cond, std, 1.0)
        dv = per_row(rescale, x_t) * (ratio - 1) * v
        return Clean(x - sigma * dv, eps + alpha * dv, cond.log_var)

    return denoise


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
        by = _at(scale, t, cond.x) - 1
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
        return uncond._replace(x=uncond.x + _along((_at(scale, t, x_t), cond, uncond)).x)

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
        dv = (_at(scale, t, v) - 1) * (v - _over(_dot(v, v_u), _dot(v_u, v_u)) * v_u)
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
        unit = _over(cond.x, _dot(cond.x, cond.x))
        size, limit = _root(_dot(d.x, d.x)), per_row(threshold, d.x)
        # An infinite limit is kept out of the quotient, whose derivatives would be inf * 0.
        shorter = jnp.where(size > limit, _over(jnp.where(size > limit, limit, 0), size), 1)
        weight = (_at(scale, t, d.x) - 1) * shorter
        parallel = (per_row(eta, d.x) - 1) * cond.x
        return Clean(weight * (d.x + _dot(d.x, unit) * parallel), weight * (d.eps + _dot(d.eps, unit) * parallel))

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
        return _along((_at(scale, t, cond.x) - 1, cond, uncond), (_at(perturbed_scale, t, cond.x), cond, perturbed))

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
        return _along((_at(text_scale, t, both.x) - 1, both, image), (_at(image_scale, t, both.x) - 1, image, none))

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


def _levels(process: Process, t: Array, like: Array) -> tuple[Array, Array]:
    return per_row(process.alpha(t), like), per_row(process.sigma(t), like)


def _shift_score(process: Process, clean: Clean, g: Array, t: Array) -> Clean:
    """score + g: eps - sigma g and x + (sigma^2 / alpha) g. Where alpha = 0, x_t does not depend on y, and g is dropped."""
    alpha, sigma = _levels(process, t, g)
    sigma = jnp.where(alpha > 0, sigma, 0)
    return clean._replace(x=clean.x + _over(sigma**2, alpha) * g, eps=clean.eps - sigma * g)


def classifier(
    denoise: Denoiser, log_prob: Callable[[Array, Array], Array], process: Process, scale: Scale
) -> Denoiser:
    """Classifier guidance, eps - scale sigma grad log p(y | x_t), with the x that fits this eps.

    log_prob(x_t [B, ...], t [B]) -> [B] is log p(y | x_t) of each row, by a classifier of noisy data; log_prob contains y.
    Dhariwal & Nichol 2021 (arXiv:2105.05233), equation 14 and algorithm 2. scale 0 is denoise itself; 1 is exact, by
    Bayes' rule, where denoise and the classifier are exact. Raises ValueError for a log_prob of another shape.
    """

    def guided(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)

        def total(x: Array) -> Array:
            value = log_prob(x, jnp.broadcast_to(t, x.shape[:1]))
            if value.shape != x.shape[:1]:
                raise ValueError(f"log_prob has shape {value.shape}, expected {x.shape[:1]}, a number for each row")
            return jnp.sum(value)  # rows are independent: the gradient of the sum is that of each

        return _shift_score(process, denoise(x_t, t), _at(scale, t, x_t) * jax.grad(total)(x_t), t)

    return guided


def _measure(
    denoise: Denoiser, operator: Operator, y: Array, x_t: Array, t: Array
) -> tuple[Clean, Array, Callable[[Array], tuple[Array]]]:
    """Clean, the residual y - A x and the pull-back v -> (d(A x) / dx_t)^T v, from one evaluation."""

    def measured(x: Array) -> tuple[Array, Clean]:
        clean = denoise(x, t)
        return operator(clean.x), clean

    value, pull, clean = jax.vjp(measured, x_t, has_aux=True)
    if y.shape != value.shape:
        raise ValueError(f"y has shape {y.shape}, expected that of operator(x), {value.shape}")
    return clean, y - value, pull


def dps(
    denoise: Denoiser, operator: Operator, y: Array, scale: Scale, process: Process, normalize: bool = False
) -> Denoiser:
    """Diffusion posterior sampling of y = A x + noise: the score moves by g = -(scale / 2) grad |y - A x(x_t)|^2.

    operator is A, any differentiable function f[B, ...] -> f[B, ...] of the clean estimate that acts on each row by itself; y has
    the shape of its output. The gradient goes through the network: one forward and one backward pass an evaluation. Chung et
    al. 2023 (arXiv:2209.14687), section 3.2; scale = 1 / std^2 for Gaussian noise of standard deviation std, 0 is
    denoise itself. normalize=True takes g = -scale grad |y - A x(x_t)| instead, the step size of their experiments.

    x gains (sigma^2 / alpha) g and eps loses sigma g, so any sampler will do. Their algorithm 1 instead takes an
    unguided step and subtracts zeta grad |y - A x|^2 from the state. A step of euler or ddim from t to s under this
    Denoiser is theirs with

        zeta = (scale / 2) sigma_t (alpha_s sigma_t / alpha_t - sigma_s);

    with normalize=True that is their zeta', where zeta = zeta' / |y - A x|. p(y | x_t) is taken at E[x | x_t], without the spread of x,
    so that a constant scale is too strong where there is much noise: let it depend on t, or use pigdm. Raises ValueError when y has
    another shape.
    """

    def guided(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean, residual, pull = _measure(denoise, operator, y, x_t, t)
        if normalize:
            residual = _over(residual, _root(_dot(residual, residual)))
        return _shift_score(process, clean, _at(scale, t, x_t) * pull(residual)[0], t)

    return guided


def pigdm(
    denoise: Denoiser,
    operator: Operator,
    y: Array,
    std: Array | float,
    process: Process,
    scale: Scale = 1.0,
    iterations: int = 1,
    tweedie: bool = False,
) -> Denoiser:
    """Pseudoinverse guidance of y = A x + std noise: g = scale (dx / dx_t)^T A^T (A C A^T + std^2)^-1 (y - A x(x_t)).

    C stands for Cov[x | x_t]. It is r^2 I with r^2 = sigma^2 sd^2 / (alpha^2 sd^2 + sigma^2), sd =
    process.sigma_data, exact for data N(m, sd^2 I): Song et al. 2023 (ICLR, openreview 9_gsMA8MRKQ). With tweedie=True
    it is (sigma^2 / alpha) dx / dx_t, exact for all Gaussian data: Boys et al. 2023 (arXiv:2310.06721), Finzi et al.
    2023 (arXiv:2306.07526). Unlike dps it needs no tuning: scale 1 is the posterior where C is exact; 0 is denoise itself.

    operator is linear and acts on each row by itself, f[B, ...] -> f[B, ...]. The inverse is `iterations` of conjugate gradients,
    row by row: exact after as many as A C A^T has distinct eigenvalues, 1 for a mask. One forward and one backward pass
    of the network, and with tweedie one more backward for each iteration. Raises ValueError for y of another shape and
    for iterations < 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected at least 1")

    def guided(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean, residual, pull = _measure(denoise, operator, y, x_t, t)
        transpose = jax.vjp(operator, clean.x)[1]
        alpha, sigma = _levels(process, t, x_t)
        spread = sigma**2 * process.sigma_data**2 / ((alpha * process.sigma_data) ** 2 + sigma**2)

        def covariance(v: Array) -> Array:
            shared = _over(sigma**2, alpha) * pull(v)[0] if tweedie else spread * transpose(v)[0]
            return operator(shared) + per_row(std, v) ** 2 * v

        solution = _conjugate_gradients(covariance, residual, iterations)
        return _shift_score(process, clean, _at(scale, t, x_t) * pull(solution)[0], t)

    return guided


def _conjugate_gradients(matrix: Operator, b: Array, iterations: int) -> Array:
    """x with matrix(x) = b, for a matrix that is symmetric and positive on each row; rows are independent."""

    def step(_, carry):
        x, rest, direction = carry
        image = matrix(direction)
        length = _over(_dot(rest, rest), _dot(direction, image))
        less = rest - length * image
        return x + length * direction, less, less + _over(_dot(less, less), _dot(rest, rest)) * direction

    return jax.lax.fori_loop(0, iterations, step, (jnp.zeros_like(b), b, b))[0]


def _with_x(process: Process, clean: Clean, x: Array, t: Array) -> Clean:
    """Another x, with the eps such that alpha x + sigma eps = x_t; at sigma = 0, where there is none, eps does not change."""
    alpha, sigma = _levels(process, t, x)
    return clean._replace(x=x, eps=clean.eps + _over(alpha, sigma) * (clean.x - x))


def static_threshold(
    denoise: Denoiser, process: Process, low: Array | float = -1.0, high: Array | float = 1.0
) -> Denoiser:
    """x clipped to [low, high], eps = (x_t - alpha x) / sigma re-derived from it.

    Ho et al. 2020 (arXiv:2006.11239), for data in [-1, 1]; Saharia et al. 2022 (Imagen, arXiv:2205.11487), section 2.3.
    Where nothing is clipped it is denoise itself, exactly. Raises ValueError unless low < high.
    """
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ValueError(f"clipping to [{low}, {high}], expected low < high")

    def clipped(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean = denoise(x_t, t)
        return _with_x(process, clean, jnp.clip(clean.x, per_row(low, x_t), per_row(high, x_t)), t)

    return clipped


def dynamic_threshold(
    denoise: Denoiser, process: Process, percentile: Array | float = 0.995, floor: Array | float = 1.0
) -> Denoiser:
    """x = floor clip(x, -s, s) / s with s = max(floor, the percentile of |x| over a row), eps re-derived as above.

    Saharia et al. 2022 (Imagen, arXiv:2205.11487), section 2.3, for large guidance scales on data in [-floor, floor].
    percentile is in (0, 1], between order statistics linearly. Where |x| <= floor it is denoise itself, exactly. Raises
    ValueError for a percentile out of range and a floor <= 0.
    """
    if isinstance(percentile, int | float) and not 0 < percentile <= 1:
        raise ValueError(f"percentile is {percentile}, expected a number in (0, 1]")
    if isinstance(floor, int | float) and not floor > 0:
        raise ValueError(f"floor is {floor}, expected a number > 0")

    def clipped(x_t: Array, t: Array) -> Clean:
        t = jnp.asarray(t, x_t.dtype)
        clean = denoise(x_t, t)
        size = jnp.quantile(jnp.abs(clean.x).reshape(x_t.shape[0], -1), jnp.asarray(percentile, x_t.dtype), axis=1)
        bound = per_row(floor, x_t)
        s = jnp.maximum(bound, per_row(size, x_t))
        return _with_x(process, clean, jnp.clip(clean.x, -s, s) * (bound / s), t)

    return clipped


GUIDANCES: dict[str, Callable[..., Denoiser]] = {
    "cfg": cfg,
    "autoguidance": autoguidance,
    "cfg_pp": cfg_pp,
    "cfg_zero": cfg_zero,
    "apg": apg,
    "third_branch": third_branch,
    "dual": dual,
    "interval": interval,
    "classifier": classifier,
    "dps": dps,
    "pigdm": pigdm,
    "static_threshold": static_threshold,
    "dynamic_threshold": dynamic_threshold,
}
