"""What `ldm evaluate` measures of a run: one JSON object a checkpoint, with everything that says how the figure was made.

fid         Frechet distance of generated against reference images (Heusel et al. 2017, eq. 6); with the features of another
            network than Inception it is called fd_<name>, for the two are not comparable
accuracy    how often a classifier names the class that an image was asked to show, in all and by class
shapes      the same for captions of shapes, by the programmatic reader: kind, colour, count, relation
psnr        reconstructions of an autoencoder, in dB
"""

import json
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import ldm_jax
from ldm_jax.data import shapes
from ldm_jax.data.subset import spread
from ldm_jax.evaluation import accuracy, features, frechet, generate, statistics
from ldm_jax.training import checkpoint, experiment, sampling
from ldm_jax.training.images import from_uint8, to_uint8

METRICS = ("fid", "accuracy", "shapes", "psnr")


class Images(NamedTuple):
    """Images to be judged: batches u8[b, H, W, 3], N in all; what they were asked to show; how they came to be (JSON)."""

    batches: Callable[[], Iterator[np.ndarray]]
    count: int
    labels: np.ndarray | None
    prompts: list[str] | None
    made_by: dict[str, Any]


# --- where images come from ----------------------------------------------------------------------------------------------


def prompts_from(config: ConfigDict, where: str, num: int) -> list[str]:
    """`num` captions: of 'split:NAME' of the run's data in order, or the lines of a text file, repeated."""
    if where.startswith("split:"):
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.split.report = where.removeprefix("split:")
        source = experiment.source(config, "report")
        return [source[i % len(source)]["text"] for i in range(num)]
    path = pathlib.Path(where)
    if not path.is_file():
        raise FileNotFoundError(
            f"--prompts={where} does not exist; expected a text file, one prompt a line, or split:NAME"
        )
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompts={where} holds no line")
    return [lines[i % len(lines)] for i in range(num)]


def generated(
    run: experiment.Restored,
    settings: sampling.Settings,
    *,
    num: int,
    seed: int,
    ema: str,
    prompts: str = "",
    quiet: bool = False,
) -> Images:
    """`num` samples of a run; `prompts` as in prompts_from, by default the captions of the reporting split."""
    given: list[str] = []
    if run.model.conditioning.text is not None:
        prompts = prompts or f"split:{run.config.split.report}"
        given = prompts_from(run.config, prompts, num)
    elif prompts:
        raise ValueError(f"--prompts={prompts}: this run takes no captions")
    what = generate.told(run, num, (), given)

    def batches():
        return generate.draw(
            run,
            settings,
            what,
            count=num,
            seed=seed,
            tokenizer=experiment.tokenizer(run.config),
            batch_size=run.config.sampler.batch_size,
            quiet=quiet,
        )

    made_by = {"step": run.step, "checkpoint": run.sha256, "ema": ema, "seed": seed}
    made_by |= {"sampler" if k == "name" else k: v for k, v in settings._asdict().items()}
    made_by["evaluations"] = sampling.evaluations(settings)
    if prompts:
        made_by["prompts"] = prompts
    return Images(batches, num, what.labels, what.prompts, made_by)


def reconstructed(workdir: pathlib.Path, config: ConfigDict, step: int, average: str | None, num: int) -> Images:
    """Reconstructions of `num` reporting images, evenly spread, from the posterior's mean."""
    report = spread(experiment.source(config, "report"), num)
    num = len(report)
    network = experiment.network(config)
    params = checkpoint.restore_params(workdir, step, average)["autoencoder"]

    @jax.jit
    def decode(params, images):
        mean = network.apply({"params": params}, from_uint8(images), method="encode").mean
        return to_uint8(network.apply({"params": params}, mean, method="decode"))

    def batches():
        for batch in experiment.one_pass(config, report, 64):
            yield np.asarray(decode(params, batch["image"]))[batch["valid"]]

    made_by = {"step": step, "checkpoint": checkpoint.identity(workdir, step), "ema": average or "none"}
    return Images(batches, num, None, None, made_by | {"images": "reconstructions"})


def real(config: ConfigDict, split: str, limit: int | None = None, judged: bool = False) -> Images:
    """Images of a split of the run's own data set (`limit` of them, evenly spread), prepared as in training.

    `judged`: read their labels too, for accuracy.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.split.report = split
    images = experiment.source(config, "report")
    if getattr(images, "is_latent", False):
        raise ValueError(
            f"split:{split} of this run holds latents, not images; give --reference=FILE.npz, or train with the images in "
            "config.data and the latents in config.first_stage.latents"
        )
    images = spread(images, limit or len(images))
    count = len(images)
    labels = np.array([images[i]["label"] for i in range(count)], np.int32) if judged and images.num_classes else None

    def batches():
        for batch in experiment.one_pass(config, images, 64):
            yield batch["image"][batch["valid"]]

    return Images(
        batches, count, labels, None, {"images": f"split:{split}", "data": fingerprint(config, images, count)}
    )


def from_file(path: pathlib.Path) -> Images:
    """samples.npz as `ldm sample` writes it: arr_0 u8[N, H, W, 3], and `labels` i32[N] if there are any."""
    if not path.is_file():
        raise FileNotFoundError(f"--samples={path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
            labels = file["labels"].astype(np.int32) if "labels" in file.files else None
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"--samples={path}: expected an npz with arr_0 u8[N,H,W,3] ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"--samples={path}: arr_0 is {images.dtype}{list(images.shape)}; expected uint8[N, H, W, 3]")

    def batches():
        for start in range(0, len(images), 64):
            yield images[start : start + 64]

    return Images(batches, len(images), labels, None, {"images": str(path)})


# --- what is measured ----------------------------------------------------------------------------------------------------


def fingerprint(config: ConfigDict, images: Any, count: int) -> dict[str, Any]:
    """All that reference statistics of a data set depend on, as plain values."""
    block = json.loads(config.data.to_json_best_effort())
    own = getattr(images, "fingerprint", None)
    return {
        "data": block,
        "content": own() if callable(own) else own,
        "split": config.split.report,
        "count": count,
        "resolution": config.input.resolution,
        "crop": config.input.crop,
    }


def moments(images: Images, extractor: features.Extractor) -> statistics.Moments:
    """Running f64 moments of the features of all the images, in one pass."""
    total = statistics.empty(extractor.dim)
    for batch in images.batches():
        total = statistics.update(total, extractor.apply(batch))
    return total


def classifier(workdir: str) -> tuple[features.Extractor, Callable[[np.ndarray], np.ndarray]]:
    """The feature extractor, and the logits u8[N, H, W, 3] -> f32[N, K], of a classifier trained by `ldm train`."""
    folder = pathlib.Path(workdir)
    config = experiment.read_config(folder)
    if config.task.name != "classifier":
        raise ValueError(
            f"--features=classifier:{workdir} holds a run of the task {config.task.name!r}; expected a classifier"
        )
    step = experiment.pick_step(folder, None)
    params = checkpoint.restore_params(folder, step, experiment.default_average(config))["classifier"]
    network, side = experiment.network(config), config.input.resolution
    example = np.zeros((1, side, side, 3), np.float32)
    dim = jax.eval_shape(lambda p: network.apply({"params": p}, example)[1], params).shape[-1]
    extractor = features.classifier(
        lambda p, x: network.apply({"params": p}, x)[1],
        params,
        dim=dim,
        resolution=side,
        sha256=checkpoint.identity(folder, step),
    )
    logits = features.batched(lambda p, images: network.apply({"params": p}, from_uint8(images))[0], params, 64, side)
    return extractor, logits


def commit() -> str:
    """The revision of the code, with '+' when there are changes to it; its version where there is no repository."""
    here = pathlib.Path(__file__).parent

    def git(*words):
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ldm_jax.__version__


def measure(
    images: Images,
    metrics: tuple[str, ...],
    *,
    config: ConfigDict,
    extractor: features.Extractor | None,
    logits: Callable[[np.ndarray], np.ndarray] | None,
    reference: str,
    cache: pathlib.Path,
) -> dict[str, Any]:
    """The JSON object of one set of images. `reference`: 'split:NAME' of the run's data, or an npz of statistics.

    Raises ValueError when a metric lacks what it needs, before any image is made.
    """
    if "fid" in metrics and extractor is None:
        raise ValueError("fid needs --features=inception or --features=classifier:DIR")
    if "accuracy" in metrics and (logits is None or images.labels is None):
        raise ValueError("accuracy needs --features=classifier:DIR, and images that were told a class")
    if "shapes" in metrics and images.prompts is None:
        raise ValueError("shapes needs a run that takes captions of shapes")
    if "psnr" in metrics and images.made_by.get("images") != "reconstructions":
        raise ValueError("psnr needs the run of an autoencoder, and no --samples")
    row: dict[str, Any] = {"num": images.count, **images.made_by, "precision": experiment.dtype(config)}
    wanted = None
    if "fid" in metrics:
        if reference.startswith("split:"):
            others = real(config, reference.removeprefix("split:"))
            origin = others.made_by["data"] | {"extractor": extractor.name, "weights": extractor.sha256}
            wanted, path = statistics.reference(cache, origin, lambda: moments(others, extractor))
        else:
            path = pathlib.Path(reference)
            wanted = statistics.read(path)
            made_with = statistics.read_fingerprint(path)
            if made_with.get("weights", extractor.sha256) != extractor.sha256:
                raise ValueError(
                    f"--reference={path} holds features of {made_with['extractor']} {made_with['weights'][:12]}; these are of "
                    f"{extractor.name} {extractor.sha256[:12]}"
                )
        row |= {
            "features": extractor.name,
            "features_sha256": extractor.sha256,
            "reference": reference,
            "reference_num": wanted.n,
            "reference_sha256": checkpoint.sha256(path),
        }
    total = statistics.empty(extractor.dim) if "fid" in metrics else None
    judged, kept = [], []
    for batch in images.batches():
        if total is not None:
            total = statistics.update(total, extractor.apply(batch))
        if "accuracy" in metrics:
            judged.append(logits(batch))
        if "shapes" in metrics or "psnr" in metrics:
            kept.append(batch)
    if total is not None:
        made = statistics.gaussian(total)
        row[features.figure_name(extractor)] = frechet.distance(
            made.mean, made.covariance, wanted.mean, wanted.covariance
        )
    if "accuracy" in metrics:
        result = accuracy.accuracy(np.concatenate(judged), images.labels)
        by_class = [
            None if np.isnan(v) else round(float(v), 4) for v in result.by_class
        ]  # None: no image was asked for
        row |= {"accuracy": result.total, "accuracy_by_class": by_class}
    if "shapes" in metrics:
        row |= {f"shapes_{k}": v for k, v in shapes.score(np.concatenate(kept), images.prompts).items()}
    if "psnr" in metrics:
        row["psnr"] = _psnr(config, np.concatenate(kept))
    return row | {
        "commit": commit(),
        "machine": f"{platform.machine()} {jax.devices()[0].platform} x{jax.device_count()}",
    }


def _psnr(config: ConfigDict, images: np.ndarray) -> float:
    """Mean over images of the PSNR in dB of u8 reconstructions against the reporting images they are of."""
    report = spread(experiment.source(config, "report"), len(images))
    values = []
    for n, batch in enumerate(experiment.one_pass(config, report, 64)):
        there = batch["image"][batch["valid"]].astype(np.float64)
        here = images[n * 64 : n * 64 + len(there)].astype(np.float64)
        error = np.mean((there - here) ** 2, axis=(1, 2, 3))
        values.append(10 * np.log10(255.0**2 / np.maximum(error, 1e-10)))
    return float(np.concatenate(values).mean())
