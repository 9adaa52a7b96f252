"""The metric sfid: the Fréchet distance of Inception's spatial features (Nash et al. 2021, arXiv:2103.03841)."""

from typing import Any

from ldm_jax.evaluation import fid
from ldm_jax.evaluation.metrics import GENERATED, Case, Figure, Metric

SPATIAL = (("moments", "spatial"),)


def figures(case: Case, network: str) -> dict[str, Any]:
    real = case.real.moments[network, "spatial"]
    warnings = fid.warnings(case, "sfid", real, len(real.mean))
    return {"sfid": fid.distance(case, network, "spatial"), "warnings": warnings}


METRIC = Metric(
    names=("sfid",),
    of=GENERATED,
    help="Frechet distance of Inception's spatial features",
    figures=figures,
    gives=lambda network: (Figure("sfid"),),
    networks=("inception",),
    takes=SPATIAL,
    compares=SPATIAL,
    least=2,
)
