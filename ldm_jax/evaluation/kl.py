"""The metric kl: KL(posterior || N(0, I)) of an autoencoder's latents in bits a latent dimension, the mean over the images."""

from typing import Any

import numpy as np

from ldm_jax.evaluation.metrics import RECONSTRUCTIONS, Case, Figure, Metric, Need, means


def each(case: Case, batch: dict[str, np.ndarray], which: slice) -> dict[str, Any]:
    return {"kl_bits": batch["nats"] / (np.log(2) * batch["mean"][0].size)}


METRIC = Metric(
    names=("kl",),
    of=RECONSTRUCTIONS,
    help="bits a latent dimension of the posterior",
    figures=means("kl_bits"),
    gives=lambda network: (Figure("kl_bits", "bits/dim"),),
    needs=(Need(lambda case: "nats" in case.images.holds, "an autoencoder with a posterior (autoencoder_kl)"),),
    each=each,
)
