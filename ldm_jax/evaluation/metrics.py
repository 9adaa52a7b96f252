"""The type of a metric: what it takes of one pass over the images, what else it needs, which figures it gives.

Each metric has a file, which ends with its METRIC; table.py lists them. A metric without a feature network gives one set
of figures. A metric of feature networks gives one set for each network of --features that it can be measured with. Figures of Inception
have the published names (fid, kid). Figures of other networks are named after the network (fd_dinov2, kd_dinov2), because the two are
not comparable. The key 'precision' of a row is that of the arithmetic; the metric prdc gives precision_inception.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.evaluation import features, images, one_pass, reference
from ldm_jax.training import restore
from ldm_jax.training.experiment import Experiment

# The headings under which `ldm evaluate --help` lists the metrics.
GENERATED = "Of generated images, by the networks of --features"
PIXELS = "Of a diffusion run in pixels"
RECONSTRUCTIONS = "Of an autoencoder's reconstructions (a grid of them beside their originals is always written)"


class Settings(NamedTuple):
    """How to measure, whatever the metric.

    `reference` is 'split:NAME' or an npz. Features of at most `subset` images are kept. `seed` is that of random subsets and resamples.
    These three are in the row, and so are the `plugins`, {file name: sha256}. `folder` is where statistics of real images are kept,
    `pictures` where grids go; `quiet` means no progress bars.
    """

    reference: str
    folder: pathlib.Path
    pictures: pathlib.Path
    subset: int = 10_000
    seed: int = 0
    quiet: bool = False
    plugins: Mapping[str, str] = {}


class Case(NamedTuple):
    """What the figures of one set of images are computed from.

    `networks` are the feature extractors by name. `options` holds the values of the flags that the metrics read, by name. `run` is the
    diffusion model that draws the images. The rest is filled in by evaluate.measure: `seen` is what the pass over the `images`
    collected, `real` is the same of the reference, `prepared` is what `Metric.prepare` returned, by the metric's first name. `mark`
    tells pictures of this evaluation from those of another evaluation of the same step.
    """

    images: images.Images
    config: Experiment
    networks: Mapping[str, features.Extractor]
    settings: Settings
    options: Mapping[str, Any] = {}
    run: restore.Restored | None = None
    seen: one_pass.Seen | None = None
    real: reference.Reference | None = None
    prepared: Mapping[str, Any] = {}
    mark: str = ""


class Flag(NamedTuple):
    """A flag --`name` of `ldm evaluate` that a metric brings along.

    argparse makes a value of its text by `type`. `check`(value) raises ValueError in one line that names the flag, before anything is
    read. `open`(value) is what the metric reads in Case.options; without the flag it reads `default`.
    """

    name: str
    metavar: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    check: Callable[[Any], None] = lambda value: None
    open: Callable[[Any], Any] = lambda value: value


class Figure(NamedTuple):
    """A number of the row by which a checkpoint may be chosen: its name there, its unit, and whether a higher value is better."""

    name: str
    unit: str = ""
    higher: bool = False


class Need(NamedTuple):
    """What a metric needs of the images or besides them: `met`(case) says whether it is there, `what` names it in the error."""

    met: Callable[[Case], bool]
    what: str


LABELS = Need(lambda case: case.images.classes > 0, "images that were told a class")
PROMPTS = Need(lambda case: case.images.prompts is not None, "a run that takes captions, and no --samples")
ORIGINALS = Need(lambda case: "original" in case.images.holds, "the run of an autoencoder, and no --samples")

Each = Callable[[Case, dict[str, np.ndarray], slice], dict[str, Any]]


class Metric(NamedTuple):
    """One metric of `ldm evaluate`.

    names     as --metrics spells it; several names mean the same measurement
    of        the heading that it is listed under; `help` is its line there
    figures   (case, network) -> {name: figure}, and 'warnings' where there are any; network is '' for a metric without
    gives     (network) -> the figures by which a checkpoint may be chosen
    networks  names of the extractors that it can be measured with; ('any',) for all, () for a metric without
    takes     (how, output) of that network's outputs, or of the batch (one_pass.py)
    compares  (how, output) of the reference, likewise
    needs     what has to be there besides
    each      (case, batch, which) -> {name: f[b]}: figures of single images, kept as case.seen.values
    least     the fewest images that it can be measured of
    check     (case) raises ValueError for images of which it cannot be measured; no image has been made yet
    flags     the flags that it brings along
    reads     names of other flags that it reads: 'seed' and 'out' (in Case.settings), or one in Case.options
    prepare   (case) -> what is computed before the images are made, kept as case.prepared[names[0]]
    origin    (case) -> the keys of the row that say what its figures depend on, besides what every row says
    """

    names: tuple[str, ...]
    of: str
    help: str
    figures: Callable[[Case, str], dict[str, Any]]
    gives: Callable[[str], tuple[Figure, ...]]
    networks: tuple[str, ...] = ()
    takes: tuple[tuple[str, str], ...] = ()
    compares: tuple[tuple[str, str], ...] = ()
    needs: tuple[Need, ...] = ()
    each: Each | None = None
    least: int = 1
    check: Callable[[Case], None] | None = None
    flags: tuple[Flag, ...] = ()
    reads: tuple[str, ...] = ()
    prepare: Callable[[Case], Any] | None = None
    origin: Callable[[Case], dict[str, Any]] = lambda case: {}


def option(case: Case, flag: Flag) -> Any:
    """The value of a metric's flag, or its default."""
    return case.options.get(flag.name, flag.default)


def means(*figures: str) -> Callable[[Case, str], dict[str, Any]]:
    """`Metric.figures` of a metric whose figures are the means of those of single images."""
    return lambda case, _: {name: float(case.seen.values[name].mean()) for name in figures}


def subsets(case: Case, network: str) -> tuple[np.ndarray, np.ndarray]:
    """The features f[n, D] and f[m, D] of the subsets of the images and of the reference."""
    generated, real = (rows["subset", network, "features"] for rows in (case.seen.rows, case.real.rows))
    return generated, real


def suffix(network: str) -> str:
    """What a figure's name ends in: nothing for Inception, and the name of any other network."""
    return "" if network == "inception" else f"_{network}"


def networks_of(metric: Metric, available: Iterable[str]) -> list[str]:
    """Those of the `available` extractors that a metric is measured with; [''] for a metric without."""
    if not metric.networks:
        return [""]
    return [name for name in available if name in metric.networks or metric.networks == ("any",)]


def takes_of(outputs: tuple[tuple[str, str], ...], networks: Iterable[str]) -> set[one_pass.Take]:
    """A metric's `takes` or `compares` of each of the networks; 'label' and 'image' are of the batch itself."""
    return {
        (how, "" if output in ("label", "image") else network, output)
        for network in networks
        for how, output in outputs
    }
