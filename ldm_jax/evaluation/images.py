"""Where images to be judged come from: drawn from a run, reconstructed by an autoencoder, of a data set, or in a file.

Each is N images in batches, made anew whenever they are asked for, with what they were told and a record of how they came to be.
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.data import captions
from ldm_jax.data.subset import spread
from ldm_jax.evaluation import generate, npz
from ldm_jax.kernels import mesh
from ldm_jax.models.autoencoder_kl import Posterior
from ldm_jax.runs import checkpoint
from ldm_jax.training import experiment, sampling
from ldm_jax.training import first_stage as stages
from ldm_jax.training.images import from_uint8, to_uint8

BATCH = 64


class Images(NamedTuple):
    """N = `count` images: `batches()` yields dicts of arrays, 'image' u8[b, H, W, 3] and whatever else is in `holds`.

    Where there are `classes`, 'label' i[b] is among these: what an image was asked to show, as the N `prompts` say it in words.
    `made_by` says how they came to be, as plain values.
    """

    batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    count: int
    made_by: dict[str, Any]
    holds: frozenset[str] = frozenset({"image"})
    classes: int = 0
    prompts: list[str] | None = None


def of_split(config: ConfigDict, split: str) -> ConfigDict:
    """The config with `split` in the place of its reporting split."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.split.report = split
    return config


def prompts_from(run: experiment.Restored, where: str, num: int) -> list[str]:
    """`num` captions: of 'split:NAME' of the run's data, evenly spread, or the lines of a text file in order; repeated.

    A file is UTF-8, with a byte order mark or without; lines without a word are left out. Raises FileNotFoundError,
    or ValueError for a file without a line or in another encoding, and for a run that takes no captions.
    """
    if run.model.conditioning.text is None:
        raise ValueError(f"--prompts={where}: this run takes no captions")
    if where.startswith("split:"):
        source = experiment.source(of_split(run.config, where.removeprefix("split:")), "report")
        source = spread(source, min(num, len(source)))
        return [source[i % len(source)]["text"] for i in range(num)]
    path = pathlib.Path(where)
    if not path.is_file():
        raise FileNotFoundError(f"--prompts={where} is no file; expected a text file, one prompt a line, or split:NAME")
    # At line feeds alone: str.splitlines also parts a prompt at what prints as a blank (U+2028, U+0085, form feeds).
    lines = [line.removesuffix("\r") for line in captions.as_text(path.read_bytes(), f"--prompts={where}").split("\n")]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"--prompts={where} holds no line with a prompt")
    return [lines[i % len(lines)] for i in range(num)]


def generated(
    run: experiment.Restored,
    settings: sampling.Settings,
    *,
    num: int,
    seed: int,
    ema: str,
    prompts: str = "",
    labels: str = "",
) -> Images:
    """`num` samples of a run.

    `prompts` as in prompts_from, by default the captions of the reporting split; `labels` one of generate.BALANCES, by default
    'equal'. Raises ValueError for either where the run takes none.
    """
    config, classes = run.config, run.model.conditioning.num_classes
    if run.model.conditioning.text is not None:
        prompts = prompts or f"split:{config.split.report}"
    given = prompts_from(run, prompts, num) if prompts else []
    sampling.make_times(run.model, settings)  # these two say what is wrong with the settings
    sampling.make_generate(run.model, settings)
    what = generate.asked(run, num, (), given)
    if classes:
        labels = labels or "equal"
        training = experiment.source(config, "train") if labels == "dataset" else None
        what = what._replace(labels=generate.balanced(labels, num, classes, seed, training))
    elif labels:
        raise ValueError(f"--labels={labels}: this run takes no labels")

    def batches():
        drawn = generate.draw(
            run,
            settings,
            what,
            count=num,
            seed=seed,
            tokenizer=experiment.tokenizer(config),
            batch_size=config.sampler.batch_size,
            quiet=True,
        )
        yield from _told(drawn, what.labels)

    made_by = {"step": run.step, "checkpoint": run.sha256, "ema": ema, "seed": seed}
    made_by |= {"sampler" if k == "name" else k: v for k, v in settings._asdict().items()}
    made_by["evaluations"] = sampling.evaluations(settings)
    if prompts:
        made_by["prompts"] = prompts
        if not prompts.startswith("split:"):
            made_by["prompts_sha256"] = checkpoint.sha256(pathlib.Path(prompts))
    if labels:
        made_by["labels"] = labels
    return Images(batches, num, made_by, _holds(what.labels), classes, what.prompts)


def _told(batches: Iterator[np.ndarray], labels: np.ndarray | None) -> Iterator[dict[str, np.ndarray]]:
    start = 0
    for images in batches:
        stop = start + len(images)
        yield {"image": images} if labels is None else {"image": images, "label": labels[start:stop]}
        start = stop


def _holds(labels: Any) -> frozenset[str]:
    return frozenset({"image"} if labels is None else {"image", "label"})


def reconstructed(workdir: pathlib.Path, config: ConfigDict, step: int, average: str | None, num: int) -> Images:
    """Reconstructions of `num` reporting images by a run's checkpoint: see `through`."""
    params = checkpoint.restore_params(workdir, step, average)["autoencoder"]
    made_by = {"step": step, "checkpoint": checkpoint.identity(workdir, step), "ema": average or "none"}
    return through(config, experiment.network(config), params, made_by, num)


def reconstructed_by(stage: stages.FirstStage, config: ConfigDict, num: int) -> Images:
    """Reconstructions of `num` reporting images of the config by a published autoencoder: see `through`."""
    made_by = {"autoencoder": str(stage.published.path), "encoder": stage.sha256, "decoder": stage.decoder}
    return through(config, stage.network, stage.params, made_by, num)


def through(config: ConfigDict, network: Any, params: Any, made_by: dict[str, Any], num: int) -> Images:
    """Reconstructions of `num` reporting images, evenly spread, from the latent that is most likely (the posterior's mean).

    A batch holds besides: 'original' u8[b, H, W, 3]; 'mean' f32[b, h, w, C], the latent; of a posterior its 'std', and 'nats' f[b],
    KL(posterior || N(0, I)); of a codebook the 'indices' i[b, h, w]. Batches are split over all devices, of all processes.
    """
    report = spread(experiment.source(config, "report"), num)
    num, side = len(report), config.input.resolution

    def encode_and_decode(params, images):
        out = stages.moments(network, params, from_uint8(images))
        if "std" in out:
            out["nats"] = Posterior(out["mean"], 2 * jax.numpy.log(out["std"])).kl()
        if hasattr(network, "num_vq_embeddings"):
            out["indices"] = network.apply({"params": params}, out["mean"], method="quantized").indices
        y = network.apply({"params": params}, out["mean"], method="decode")
        return {**out, "image": to_uint8(y), "original": images}

    holds = jax.eval_shape(encode_and_decode, params, np.zeros((1, side, side, 3), np.uint8)).keys()
    device_mesh = mesh.make_mesh()
    run = jax.jit(encode_and_decode, out_shardings=mesh.batch_sharding(device_mesh))

    def batches():
        placed = jax.device_put(params, mesh.replicated(device_mesh))
        for batch in experiment.one_pass(config, report, experiment.rows(device_mesh, BATCH)):
            pixels = mesh.shard_global({"image": batch["image"]}, device_mesh)["image"]
            yield {name: value[batch["valid"]] for name, value in mesh.to_host(run(placed, pixels)).items()}

    return Images(batches, num, made_by | {"images": "reconstructions"}, frozenset(holds))


def real(config: ConfigDict, split: str, limit: int | None = None) -> Images:
    """Images of a split of the run's own data set (`limit` of them, evenly spread), prepared as in training."""
    config = of_split(config, split)
    images = experiment.source(config, "report")
    if getattr(images, "is_latent", False):
        raise ValueError(
            f"split:{split} of this run holds latents, not images; give --reference=FILE.npz, or train with the images in "
            "config.data and the latents in config.first_stage.latents"
        )
    images = spread(images, limit or len(images))
    count, holds = len(images), _holds(images.num_classes or None)

    def batches():
        for batch in experiment.one_pass(config, images, BATCH):
            yield {name: batch[name][batch["valid"]] for name in holds}

    made_by = {"images": f"split:{split}", "data": fingerprint(config, images, count)}
    return Images(batches, count, made_by, holds, images.num_classes)


def from_file(path: pathlib.Path) -> Images:
    """The samples of an npz as `ldm sample` and ADM's code write it."""
    samples = npz.read(path)
    classes = 0 if samples.labels is None else int(samples.labels.max()) + 1

    def batches():
        yield from _told(npz.batches(samples, BATCH), samples.labels)

    made_by = {"images": str(path), "images_sha256": checkpoint.sha256(path)}
    return Images(batches, samples.count, made_by, _holds(samples.labels), classes)


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
