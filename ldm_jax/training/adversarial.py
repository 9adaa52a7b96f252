"""The adversarial term of a first stage: reconstructions y that a discriminator D of patches cannot tell from images x.

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

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import relu, softplus

from ldm_jax.models.discriminator import NORMS, PatchDiscriminator

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
    """What the autoencoder minimizes, f32[], in the game of that name in LOSSES."""
    return jnp.mean(softplus(-fake)) if name == "non_saturating" else -jnp.mean(fake)


class Adversarial(NamedTuple):
    """The keys of config.task.adversarial.

    width, layers, norm  of models.discriminator
    loss                 a name in LOSSES
    weight, adaptive     the weight of the autoencoder's adversarial loss, times the ratio of gradients with `adaptive`
    start_images         until so many images are seen the autoencoder's weight is 0 and the discriminator stands still
    r1, lecam            weights of the two regularizers, 0 for none
    optimizer            where the discriminator's differs from config.optimizer
    """

    width: int = 64
    layers: int = 3
    norm: str = "batch"
    loss: str = "hinge"
    weight: float = 0.5
    adaptive: bool = True
    start_images: int = 0
    r1: float = 0.0
    lecam: float = 0.0
    optimizer: Mapping[str, Any] = {}


def check(settings: Adversarial) -> None:
    """Raise ValueError naming the key of config.task.adversarial that is off."""
    for key, known in (("loss", LOSSES), ("norm", NORMS)):
        value = getattr(settings, key)
        if value not in known:
            raise ValueError(f"task.adversarial.{key} is {value!r}; there are {', '.join(known)}")
    if settings.r1 and settings.norm == "batch":
        raise ValueError(
            f"task.adversarial.r1 is {settings.r1} with norm 'batch', through which an image's logits depend on the others; "
            "expected 'group', 'spectral' or 'none'"
        )
    if not isinstance(settings.adaptive, bool):
        raise ValueError(f"task.adversarial.adaptive is {settings.adaptive!r}; expected True or False")
    for key in ("weight", "start_images", "r1", "lecam"):
        value = getattr(settings, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"task.adversarial.{key} is {value!r}; expected a number of at least 0")


def adaptive_weight(g_nll: Array, g_adv: Array) -> Array:
    """|g_nll| / (|g_adv| + 1e-4) of two gradients of one shape, within [0, 1e4]: f32[]."""
    return jnp.clip(jnp.linalg.norm(g_nll.ravel()) / (jnp.linalg.norm(g_adv.ravel()) + 1e-4), 0.0, 1e4)


def r1(logits: Callable[[Array], Array], x: Array) -> Array:
    """E |grad_x D(x)|^2, f32[], with D(x) of an image the mean of its logits[B, h, w, 1]: the same for any number of patches."""
    slope = jax.grad(lambda x: jnp.sum(jnp.mean(logits(x), axis=(1, 2, 3))))(x)
    return jnp.mean(jnp.sum(jnp.square(slope), axis=(1, 2, 3)))


class Anchors(NamedTuple):
    """Running means of D(x) and D(y), both f32[], 0 before the first batch."""

    real: Array
    fake: Array


def follow(anchors: Anchors, real: Array, fake: Array) -> Anchors:
    """The anchors after a batch of logits."""
    return jax.tree.map(lambda a, b: a + (1 - DECAY) * (jnp.mean(b) - a), anchors, Anchors(real, fake))


def lecam(real: Array, fake: Array, anchors: Anchors) -> Array:
    """LeCam's regularizer of logits of any shape, f32[]."""
    return jnp.mean(jnp.square(relu(real - anchors.fake))) + jnp.mean(jnp.square(relu(anchors.real - fake)))


# --- the discriminator ---------------------------------------------------------------------------------------------------


def init(settings: Adversarial, network: PatchDiscriminator, key: Array, x: Array) -> tuple[Any, dict[str, Any]]:
    """Parameters of the discriminator, and its variables: what its norms carry, and LeCam's anchors where they are used."""
    made = network.init(key, x)
    variables = {"discriminator": made.get("state", {})}
    if settings.lecam:
        variables["anchors"] = Anchors(jnp.zeros(()), jnp.zeros(()))
    return made["params"], variables


def logits(network: PatchDiscriminator, params: Any, carried: Any, x: Array) -> tuple[Array, Any]:
    """D(x) f32[B, h, w, 1] as training sees it, and what the norms carry afterwards."""
    found, changed = network.apply({"params": params, "state": carried}, x, train=True, mutable=["state"])
    return found, changed.get("state", {})


def discriminator_loss(
    settings: Adversarial, network: PatchDiscriminator, params: Any, variables: dict[str, Any], x: Array, y: Array
) -> tuple[Array, tuple[dict[str, Array], dict[str, Any]]]:
    """(loss f32[], (metrics, variables after it)) of images and reconstructions f32[B, H, W, 3]."""
    real, carried = logits(network, params, variables["discriminator"], x)
    fake, carried = logits(network, params, carried, y)
    loss, after = LOSSES[settings.loss](real, fake), {"discriminator": carried}
    if settings.r1:
        loss += 0.5 * settings.r1 * r1(lambda x: logits(network, params, variables["discriminator"], x)[0], x)
    if settings.lecam:
        loss += settings.lecam * lecam(real, fake, variables["anchors"])
        after["anchors"] = follow(variables["anchors"], real, fake)
    return loss, ({"discriminator_loss": loss, "logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake)}, after)
