"""The adversarial term of a first stage: a discriminator D of patches cannot tell reconstructions y from images x.

    loss              of the discriminator, a mean over patches              of the autoencoder
    hinge             (relu(1 - D(x)) + relu(1 + D(y))) / 2                  -D(y)
    vanilla           (softplus(-D(x)) + softplus(D(y))) / 2                 -D(y)
    non_saturating    the same                                               softplus(-D(y))

(Lim & Ye 2017, arXiv:1705.02894; Goodfellow et al. 2014, arXiv:1406.2661, eq. 1 and section 3, D the logit there; the first two as
in Esser et al. 2021 and Rombach et al. 2022.) What the autoencoder minimizes is weighed against its other loss by the gradients of
both at the kernel L of its last layer,

    weight * clip(|grad_L nll| / (|grad_L g| + 1e-4), 0, 1e4)                                             (Esser et al. 2021, eq. 7)

Added to the discriminator's loss where asked:

    r1 / 2  E |grad_x D(x)|^2                                       Mescheder et al. 2018, arXiv:1801.04406, eq. 9
    lecam   E relu(D(x) - a_y)^2 + E relu(a_x - D(y))^2             Tseng et al. 2021, arXiv:2104.03310, section 3

with a_x, a_y the running means of D(x), D(y); Tseng's text has no relu, their code has.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.nn import relu, softplus

from ldm_jax.models.discriminator import NORMS, PatchDiscriminator
from ldm_jax.training.task import Context
from ldm_jax.training.terms.term import Term

DECAY = 0.99  # of LeCam's running means, as in Tseng's code


def hinge(real: Array, fake: Array) -> Array:
    """f32[] of logits of any shape."""
    return 0.5 * (jnp.mean(relu(1.0 - real)) + jnp.mean(relu(1.0 + fake)))


def vanilla(real: Array, fake: Array) -> Array:
    """f32[] of logits of any shape."""
    return 0.5 * (jnp.mean(softplus(-real)) + jnp.mean(softplus(fake)))


# The discriminator's loss of (D(x), D(y)).
LOSSES: dict[str, Callable[[Array, Array], Array]] = {"hinge": hinge, "vanilla": vanilla, "non_saturating": vanilla}


def generator_loss(name: str, fake: Array) -> Array:
    """What the autoencoder minimizes, f32[], against the discriminator's loss of that name in LOSSES."""
    return jnp.mean(softplus(-fake)) if name == "non_saturating" else -jnp.mean(fake)


def slope(logits: Callable[[Array], Array], x: Array) -> Array:
    """E |grad_x D(x)|^2, f32[], with D(x) of an image the mean of its logits[B, h, w, 1]: the same for any number of patches."""
    gradient = jax.grad(lambda x: jnp.sum(jnp.mean(logits(x), axis=(1, 2, 3))))(x)
    return jnp.mean(jnp.sum(jnp.square(gradient), axis=(1, 2, 3)))


class Anchors(NamedTuple):
    """Running means of D(x) and D(y), both f32[], 0 before the first batch."""

    real: Array
    fake: Array


def follow(anchors: Anchors, real: Array, fake: Array) -> Anchors:
    """The anchors after a batch of logits."""
    return jax.tree.map(lambda a, b: a + (1 - DECAY) * (jnp.mean(b) - a), anchors, Anchors(real, fake))


def lecam_error(real: Array, fake: Array, anchors: Anchors) -> Array:
    """LeCam's regularizer of logits of any shape, f32[]."""
    return jnp.mean(jnp.square(relu(real - anchors.fake))) + jnp.mean(jnp.square(relu(anchors.real - fake)))


# --- the discriminator ---------------------------------------------------------------------------------------------------


def logits(network: PatchDiscriminator, params: Any, norms: Any, x: Array) -> tuple[Array, Any]:
    """D(x) f32[B, h, w, 1] as in training, and the variables of D's norms after it."""
    y, changed = network.apply({"params": params, "state": norms}, x, train=True, mutable=["state"])
    return y, changed.get("state", {})


def make(
    context: Context,
    *,
    width: int = 64,
    layers: int = 3,
    norm: str = "batch",
    loss: str = "hinge",
    weight: float = 0.5,
    adaptive: bool = True,
    start_images: int = 0,
    r1: float = 0.0,
    lecam: float = 0.0,
    optimizer: Mapping[str, Any] = {},
) -> Term:
    """config.task.adversarial. Its network is 'discriminator'; its variables are those of D's norms, and LeCam's anchors.

    width, layers, norm  of models.discriminator
    loss                 a name in LOSSES
    weight, adaptive     weight of the autoencoder's adversarial loss, times the ratio of gradients with `adaptive`
    start_images         until so many images are seen the autoencoder's weight is 0 and the discriminator does not move
    r1, lecam            weights of the two regularizers, 0 for none
    optimizer            keys of config.optimizer in which the discriminator's optimizer differs

    Raises ValueError naming the key that is off.
    """
    for key, value, table in (("loss", loss, LOSSES), ("norm", norm, NORMS)):
        if value not in table:
            raise ValueError(f"task.adversarial.{key} is {value!r}; there are {', '.join(table)}")
    if r1 and norm == "batch":
        raise ValueError(
            f"task.adversarial.r1 is {r1} with norm 'batch', through which an image's logits depend on the others; "
            "expected 'group', 'spectral' or 'none'"
        )
    if not isinstance(adaptive, bool):
        raise ValueError(f"task.adversarial.adaptive is {adaptive!r}; expected True or False")
    for key, value in (("weight", weight), ("start_images", start_images), ("r1", r1), ("lecam", lecam)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"task.adversarial.{key} is {value!r}; expected a number of at least 0")
    if context.accumulate > 1:
        raise ValueError(
            f"config.train.accumulate={context.accumulate} with task.adversarial; expected 1: a batch norm's statistics and the "
            "adaptive weight are those of the whole batch"
        )
    network = PatchDiscriminator(width, layers, norm, context.network.dtype)
    first = math.ceil(start_images / context.batch_size)  # step of the first adversarial loss

    def init(key, x, z):
        del z
        made = network.init(jax.random.fold_in(key, 2), x)
        variables = {"discriminator": made.get("state", {})}
        if lecam:
            variables["anchors"] = Anchors(jnp.zeros(()), jnp.zeros(()))
        return made["params"], variables

    def fool(params, frozen, seen):
        del frozen
        fake, _ = logits(network, params, seen.variables["discriminator"], seen.y)
        return generator_loss(loss, fake)

    def tell_apart(params, variables, x, y):
        norms = variables["discriminator"]
        real, after = logits(network, params, norms, x)
        fake, after = logits(network, params, after, y)
        total, after = LOSSES[loss](real, fake), {"discriminator": after}
        if r1:
            total += 0.5 * r1 * slope(lambda x: logits(network, params, norms, x)[0], x)
        if lecam:
            total += lecam * lecam_error(real, fake, variables["anchors"])
            after["anchors"] = follow(variables["anchors"], real, fake)
        return total, (
            {"discriminator_loss": total, "logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake)},
            after,
        )

    return Term(
        "adversarial",
        "image",
        fool,
        weight,
        ramp=lambda step: jnp.where(step >= first, 1.0, 0.0),
        balance="decoder" if adaptive else "",
        network="discriminator",
        init=init,
        # Not a loss of 0: Adam's moments would count steps without a gradient.
        optimizer=optax.conditionally_mask(
            context.optimizer(start_images=start_images, **optimizer), lambda step: step >= first
        ),
        opponent=tell_apart,
    )
