"""Say what a config's data is: its splits, classes, captions, what lies there and is not read; and show it as the network sees it.

  ldm data configs/cifar10_vae.py --out=data.png
  ldm data configs/emoji64_ldm_dit.py --config.input.resolution=32

--out writes a labelled grid of training images, at even distances, cropped as in training. `ldm train --dry-run[=F.png]` says and
shows the same.
"""

import argparse
import pathlib
from typing import TYPE_CHECKING

from ldm_jax.cli import checks

if TYPE_CHECKING:
    from ldm_jax.training.experiment import Experiment

TAKES_CONFIG = True
PICTURES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="", metavar="FILE.py[:ARG]", help="the experiment")
    parser.add_argument(
        "--config", dest="named", default="", metavar="FILE.py[:ARG]", help="the same, as `ldm train` has it"
    )
    parser.add_argument("--out", default="", metavar="F.png", help="where a grid of training images is written")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.config import config_file
    from ldm_jax.training import experiment

    if bool(args.config) == bool(args.named):
        raise ValueError("expected one config file, as in: ldm data configs/quickstart.py")
    show(experiment.parse(config_file.load(args.config or args.named, rest, checks.arguments)), args.out)
    return 0


def show(experiment: "Experiment", out: str = "") -> tuple:
    """Print what the data of an experiment is, and write the grid to `out` (none where it is empty); the images of train and of tune.

    Raises ValueError and FileNotFoundError as reading the data does, and for an `out` that is no .png.
    """
    from ldm_jax.data import contact_sheet
    from ldm_jax.data.subset import spread
    from ldm_jax.training import dataset, streams

    if out and pathlib.Path(out).suffix.lower() != ".png":
        raise ValueError(f"--out={out}; expected a name that ends in .png")
    train, tune = streams.source(experiment, "train"), streams.source(experiment, "tune")
    print("\n".join(dataset.details(experiment, train, tune)), flush=True)
    if not out:
        return train, tune
    if getattr(train, "is_latent", False):
        print(f"{out} is not written: {train.name} holds latents, and no pictures")
        return train, tune
    few = spread(train, PICTURES)
    images = next(streams.one_pass(experiment, few, batch_size=len(few)))["image"]
    contact_sheet.save(out, images, labels=dataset.labels_of(few))
    flipped = "; in training, each is mirrored half of the times" if experiment.input.flip else ""
    print(f"{out}: {len(few)} training images of {experiment.input.resolution} pixels{flipped}")
    return train, tune
