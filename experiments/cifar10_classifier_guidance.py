"""Classifier guidance beside classifier-free guidance, from one checkpoint: names against Frechet distance (Dhariwal & Nichol 2021).

LDM_CHECKPOINT, LDM_NOISY and LDM_CLASSIFIER name the trained runs (default: runs/cifar10_ldm_dit, runs/cifar10_noisy_latent and
runs/cifar10_classifier), LDM_NUM the images a run (200). experiments/cifar10_classifier_guidance/README.md has the commands.

    classifier    the denoiser draws its null class (--guidance=0), the classifier of noisy latents guides
    cfg           classifier-free guidance
    both          the denoiser draws the class, and the classifier guides besides
"""

import os
import pathlib

from ldm_jax.sweeps import Plot, Study, chain, evaluate_only, fixed, product, sweep

PLACES = {
    "checkpoint": "runs/cifar10_ldm_dit",
    "noisy": "runs/cifar10_noisy_latent",
    "classifier": "runs/cifar10_classifier",
    "num": "200",
}


def get_study() -> Study:
    place = {name: os.environ.get(f"LDM_{name.upper()}", default) for name, default in PLACES.items()}
    shared = {
        "metrics": "fid,accuracy",
        "features": f"classifier:{place['classifier']}",
        "reference": "split:test",
        "num": int(place["num"]),
        "steps": 12,
    }

    def commands(overrides: dict, folder: pathlib.Path) -> list[list[str]]:
        flags = {key: value for key, value in overrides.items() if key != "method"}
        guide = {"classifier": place["noisy"]} if "classifier-scale" in flags else {}
        return evaluate_only(place["checkpoint"], **shared, **guide)(flags, folder)

    scales = sweep("classifier-scale", [0.0, 1.0, 2.0, 4.0, 8.0, 16.0])
    return Study(
        name="cifar10_classifier_guidance",
        title=f"CIFAR-10 latent DiT: guided by a classifier, or by itself ({place['num']} images)",
        runs=chain(
            product(fixed("method", "classifier"), fixed("guidance", 0.0), scales),
            product(fixed("method", "cfg"), sweep("guidance", [1.0, 1.5, 2.0, 4.0])),
            product(fixed("method", "both"), fixed("guidance", 1.0), sweep("classifier-scale", [2.0])),
        ),
        commands=commands,
        objective="fd_classifier",
        columns=("fd_classifier", "accuracy"),
        plot=(
            Plot(x="fd_classifier", y="accuracy", hue="method"),
            Plot(x="classifier-scale", y="accuracy", where={"method": "classifier"}),
        ),
    )
