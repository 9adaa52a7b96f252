"""Train what a config describes; run the same command again to go on where it stopped.

  ldm train --config=configs/quickstart.py --workdir=runs/quickstart
  ldm train --config=configs/cifar10_ldm_dit.py --workdir=runs/a --config.optimizer.learning_rate=5e-4

Every key of the config, and every argument of the constructors that it names, can be set as --config.KEY=VALUE. FILE.py:smoke is the
same config for a few seconds. The folder then holds checkpoints/, metrics.jsonl, events/ (TensorBoard) and pictures/. --dry-run
says what is trained on, as `ldm data` does, and makes no run.
"""

import argparse
import pathlib

from ldm_jax.cli import checks, processes

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE.py[:smoke]", help="the experiment")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives; made if it is missing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="",
        metavar="F.png",
        help="check the config, say what its data is, and show some of it in F.png",
    )
    processes.add_arguments(parser)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.config import config_file

    config = config_file.load(args.config, rest, checks.arguments)
    processes.start(args)
    if args.dry_run is not None:
        from ldm_jax.cli import data
        from ldm_jax.training import build, check

        experiment, _ = check.check(config, pathlib.Path(args.workdir).absolute())
        build.check_sources(experiment, *data.show(experiment, args.dry_run))
        return 0
    from ldm_jax.training.loop import train

    train(config, args.workdir, quiet=args.quiet, in_use=args.in_use)
    return 0
