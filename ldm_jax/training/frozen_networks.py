"""Frozen networks by name, 'KIND:WHERE': what a loss sees images with, and is not trained."""

import pathlib
from typing import Any

from ldm_jax import models, runs, weights
from ldm_jax.training import open_stage
from ldm_jax.weights import files, lpips


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


def _classifier_shapes(where: str) -> tuple[Any, Any]:
    experiment = open_stage.parse(runs.read(where).config)
    side = experiment.input.resolution
    return experiment.network, models.shapes(experiment.network, (side, side, 3))["params"]


def _published_shapes(where: str) -> tuple[Any, Any]:
    network = weights.module_of(files.read_json(pathlib.Path(where) / "config.json"))[1]
    return network, models.shapes(network)["params"]


# The same of the networks that conditions see with, whose parameters are shapes: what a config is checked with.
DESCRIBED = {"classifier": _classifier_shapes, "dinov2": _published_shapes}


def described(name: str) -> tuple[Any, Any]:
    """(module, parameters as shapes) of 'classifier:DIR' or 'dinov2:DIR'; no parameter is read. Raises ValueError for another kind."""
    kind, _, where = name.partition(":")
    if kind not in DESCRIBED:
        raise ValueError(f"{name!r} names no frozen network; expected {', '.join(f'{kind}:...' for kind in DESCRIBED)}")
    return DESCRIBED[kind](where)


def load(name: str) -> tuple[Any, Any]:
    """(module, parameters) of 'classifier:DIR', 'dinov2:DIR' or 'lpips:FILE,FILE'. Raises ValueError for another kind."""
    kind, _, where = name.partition(":")
    if kind not in LOADERS:
        raise ValueError(f"{name!r} names no frozen network; expected {', '.join(f'{kind}:...' for kind in LOADERS)}")
    return LOADERS[kind](where)
