"""The metric fid_by_class: the Fréchet distance of the images of each class to the reference's images of that class."""

from typing import Any

import numpy as np

from ldm_jax.evaluation import fid, frechet
from ldm_jax.evaluation.metrics import GENERATED, LABELS, Case, Metric

ROWS = (("all", "features"), ("all", "label"))


def figures(case: Case, network: str) -> dict[str, Any]:
    """A list by class. A class of which either side has fewer than 2 images has None and a warning: the others' figures count."""
    (generated, labels), (real, real_labels) = (
        (rows["all", network, "features"], rows["all", "", "label"]) for rows in (case.seen.rows, case.real.rows)
    )
    shared = np.isin(labels, real_labels)
    if not shared.all():
        generated, labels = generated[shared], labels[shared]
    result = frechet.by_class(generated, labels, real, real_labels)
    figure = f"{fid.figure_name(network)}_by_class"
    classes = max(case.images.classes, int(real_labels.max()) + 1)
    distances = [result.distances.get(k) for k in range(classes)]
    lines = []
    if result.warnings:
        lines.append(f"{figure}: {result.warnings[0]} (this holds for {len(result.warnings)} classes)")
    if none := [k for k, distance in enumerate(distances) if distance is None]:
        lines.append(f"{figure}: null for the classes {none}, of which either side has fewer than 2 images")
    return {figure: distances, "warnings": lines}


METRIC = Metric(
    names=("fid_by_class",),
    of=GENERATED,
    help="fid class by class, null for a class of which either side has fewer than two images",
    figures=figures,
    gives=lambda network: (),
    networks=("any",),
    takes=ROWS,
    compares=ROWS,
    needs=(LABELS,),
    least=2,
)
