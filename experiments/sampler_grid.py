"""Sampler x steps x guidance from one checkpoint: what sampling alone is worth, in Frechet distance and class accuracy.

LDM_CHECKPOINT and LDM_CLASSIFIER name the trained runs (default: runs/cifar10_ldm_dit, runs/cifar10_classifier).

    ldm train --config=configs/cifar10_classifier.py --workdir=runs/cifar10_classifier
    ldm train --config=configs/cifar10_ldm_dit.py --workdir=runs/cifar10_ldm_dit
    ldm sweep experiments/sampler_grid.py --workdir=runs/sampler_grid --publish=experiments/sampler_grid
"""

import os

from ldm_jax.sweeps import Plot, Study, evaluate_only, product, sweep


def get_study() -> Study:
    classifier = os.environ.get("LDM_CLASSIFIER", "runs/cifar10_classifier")
    return Study(
        name="sampler_grid",
        title="CIFAR-10 latent DiT: sampler, steps and guidance (250 images)",
        runs=product(
            sweep("sampler", ["ddim", "heun", "dpmpp_2m"]),
            sweep("guidance", [1.0, 2.0, 4.0]),
            sweep("steps", [6, 12, 24]),
        ),
        commands=evaluate_only(
            os.environ.get("LDM_CHECKPOINT", "runs/cifar10_ldm_dit"),
            metrics="fid,accuracy",
            features=f"classifier:{classifier}",
            num=250,
        ),
        objective="fd_classifier",
        columns=("fd_classifier", "accuracy"),
        plot=(
            Plot(x="steps", y="fd_classifier", hue="guidance", facet="sampler", log_x=True),
            Plot(x="steps", y="accuracy", hue="guidance", facet="sampler", log_x=True),
        ),
    )
