"""What `ldm evaluate` measures of a run: one JSON object a checkpoint, with everything that says how the figures were made.

images.py and its neighbours say where images come from, one_pass.py what is collected from them, reference.py what they are compared
with, table.py lists what is computed from that. Here a set of metrics is checked, measured and written down.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ldm_jax.data import contact_sheet
from ldm_jax.evaluation import one_pass, reference
from ldm_jax.evaluation.metrics import Case, networks_of, takes_of
from ldm_jax.evaluation.table import METRICS
from ldm_jax.kernels import processes
from ldm_jax.runs import provenance


def check_networks(metrics: Sequence[str], available: Collection[str]) -> None:
    """Raise ValueError for a metric none of whose feature networks is `available`."""
    for name in metrics:
        metric = METRICS[name]
        if metric.networks and not networks_of(metric, available):
            expected = {"any": "inception or --features=classifier:DIR", "inception": "inception"}
            first = metric.networks[0]
            raise ValueError(f"{name} needs --features={expected.get(first, first + ':DIR')}")


def check(case: Case, metrics: Sequence[str]) -> None:
    """Raise ValueError for a metric that lacks what it needs, or that cannot be measured of such images."""
    check_networks(metrics, case.networks)
    for name in metrics:
        metric = METRICS[name]
        for need in metric.needs:
            if not need.met(case):
                raise ValueError(f"{name} needs {need.what}")
        if case.images.count < metric.least:
            raise ValueError(f"{name} needs at least {metric.least} images; there are {case.images.count}")
        if metric.check:
            metric.check(case)


def origin(case: Case, metrics: Sequence[str]) -> dict[str, Any]:
    """All that the figures depend on but the code and the machine, as JSON reads it back: the beginning of the row.

    Raises ValueError for a metric that lacks what it needs.
    """
    check(case, metrics)
    chosen = [METRICS[name] for name in metrics]
    row = {"num": case.images.count, **case.images.made_by, "precision": case.config.dtype}
    row["metrics"] = ",".join(sorted(metrics))
    if case.settings.plugins:
        row["plugins"] = case.settings.plugins
    measured = {network for metric in chosen for network in networks_of(metric, case.networks)}
    if used := [name for name in case.networks if name in measured]:
        row["features"] = ",".join(used)
        row["features_sha256"] = ",".join(case.networks[name].sha256 for name in used)
    if any(metric.compares for metric in chosen):
        row["reference"] = case.settings.reference
    if any(how == "subset" for metric in chosen for how, _ in metric.takes):
        row["subset"] = min(case.settings.subset, case.images.count)
    for metric in chosen:
        for key, value in metric.origin(case).items():
            row.setdefault(key, value)
    return json.loads(json.dumps(row))


def _reference(case: Case, takes: set[one_pass.Take]) -> reference.Reference:
    settings = case.settings
    return reference.open_reference(
        settings.reference,
        case.config,
        takes,
        case.networks,
        cap=settings.subset,
        folder=settings.folder,
        say="" if settings.quiet else settings.reference,
    )


def measure(case: Case, metrics: Sequence[str]) -> dict[str, Any]:
    """The JSON object of one set of images, measured by the names of METRICS.

    Raises ValueError when a metric lacks what it needs, before any image is made.
    """
    row, settings, made_by = origin(case, metrics), case.settings, case.images.made_by
    case = case._replace(mark=hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8])
    # Each metric once, whatever its names, with the networks that it is measured with.
    chosen = {METRICS[name]: networks_of(METRICS[name], case.networks) for name in metrics}
    if compared := set().union(*(takes_of(metric.compares, networks) for metric, networks in chosen.items())):
        case = case._replace(real=_reference(case, compared))
        row |= {"reference_num": case.real.count, "reference_sha256": case.real.sha256}
    case = case._replace(prepared={metric.names[0]: metric.prepare(case) for metric in chosen if metric.prepare})
    takes = set().union(*(takes_of(metric.takes, networks) for metric, networks in chosen.items()))
    scores = [functools.partial(metric.each, case) for metric in chosen if metric.each]
    if "original" in case.images.holds:
        takes |= {("few", "", "original"), ("few", "", "image")}
    if takes or scores:
        say = f"step {made_by['step']}" if "step" in made_by else made_by["images"]
        seen = one_pass.collect(
            case.images,
            case.networks,
            takes,
            scores=scores,
            cap=settings.subset,
            folder=settings.folder,
            say="" if settings.quiet else say,
        )
        case = case._replace(seen=seen)
    warnings = []
    for metric, networks in chosen.items():
        for network in networks:
            figures = metric.figures(case, network)
            warnings += figures.pop("warnings", [])
            row |= figures
    if "original" in case.images.holds:
        row["picture"] = str(side_by_side(case))
    if warnings:
        row["warnings"] = warnings
    return row | {
        "commit": provenance.commit(),
        "machine": provenance.machine(),
    }


def side_by_side(case: Case) -> pathlib.Path:
    """The path of a grid of originals, each with its reconstruction to the right of it."""
    pairs = np.stack([case.seen.rows["few", "", name] for name in ("original", "image")], 1)
    path = case.settings.pictures / f"side_by_side_{case.images.made_by.get('step', 0):07d}_{case.mark}.png"
    if processes.is_first():
        contact_sheet.save(path, pairs.reshape(-1, *pairs.shape[2:]), columns=8)
    return path
