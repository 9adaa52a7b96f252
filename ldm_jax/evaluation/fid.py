"""The metric fid: the Fréchet distance of features (frechet.py) to those of the reference (Heusel et al. 2017, arXiv:1706.08500).

It is called fid with Inception's features alone, else fd_<network>. Beside it stand its extrapolation to infinitely many images
(`_infinity`, with the error of the fit) and a 95 % interval (`_low`, `_high`), both from the features of the subset.
"""

from typing import Any

from ldm_jax.evaluation import frechet, statistics
from ldm_jax.evaluation.metrics import GENERATED, Case, Figure, Flag, Metric, option


def _check_draws(draws: int) -> None:
    if draws < 40 and draws != 0:
        raise ValueError(f"--draws={draws}; expected at least 40 (or 0)")


DRAWS = Flag("draws", "N", "resamples of the 95 %% interval; 0: none (100)", int, 100, _check_draws)
MOMENTS, SUBSET = (("moments", "features"),), (("subset", "features"),)


def figure_name(network: str) -> str:
    """The name of a Fréchet distance in these features: 'fid' for Inception's last pooled ones, else 'fd_<network>'."""
    return "fid" if network == "inception" else f"fd_{network}"


def distance(case: Case, network: str, output: str = "features") -> float:
    """d² of the moments of one output of a network, over all the images and over the whole reference."""
    generated, real = statistics.gaussian(case.seen.moments[network, output]), case.real.moments[network, output]
    return frechet.distance(generated.mean, generated.covariance, real.mean, real.covariance)


def warnings(case: Case, figure: str, real: statistics.Gaussian, dim: int) -> list[str]:
    """A line for each side that has too few images for features of width `dim`; a file may not say how many it was made of."""
    sides = {"": case.images.count, " (reference)": real.n}
    lines = {side: frechet.too_few(n, dim) for side, n in sides.items() if n}
    return [f"{figure}{side}: {line}" for side, line in lines.items() if line]


def figures(case: Case, network: str, prefix: str = "") -> dict[str, Any]:
    """The figures of the metrics fid and rfid, whose names begin with `prefix`."""
    figure = prefix + figure_name(network)
    real, rows = case.real.moments[network, "features"], case.seen.rows["subset", network, "features"]
    value, draws, seed = distance(case, network), option(case, DRAWS), case.settings.seed
    row: dict[str, Any] = {figure: value}
    if len(rows) >= frechet.LEAST:
        line = frechet.infinity(rows, real, seed)
        row |= {f"{figure}_infinity": line.value, f"{figure}_infinity_error": line.error}
    if draws:
        low, high = frechet.bootstrap(rows, real, draws, seed, (value, case.images.count))
        row |= {f"{figure}_low": low, f"{figure}_high": high}
    return row | {"warnings": warnings(case, figure, real, case.networks[network].dim)}


def gives(network: str, prefix: str = "") -> tuple[Figure, ...]:
    name = prefix + figure_name(network)
    return Figure(name), Figure(f"{name}_infinity")


METRIC = Metric(
    names=("fid", "fd"),
    of=GENERATED,
    help="Frechet distance, with its value for infinitely many images and a 95 % interval; called fid with Inception's features "
    "alone, else fd_classifier, fd_dinov2, fd_clip",
    figures=figures,
    gives=gives,
    networks=("any",),
    takes=MOMENTS + SUBSET,
    compares=MOMENTS,
    least=2,
    flags=(DRAWS,),
    reads=("seed",),
    origin=lambda case: {"draws": option(case, DRAWS), "seed": case.settings.seed},
)
