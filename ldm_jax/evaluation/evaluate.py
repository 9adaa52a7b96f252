"""What `ldm evaluate` measures of a run: one JSON object a checkpoint, with everything that says how the figures were made.

images.py says where images come from, one_pass.py what is taken of them on the way, reference.py what they are compared with,
metrics.py what is made of it. Here a set of metrics is checked, measured and written down.
"""

import functools
import hashlib
import json
import pathlib
import platform
import subprocess
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

import ldm_jax
from ldm_jax.data import grid
from ldm_jax.evaluation import clip_score, one_pass, reference
from ldm_jax.evaluation.metrics import METRICS, NEEDS, Case, networks_of, takes_of
from ldm_jax.training import experiment


def commit() -> str:
    """The revision of the code, with '+' when there are changes to it; its version where there is no repository."""
    here = pathlib.Path(__file__).parent

    def git(*words):
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", pathlib.Path(__file__).name
        )  # an installed one may lie in a repository of something else
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ldm_jax.__version__


def check_networks(metrics: Sequence[str], at_hand: Collection[str]) -> None:
    """Raise ValueError for a metric whose feature network is not at hand."""
    for name in metrics:
        metric = METRICS[name]
        if metric.networks and not networks_of(metric, at_hand):
            known = {"any": "inception or --features=classifier:DIR", "inception": "inception"}
            raise ValueError(f"{name} needs --features={known.get(metric.networks[0], metric.networks[0] + ':DIR')}")


def check(case: Case, metrics: Sequence[str]) -> None:
    """Raise ValueError for a metric that lacks what it needs, or that cannot be measured of such images."""
    check_networks(metrics, case.networks)
    for name in metrics:
        metric = METRICS[name]
        for word in metric.needs:
            there, what = NEEDS[word]
            if not there(case):
                raise ValueError(f"{name} needs {what}")
        if case.images.count < metric.least:
            raise ValueError(f"{name} needs at least {metric.least} images; there are {case.images.count}")
        if metric.check:
            metric.check(case)


def origin(case: Case, metrics: Sequence[str]) -> dict[str, Any]:
    """All that the figures depend on but the code and the machine, as JSON reads it back: the beginning of the row.

    Raises ValueError for a metric that lacks what it needs.
    """
    check(case, metrics)
    row = {"num": case.images.count, **case.images.made_by, "precision": experiment.dtype(case.config)}
    row["metrics"] = ",".join(sorted(metrics))
    used = [
        name for name in case.networks if any(name in networks_of(METRICS[m], list(case.networks)) for m in metrics)
    ]
    if used:
        row["features"] = ",".join(used)
        row["features_sha256"] = ",".join(case.networks[name].sha256 for name in used)
    if any(METRICS[m].compares for m in metrics):
        row["reference"] = case.settings.reference
    taken = {take for m in metrics for take in METRICS[m].takes}
    if any(how == "subset" for how, _ in taken):
        row["subset"] = min(case.settings.subset, case.images.count)
    if ("moments", "features") in taken:
        row["draws"] = case.settings.draws
        row.setdefault("seed", case.settings.seed)
    if "lpips" in metrics:
        row["lpips_sha256"] = case.lpips.sha256
    if "bits" in metrics:
        row["bits_steps"] = case.settings.steps
    return json.loads(json.dumps(row))


def measure(case: Case, metrics: Sequence[str]) -> dict[str, Any]:
    """The JSON object of one set of images, measured by the names of METRICS.

    Raises ValueError when a metric lacks what it needs, before any image is made.
    """
    row, settings = origin(case, metrics), case.settings
    case = case._replace(mark=hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8])
    wanted = {METRICS[name]: networks_of(METRICS[name], case.networks) for name in metrics}
    compared = set().union(*(takes_of(metric.compares, networks) for metric, networks in wanted.items()))
    if compared:
        real = reference.open_reference(
            settings.reference,
            case.config,
            compared,
            case.networks,
            cap=settings.subset,
            folder=settings.folder,
            say="" if settings.quiet else settings.reference,
        )
        row |= {"reference_num": real.count, "reference_sha256": real.sha256}
        case = case._replace(real=real)
    if "clip" in metrics:
        rows = one_pass.numbers(case.images.count, settings.subset)
        case = case._replace(texts=clip_score.text_embeds(case.clip_folder, [case.images.prompts[i] for i in rows]))
    takes = set().union(*(takes_of(metric.takes, networks) for metric, networks in wanted.items()))
    scores = [functools.partial(metric.each, case) for metric in wanted if metric.each is not None]
    if "original" in case.images.holds:
        takes |= {("few", "", "original"), ("few", "", "image")}
    if takes or scores:
        made_by = case.images.made_by
        seen = one_pass.collect(
            case.images,
            case.networks,
            takes,
            scores=scores,
            cap=settings.subset,
            folder=settings.folder,
            say="" if settings.quiet else f"step {made_by['step']}" if "step" in made_by else made_by["images"],
        )
        case = case._replace(seen=seen)
    warnings = []
    for metric, networks in wanted.items():
        for network in networks:
            found = metric.figures(case, network)
            warnings += found.pop("warnings", [])
            row |= found
    if "original" in case.images.holds:
        row["picture"] = str(side_by_side(case))
    if warnings:
        row["warnings"] = warnings
    return row | {
        "commit": commit(),
        "machine": f"{platform.machine()} {jax.devices()[0].platform} x{jax.device_count()}",
    }


def side_by_side(case: Case) -> pathlib.Path:
    """A grid of originals, each with its reconstruction to the right of it."""
    pairs = np.stack([case.seen.rows["few", "", name] for name in ("original", "image")], 1)
    path = case.settings.pictures / f"side_by_side_{case.images.made_by.get('step', 0):07d}_{case.mark}.png"
    if jax.process_index() == 0:
        grid.save(path, pairs.reshape(-1, *pairs.shape[2:]), columns=8)
    return path
