"""Encode a data set with a trained autoencoder, once: a cache of posteriors (mean and standard deviation), in shards.

  ldm encode --workdir=runs/cifar10_vae --data=train --out=latents/train
  ldm encode --workdir=sd-vae-ft-mse --data=configs/imagenet256_dit_xl2.py:train --out=latents --flip

The autoencoder is a run, or a published one: a folder of diffusers', a file, hub:OWNER/NAME. `--data` is a split of the data set that
it was trained on, or NAME:SPLIT with another config's data, --data=configs/cifar10_ldm_dit.py:train; a published one takes these
alone. `ldm train --config.first_stage.latents=DIR` trains on it (with --flip where that config flips); it is a data source of its own
as well: config.data = {'name': 'latents', 'path': DIR}. All devices share the work; stopped, the same command goes on with the shards
that are missing. The mean and the variance of each channel stand at the end.
"""

import argparse

from ldm_jax.cli import checks, processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="VAE", help="the autoencoder: a run, or a published one")
    parser.add_argument("--data", required=True, metavar="SPLIT|CONFIG.py:SPLIT", help="what is encoded")
    parser.add_argument("--out", required=True, metavar="DIR", help="the cache; an unfinished one is gone on with")
    parser.add_argument("--flip", action="store_true", help="encode every image mirrored as well")
    parser.add_argument(
        "--dtype", metavar="float16|float32", help="of what is stored (default float16, or what is there)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    processes.add_arguments(parser)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.config import config_file
    from ldm_jax.training import encode, experiment, open_stage, published, streams

    main = processes.start(args)
    workdir, out = published.place(args.workdir), checks.folder("out", args.out).absolute()
    ready_made = published.is_published(workdir)
    spec, _, split = args.data.rpartition(":")
    if not spec and ready_made:
        raise ValueError(
            f"--data={args.data}: {args.workdir} is a published autoencoder, which has no data set; expected CONFIG.py:SPLIT"
        )
    of = experiment.parse(config_file.load(spec)) if spec else experiment.of_run(workdir)
    of = of._replace(split=of.split._replace(train=split))
    if ready_made:  # a cache holds latents as they are: no scale is asked for
        of = of._replace(first_stage=of.first_stage._replace(whitening="measured"))
    stage = open_stage.load(workdir, experiment=of)
    images = streams.source(of, "train")
    say = (lambda text: None) if args.quiet or not main else print
    cache = encode.cached(of, out, split, stage, images, flip=args.flip, dtype=args.dtype, quiet=args.quiet, say=say)
    if not main:
        return 0
    whitened = "not whitened" if ready_made else f"whitened with {workdir / 'whitening.json'}"
    print(f"{len(cache)} latents of shape {cache.shape} in {cache.folder}; {whitened}")
    print("channel       mean   variance")
    for channel, (mean, std) in enumerate(zip(cache.mean, cache.std)):
        print(f"{channel:7d} {mean:10.4f} {std**2:10.4f}")
    return 0
