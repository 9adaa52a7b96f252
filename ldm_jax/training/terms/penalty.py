"""What the latents themselves cost: a KL divergence, or the two errors of a codebook.

    kl           KL(N(mean, exp(logvar)) || N(0, 1)), summed over the latent and divided by the number of pixel values
    codebook     |sg(z) - e|^2,   commitment   |z - sg(e)|^2,   means over the latent

(Kingma & Welling 2014; van den Oord et al. 2017, eq. 3.) The number of pixel values in the place of the latent's keeps the meaning of
the KL's weight at any resolution. Encoders compute them (tasks/autoencoder/latent.py); here they get their weights.
"""

import jax.numpy as jnp

from ldm_jax.training.terms.term import Term


def make(name: str, weight: float, warmup_images: int = 0, batch_size: int = 1) -> Term:
    """The term of a penalty, whose weight is reached in a straight line over `warmup_images`."""

    def ramp(step):
        return jnp.minimum(1.0, step.astype(jnp.float32) * batch_size / warmup_images)

    return Term(
        name,
        "latent",
        lambda params, frozen, seen: seen.penalties[name],
        weight,
        ramp if warmup_images else None,
        validated=True,
    )
