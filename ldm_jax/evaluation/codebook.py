"""The metric codebook: how many entries of a codebook are used, and its perplexity exp(-sum p log p), p the share of each entry.

The shares are over the latent pixels of all the images; models.vq.usage computes the same of a batch.
"""

from typing import Any

import numpy as np

from ldm_jax.evaluation.metrics import RECONSTRUCTIONS, Case, Figure, Metric, Need


def figures(case: Case, network: str) -> dict[str, Any]:
    size = case.config.network.num_vq_embeddings
    chosen = sum(np.bincount(row.ravel(), minlength=size) for row in case.seen.rows["all", "", "indices"])
    p = chosen[chosen > 0] / chosen.sum()
    perplexity = float(np.exp(-np.sum(p * np.log(p))))
    return {"codebook_usage": len(p) / size, "codebook_perplexity": perplexity, "codebook_size": size}


METRIC = Metric(
    names=("codebook",),
    of=RECONSTRUCTIONS,
    help="usage and perplexity of the codebook",
    figures=figures,
    gives=lambda network: (
        Figure("codebook_usage", "share", higher=True),
        Figure("codebook_perplexity", "entries", higher=True),
    ),
    takes=(("all", "indices"),),
    needs=(Need(lambda case: "indices" in case.images.holds, "an autoencoder with a codebook (vq, fsq)"),),
)
