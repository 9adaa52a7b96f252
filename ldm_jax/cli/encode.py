"""Encode a data set with a trained autoencoder, once: a cache of posteriors (mean and standard deviation), in shards.

  ldm encode --workdir=runs/cifar10_vae --data=train --out=latents/train

`--data` is a split of the data set that the autoencoder was trained on, or NAME:SPLIT with another config's data:
--data=configs/cifar10_ldm_dit.py:train. `ldm train --config.first_stage.latents=DIR` trains on it (with --flip where
that config flips); it is a data source of its own as well: config.data = {'name': 'latents', 'path': DIR}. All devices
share the work; stopped, the same command goes on with the shards that are missing. The mean and the variance of each
channel stand at the end.
"""

import argparse
import pathlib

from ldm_jax.cli import processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="VAE_DIR", help="the autoencoder's run")
    parser.add_argument("--data", required=True, metavar="SPLIT|CONFIG.py:SPLIT", help="what is encoded")
    parser.add_argument("--out", required=True, metavar="DIR", help="the cache; an unfinished one is gone on with")
    parser.add_argument("--flip", action="store_true", help="encode every image mirrored as well")
    parser.add_argument(
        "--dtype", metavar="float16|float32", help="of what is stored (default float16, or what is there)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    processes.add_arguments(parser)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.training import config_file, experiment, latents

    main = processes.start(args)
    workdir = pathlib.Path(args.workdir)
    stage = experiment.load_first_stage(workdir)
    config = experiment.read_config(workdir)
    spec, _, split = args.data.rpartition(":")
    if spec:
        config = config_file.load(spec)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.split.train = split
    images = experiment.source(config, "train")
    out = pathlib.Path(args.out).absolute()
    say = (lambda text: None) if args.quiet or not main else print
    cache = latents.cached(
        config, out, split, stage, images, flip=args.flip, dtype=args.dtype, quiet=args.quiet, say=say
    )
    if not main:
        return 0
    print(f"{len(cache)} latents of shape {cache.shape} in {cache.folder}; whitened with {workdir / 'whitening.json'}")
    print("channel       mean   variance")
    for channel, (mean, std) in enumerate(zip(cache.mean, cache.std)):
        print(f"{channel:7d} {mean:10.4f} {std**2:10.4f}")
    return 0
