"""First stages at 64 px: size of the latent, KL or VQ, and the terms of the loss switched on one by one, on photographs and emoji.

Each run trains configs/first_stage64.py on 6k images and reconstructs held-out ones: PSNR and SSIM say how near a reconstruction is,
the Frechet distance in a classifier's features whether it looks like an image. Two classifiers of the same photographs, of other seed
and width: LDM_SEES is in the perceptual term, LDM_JUDGE measures the distance (default: runs/photos64_classifier, runs/photos64_judge).

    ldm train --config=configs/photos64_classifier.py --workdir=runs/photos64_classifier
    ldm train --config=configs/photos64_classifier.py --workdir=runs/photos64_judge --config.seed=1 --config.model.widths="(24, 48, 96)"
    ldm sweep experiments/first_stage.py --workdir=runs/first_stage --publish=experiments/first_stage
    python -m experiments.first_stage runs/first_stage experiments/first_stage        the pictures, a row a run
    python -m experiments.first_stage OUT.png CAPTION:DIR ...                         the same of any runs
"""

import os
import pathlib
import sys

import numpy as np

from ldm_jax.data import contact_sheet
from ldm_jax.sweeps import Plot, Study, chain, product, sweep
from ldm_jax.sweeps.algebra import Overrides, fixed

IMAGES = {"photos": 1008, "emoji": 355}  # held out


def commands(run: Overrides, folder: pathlib.Path) -> list[list[str]]:
    data, latent = run["family"].split("-")
    config = f"configs/first_stage64.py:{data},{latent},{run['loss']}"
    flags = ["--config.train.images=6000", f"--config.model.latent_channels={run['channels']}"]
    if run["loss"] in ("adversarial", "all"):
        flags.append("--config.task.adversarial.start_images=3000")
    if run["loss"] in ("perceptual", "all"):
        sees = os.environ.get("LDM_SEES", "runs/photos64_classifier")
        flags.append(f"--config.task.perceptual.name=classifier:{sees}")
    judge = os.environ.get("LDM_JUDGE", "runs/photos64_judge")
    metrics = "psnr,ssim,rfid,latents," + ("kl" if latent == "kl" else "codebook")
    program = [sys.executable, "-m", "ldm_jax"]
    return [
        [*program, "train", f"--config={config}", f"--workdir={folder}", *flags],
        [
            *(*program, "evaluate", f"--workdir={folder}", f"--metrics={metrics}"),
            *(f"--features=classifier:{judge}", f"--num={IMAGES[data]}", "--draws=0"),
        ],
    ]


def get_study() -> Study:
    losses = ["l1", "perceptual", "adversarial", "all"]
    return Study(
        name="first_stage",
        title="First stages at 64 px, f = 4: 6k images each, judged by a classifier of photographs",
        runs=chain(
            product(fixed("family", "photos-kl"), sweep("loss", losses), fixed("channels", 4)),
            product(fixed("family", "photos-kl"), fixed("loss", "l1"), sweep("channels", [2, 8])),
            product(
                sweep("family", ["photos-vq", "emoji-kl", "emoji-vq"]),
                sweep("loss", ["l1", "all"]),
                fixed("channels", 4),
            ),
        ),
        commands=commands,
        objective="rfd_classifier",
        columns=("rfd_classifier", "psnr", "ssim", "kl_bits", "codebook_perplexity", "latent_high_share"),
        plot=(
            *(Plot(x="loss", y=y, hue="family", where={"channels": 4}) for y in ("rfd_classifier", "psnr")),
            *(Plot(x="channels", y=y, where={"family": "photos-kl", "loss": "l1"}) for y in ("rfd_classifier", "ssim")),
        ),
    )


def rows(runs: list[tuple[str, pathlib.Path]], path: pathlib.Path, count: int = 10) -> None:
    """The same held-out images, as they are and as each run (caption, folder) reconstructs them, a row a run."""
    from ldm_jax.evaluation import reconstructions
    from ldm_jax.runs import checkpoint
    from ldm_jax.training import experiment

    batches = []
    for _, folder in runs:
        config = experiment.of_run(folder)
        step, average = checkpoint.pick(folder, None), config.average
        batches.append(next(reconstructions.of_run(folder, config, step, average, count).batches()))
    labels = [word for caption in ("original", *dict(runs)) for word in (caption, *[""] * (count - 1))]
    pixels = [batches[0]["original"], *(batch["image"] for batch in batches)]
    contact_sheet.save(path, np.concatenate(pixels), count, labels=labels)


def pictures(sweep_dir: pathlib.Path, out: pathlib.Path) -> None:
    """photos.png and emoji.png, in the order of the study."""
    for data in IMAGES:
        runs = []
        for run in get_study().runs:
            if run["family"].startswith(data):
                name = f"family={run['family']}_loss={run['loss']}_channels={run['channels']}"
                (folder,) = sweep_dir.glob(f"runs/{name}_*")
                runs.append((f"{run['family'].split('-')[1]} {run['loss']} {run['channels']}", folder))
        rows(runs, out / f"{data}.png")


if __name__ == "__main__":
    if sys.argv[1].endswith(".png"):
        named = (word.partition(":") for word in sys.argv[2:])
        rows([(caption, pathlib.Path(folder)) for caption, _, folder in named], pathlib.Path(sys.argv[1]))
    else:
        pictures(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
