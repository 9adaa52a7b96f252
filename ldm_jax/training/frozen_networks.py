"""Frozen networks by name, 'KIND:WHERE': what a loss sees images with, and is not trained."""

import pathlib
from typing import Any

from ldm_jax import runs, weights
from ldm_jax.training import open_stage
from ldm_jax.weights import lpips


def classifier(where: str) -> tuple[Any, Any]:
    """(module, parameters) of a finished run of the task classifier, its first average. Raises ValueError for any other run."""
    experiment, params, _ = open_stage.trained(pathlib.Path(where), "classifier")
    if not runs.read(where).is_finished:
        raise ValueError(f"{where} is not finished; expected a classifier that no longer changes")
    return experiment.network, params["classifier"]


LOADERS = {
    "classifier": classifier,
    "dinov2": weights.load,
    "lpips": lambda where: lpips.load(*where.split(",")),
}


def load(name: str) -> tuple[Any, Any]:
    """(module, parameters) of 'classifier:DIR', 'dinov2:DIR' or 'lpips:FILE,FILE'. Raises ValueError for another kind."""
    kind, _, where = name.partition(":")
    if kind not in LOADERS:
        raise ValueError(f"{name!r} names no frozen network; expected {', '.join(f'{kind}:...' for kind in LOADERS)}")
    return LOADERS[kind](where)
