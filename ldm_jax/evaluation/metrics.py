"""Every metric of `ldm evaluate`: what it takes of one pass over the images, what else it needs, and its figures.

METRICS is the one table. A metric without a feature network gives one set of figures; one of `networks` gives one for each that is
at hand. Figures of Inception have the published names (fid, kid); those of other networks are called after them (fd_dinov2,
kd_dinov2), since the two are not comparable. A row's 'precision' is that of the arithmetic: prdc gives precision_inception.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.data import grid
from ldm_jax.data.preprocess import crop_image
from ldm_jax.evaluation import (
    accuracy,
    bits,
    clip_score,
    cmmd,
    features,
    frechet,
    inception_score,
    kid,
    neighbours,
    one_pass,
    precision_recall,
    reference,
    shapes,
    similarity,
    spectrum,
    statistics,
)
from ldm_jax.evaluation import images as sources
from ldm_jax.training import experiment
from ldm_jax.training.images import from_uint8
from ldm_jax.weights import lpips as lpips_weights

KID_SUBSET = 1000
NEAREST, SHOWN = 4, 8


class Settings(NamedTuple):
    """How to measure.

    `reference`: 'split:NAME' or an npz. `subset`: images whose features are kept, at most. `draws` of the bootstrap (0: no
    interval). `seed` of subsets and draws. `steps` of bits. All of these are in the row. `folder`: where statistics of real images
    are kept; `pictures`: where grids go; `quiet`: no progress bars.
    """

    reference: str
    folder: pathlib.Path
    pictures: pathlib.Path
    subset: int = 10_000
    draws: int = 100
    seed: int = 0
    steps: int = 25
    quiet: bool = False


class Lpips(NamedTuple):
    """`distance`: (x, y) u8[b, H, W, 3] -> f32[b]; `sha256` identifies the weights."""

    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    sha256: str


class Case(NamedTuple):
    """What figures are made of. `seen` of the `images`, `real` of the reference; the others where a metric asks for them.

    `networks`: extractors by name. `clip_folder`: of the extractor 'clip'. `run`: the diffusion model that drew the images.
    `texts` f[n, P]: CLIP's embeddings of the prompts of the subset. `mark`: tells pictures of this evaluation from those of
    another of the same step.
    """

    images: sources.Images
    config: ConfigDict
    networks: Mapping[str, features.Extractor]
    settings: Settings
    seen: one_pass.Seen | None = None
    real: reference.Reference | None = None
    clip_folder: str = ""
    lpips: Lpips | None = None
    run: experiment.Restored | None = None
    texts: np.ndarray | None = None
    mark: str = ""


Each = Callable[[Case, dict[str, np.ndarray], slice], dict[str, Any]]


class Metric(NamedTuple):
    """`figures`(case, network) -> {name: figure}, with 'warnings' among them where there are any.

    `networks`: names of the extractors that it is for ('any'; (): none). `takes`: (how, output) of that network, or of the batch;
    `compares`: what is taken of the reference. `needs`: words of NEEDS. `each`(case, batch, which) -> {name: f[b]}: figures of
    single images. `least` images that it can be measured of. `check`(case) raises ValueError for images, not made yet, of which
    it cannot be measured. `gives`: the figures that a checkpoint may be chosen by; `choices` fills in the network.
    """

    figures: Callable[[Case, str], dict[str, Any]]
    networks: tuple[str, ...] = ()
    takes: tuple[tuple[str, str], ...] = ()
    compares: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()
    each: Each | None = None
    least: int = 1
    check: Callable[[Case], None] | None = None
    gives: tuple[str, ...] = ()


# What a metric may need of the images, or besides them: (is it there?, what to say where it is not).
NEEDS: dict[str, tuple[Callable[[Case], bool], str]] = {
    "labels": (lambda case: case.images.classes > 0, "images that were told a class"),
    "prompts": (lambda case: case.images.prompts is not None, "a run that takes captions, and no --samples"),
    "original": (lambda case: "original" in case.images.holds, "the run of an autoencoder, and no --samples"),
    "nats": (lambda case: "nats" in case.images.holds, "an autoencoder with a posterior (autoencoder_kl)"),
    "indices": (lambda case: "indices" in case.images.holds, "an autoencoder with a codebook (vq, fsq)"),
    "lpips": (lambda case: case.lpips is not None, "--lpips=VGG16.pth,HEADS.pth"),
    "training": (
        lambda case: not getattr(experiment.source(case.config, "train"), "is_latent", False),
        "the training images, and this run's data are latents",
    ),
    "run": (lambda case: case.run is not None, "a diffusion run, and no --samples"),
    "pixels": (
        lambda case: case.run.model.stage is None,
        "a model of pixels: this run diffuses in latents, whose density is not that of images",
    ),
}


def _suffix(network: str) -> str:
    return "" if network == "inception" else f"_{network}"


def _means(*figures: str) -> Callable[[Case, str], dict[str, Any]]:
    return lambda case, _: {name: float(case.seen.values[name].mean()) for name in figures}


# --- distances of distributions ------------------------------------------------------------------------------------------


def _distance(case: Case, network: str, output: str) -> float:
    made = statistics.gaussian(case.seen.moments[network, output])
    wanted = case.real.moments[network, output]
    return frechet.distance(made.mean, made.covariance, wanted.mean, wanted.covariance)


def _fd(case: Case, network: str, prefix: str = "") -> dict[str, Any]:
    figure = prefix + features.figure_name(case.networks[network])
    wanted, rows = case.real.moments[network, "features"], case.seen.rows["subset", network, "features"]
    found: dict[str, Any] = {figure: _distance(case, network, "features")}
    if len(rows) >= 20:
        line = frechet.infinity(rows, wanted, case.settings.seed)
        found |= {f"{figure}_infinity": line.value, f"{figure}_infinity_error": line.error}
    if case.settings.draws:
        of = found[figure], case.images.count
        low, high = frechet.bootstrap(rows, wanted, case.settings.draws, case.settings.seed, of)
        found |= {f"{figure}_low": low, f"{figure}_high": high}
    return found | {"warnings": _too_few(case, figure, wanted, case.networks[network].dim)}


def _too_few(case: Case, figure: str, wanted: statistics.Gaussian, dim: int) -> list[str]:
    """A line for each side that has too few images; a file may not say how many it was made of."""
    sides = {"": case.images.count, " (reference)": wanted.n}
    lines = {side: frechet.too_few(n, dim) for side, n in sides.items() if n}
    return [f"{figure}{side}: {line}" for side, line in lines.items() if line]


def _sfid(case: Case, network: str) -> dict[str, Any]:
    wanted = case.real.moments[network, "spatial"]
    warnings = _too_few(case, "sfid", wanted, len(wanted.mean))
    return {"sfid": _distance(case, network, "spatial"), "warnings": warnings}


def _fd_by_class(case: Case, network: str) -> dict[str, Any]:
    """None, with a warning, for a class of which either side has fewer than 2 images: the others' figures are worth having."""
    (made, labels), (wanted, known) = (
        (rows["all", network, "features"], rows["all", "", "label"]) for rows in (case.seen.rows, case.real.rows)
    )
    both = np.isin(labels, known)
    if not both.all():
        made, labels = made[both], labels[both]
    found = frechet.by_class(made, labels, wanted, known)
    figure = f"{features.figure_name(case.networks[network])}_by_class"
    distances = [found.distances.get(k) for k in range(max(case.images.classes, int(known.max()) + 1))]
    lines = [f"{figure}: {found.warnings[0]} (this holds for {len(found.warnings)} classes)"] if found.warnings else []
    if none := [k for k, distance in enumerate(distances) if distance is None]:
        lines.append(f"{figure}: null for the classes {none}, of which either side has fewer than 2 images")
    return {figure: distances, "warnings": lines}


def _kd(network: str) -> str:
    return "kid" if network == "inception" else f"kd_{network}"


def _kid(case: Case, network: str) -> dict[str, Any]:
    made, wanted = (rows["subset", network, "features"] for rows in (case.seen.rows, case.real.rows))
    size = min(KID_SUBSET, len(made), len(wanted))
    found = kid.kid(made, wanted, subset_size=size)
    figure = _kd(network)
    error = kid.standard_error(made, wanted)
    return {figure: found.mean, f"{figure}_std": found.std, f"{figure}_error": error, "kid_subset_size": size}


def _prdc(case: Case, network: str) -> dict[str, Any]:
    made, wanted = (rows["subset", network, "features"] for rows in (case.seen.rows, case.real.rows))
    found = precision_recall.precision_recall(wanted, made)
    return {f"{name}_{network}": value for name, value in found._asdict().items()}


def _cmmd(case: Case, network: str) -> dict[str, Any]:
    made, wanted = (rows["subset", network, "features"] for rows in (case.seen.rows, case.real.rows))
    return {"cmmd": cmmd.cmmd(made, wanted)}


def _score(case: Case, network: str) -> dict[str, Any]:
    found = inception_score.inception_score(case.seen.rows["all", network, "logits"])
    return {"inception_score": found.mean, "inception_score_std": found.std}


# --- what was asked for --------------------------------------------------------------------------------------------------


def _check_accuracy(case: Case) -> None:
    classifier = case.networks["classifier"]
    blank = np.zeros((1, classifier.resolution, classifier.resolution, 3), np.uint8)
    known = classifier.outputs(blank)["logits"].shape[-1]
    if known < case.images.classes:
        raise ValueError(f"accuracy: the classifier knows {known} classes; these images are of {case.images.classes}")


def _accuracy(case: Case, network: str) -> dict[str, Any]:
    rows = case.seen.rows
    result = accuracy.accuracy(rows["all", network, "logits"], rows["all", "", "label"])
    by_class = [None if np.isnan(v) else round(float(v), 4) for v in result.by_class]  # None: no image was asked for
    return {"accuracy": result.total, "accuracy_by_class": by_class}


def _clip_score(case: Case, network: str) -> dict[str, Any]:
    scores = clip_score.score(case.seen.rows["subset", network, "features"], case.texts)
    return {"clip_score": float(scores.mean())}


SHAPES = ("kind", "colour", "both", "size", "count", "relation", "all")


def _check_shapes(case: Case) -> None:
    for prompt in case.images.prompts:
        shapes.parse(prompt)


def _each_shapes(case: Case, batch: dict[str, np.ndarray], which: slice) -> dict[str, Any]:
    pairs = zip(batch["image"], case.images.prompts[which])
    found = [shapes.score(image[None], [prompt]) for image, prompt in pairs]
    return {f"shapes_{name}": [np.nan if f[name] is None else f[name] for f in found] for name in SHAPES}


def _shapes(case: Case, _: str) -> dict[str, Any]:
    """Means over the images whose caption speaks of it; None where none does."""
    values = {f"shapes_{name}": case.seen.values[f"shapes_{name}"] for name in SHAPES}
    return {name: float(np.nanmean(v)) if np.isfinite(v).any() else None for name, v in values.items()}


# --- copies of training images -------------------------------------------------------------------------------------------


def _neighbours(case: Case, network: str) -> dict[str, Any]:
    """The figures, and a grid: at the left the generated images nearest to training ones, beside each its nearest, by distance."""
    split = case.config.split.train
    training = sources.real(case.config, split)
    takes = [("all", name, "features") for name in case.networks]  # in one pass; the next network finds its file
    settings, say = case.settings, "" if case.settings.quiet else f"split:{split}"
    measured = reference.measure(training, takes, case.networks, cap=settings.subset, folder=settings.folder, say=say)
    known = measured.rows["all", network, "features"]
    rows, distances = neighbours.nearest(case.seen.rows["subset", network, "features"], known, NEAREST)
    source = experiment.source(case.config, "train")
    pictures, captions = [], []
    for i in np.argsort(distances[:, 0])[:SHOWN]:
        pictures.append(case.seen.rows["subset", "", "image"][i])
        captions.append("generated")
        for row, distance in zip(rows[i], distances[i]):
            image = source[int(row)]["image"]
            pictures.append(crop_image(image, case.config.input.resolution, case.config.input.crop, source.where(row)))
            captions.append(f"{distance:.3g}")
    path = settings.pictures / f"neighbours{_suffix(network)}_{case.images.made_by.get('step', 0):07d}_{case.mark}.png"
    if jax.process_index() == 0:
        grid.save(path, np.stack(pictures), 1 + NEAREST, labels=captions)
    shares = neighbours.memorised(rows, distances, known)._asdict()
    return {f"{name}{_suffix(network)}": share for name, share in shares.items()} | {
        f"neighbours{_suffix(network)}": str(path),
        "training": f"split:{split}",
        "training_num": len(known),
    }


# --- autoencoders --------------------------------------------------------------------------------------------------------


def _each(figure: str, of_pairs: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Each:
    return lambda case, batch, which: {figure: of_pairs(batch["image"], batch["original"])}


def _each_kl(case: Case, batch: dict[str, np.ndarray], which: slice) -> dict[str, Any]:
    return {"kl_bits": batch["nats"] / (np.log(2) * batch["mean"][0].size)}


def _codebook(case: Case, _: str) -> dict[str, Any]:
    """Over the latent pixels of all the images; see models.vq.usage."""
    size = experiment.network(case.config).num_vq_embeddings
    chosen = sum(np.bincount(row.ravel(), minlength=size) for row in case.seen.rows["all", "", "indices"])
    p = chosen[chosen > 0] / chosen.sum()
    perplexity = float(np.exp(-np.sum(p * np.log(p))))
    return {"codebook_usage": len(p) / size, "codebook_perplexity": perplexity, "codebook_size": size}


def _each_latents(case: Case, batch: dict[str, np.ndarray], which: slice) -> dict[str, Any]:
    z = batch["mean"].astype(np.float64)
    square = z**2 + np.square(batch["std"], dtype=np.float64) if "std" in batch else z**2
    return {"latent_mean": z.mean((1, 2)), "latent_square": square.mean((1, 2))}


def _latents(case: Case, _: str) -> dict[str, Any]:
    """Mean and variance of each channel of drawn latents; power of their means by radial frequency (spectrum.py)."""
    mean, square = (case.seen.values[name].mean(0) for name in ("latent_mean", "latent_square"))
    z, originals = (case.seen.rows["some", "", name] for name in ("mean", "original"))
    found = {
        "latent_mean": mean.tolist(),
        "latent_variance": (square - mean**2).tolist(),
        "latent_power": spectrum.radial(z).power.tolist(),
        "latent_high_share": spectrum.high_share(z),
    }
    if min(*z.shape[1:3], *originals.shape[1:3]) >= spectrum.BLOCK:
        found["latent_excess"] = spectrum.excess(z, originals)
    return found


def lpips(vgg: str, heads: str) -> Lpips:
    """LPIPS with the published files (weights/lpips.py). ValueError for files that do not hold it."""
    module, params = lpips_weights.load(vgg, heads)

    def distance(params, pairs):
        x, y = jax.numpy.split(from_uint8(pairs), 2, axis=1)  # the one above the other
        with jax.default_matmul_precision("highest"):
            return module.apply({"params": params}, x, y)

    run = features.batched(distance, params, sources.BATCH)
    return Lpips(lambda x, y: run(np.concatenate([x, y], axis=1)), features.params_sha256(params))


# --- likelihood ----------------------------------------------------------------------------------------------------------


def _bits(case: Case, _: str) -> dict[str, Any]:
    return bits.bits(case.run, num=case.images.count, steps=case.settings.steps, seed=case.settings.seed)


# --- the table -----------------------------------------------------------------------------------------------------------

MOMENTS, SUBSET = (("moments", "features"),), (("subset", "features"),)
BY_CLASS, SPATIAL = (("all", "features"), ("all", "label")), (("moments", "spatial"),)
_FD = Metric(_fd, ("any",), MOMENTS + SUBSET, MOMENTS, least=2, gives=("{fd}", "{fd}_infinity"))
PRDC = tuple(f"{name}_{{network}}" for name in precision_recall.Manifold._fields)

METRICS: dict[str, Metric] = {
    "fid": _FD,
    "fd": _FD,
    "sfid": Metric(_sfid, ("inception",), SPATIAL, SPATIAL, least=2, gives=("sfid",)),
    "fid_by_class": Metric(_fd_by_class, ("any",), BY_CLASS, BY_CLASS, needs=("labels",), least=2),
    "is": Metric(_score, ("inception",), (("all", "logits"),), least=10, gives=("inception_score",)),
    "kid": Metric(_kid, ("any",), SUBSET, SUBSET, least=4, gives=("{kd}",)),
    "prdc": Metric(_prdc, ("any",), SUBSET, SUBSET, least=4, gives=PRDC),
    "cmmd": Metric(_cmmd, ("clip",), SUBSET, SUBSET, gives=("cmmd",)),
    "clip": Metric(_clip_score, ("clip",), SUBSET, needs=("prompts",), gives=("clip_score",)),
    "accuracy": Metric(
        _accuracy,
        ("classifier",),
        (("all", "logits"), ("all", "label")),
        needs=("labels",),
        check=_check_accuracy,
        gives=("accuracy",),
    ),
    "shapes": Metric(
        _shapes,
        needs=("prompts",),
        each=_each_shapes,
        check=_check_shapes,
        gives=tuple(f"shapes_{name}" for name in SHAPES),
    ),
    "neighbours": Metric(
        _neighbours,
        ("any",),
        (*SUBSET, ("subset", "image")),
        needs=("training",),
        gives=("copied{suffix}", "authentic{suffix}"),
    ),
    "bits": Metric(_bits, needs=("run", "pixels"), least=2, gives=("bits",)),
    "psnr": Metric(_means("psnr"), needs=("original",), each=_each("psnr", similarity.psnr), gives=("psnr",)),
    "ssim": Metric(_means("ssim"), needs=("original",), each=_each("ssim", similarity.ssim), gives=("ssim",)),
    "lpips": Metric(
        _means("lpips"),
        needs=("original", "lpips"),
        each=lambda case, batch, which: {"lpips": case.lpips.distance(batch["image"], batch["original"])},
        gives=("lpips",),
    ),
    "rfid": _FD._replace(
        figures=lambda case, network: _fd(case, network, "r"),
        needs=("original",),
        gives=tuple(f"r{figure}" for figure in _FD.gives),
    ),
    "codebook": Metric(
        _codebook,
        takes=(("all", "indices"),),
        needs=("indices",),
        gives=("codebook_usage", "codebook_perplexity"),
    ),
    "kl": Metric(_means("kl_bits"), needs=("nats",), each=_each_kl, gives=("kl_bits",)),
    "latents": Metric(
        _latents,
        takes=(("some", "mean"), ("some", "original")),
        needs=("original",),
        each=_each_latents,
        gives=("latent_high_share", "latent_excess"),
    ),
}

HIGHER_IS_BETTER = (
    "inception_score", "precision", "recall", "density", "coverage", "clip_score", "accuracy", "shapes_", "psnr", "ssim",
    "codebook_usage", "codebook_perplexity", "authentic",
)  # fmt: skip


def better(figure: str) -> int:
    """1 where the greater of two values of a figure is the better one, -1 where the smaller is."""
    return 1 if figure.startswith(HIGHER_IS_BETTER) else -1


def networks_of(metric: Metric, at_hand: Iterable[str]) -> list[str]:
    """The extractors that a metric is measured with; [''] for one that takes none."""
    if not metric.networks:
        return [""]
    return [name for name in at_hand if name in metric.networks or metric.networks == ("any",)]


def takes_of(wanted: tuple[tuple[str, str], ...], networks: Iterable[str]) -> set[one_pass.Take]:
    """A metric's `takes` or `compares`, with the network that each is of; 'label' and 'image' are the batch's own."""
    return {
        (how, "" if output in ("label", "image") else network, output) for network in networks for how, output in wanted
    }


def choices(metrics: Iterable[str], networks: Mapping[str, features.Extractor]) -> list[str]:
    """Names of the figures that these metrics give, with these networks, to choose a checkpoint by."""
    found: dict[str, None] = {}
    for metric in map(METRICS.__getitem__, metrics):
        for name in networks_of(metric, networks):
            words = {"network": name, "suffix": _suffix(name), "kd": _kd(name)}
            words["fd"] = features.figure_name(networks[name]) if name else ""
            found |= dict.fromkeys(figure.format(**words) for figure in metric.gives)
    return list(found)
