"""What verbs share that run as one of several processes, each with its own devices: `ldm train`, `encode` and `evaluate`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes (Slurm, TPU pod, ...: detected)"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="with --distributed, where nothing can be detected")
    parser.add_argument("--processes", type=int, metavar="N", help="likewise: how many processes")
    parser.add_argument("--process", type=int, metavar="I", help="likewise: which one this is")


def start(args: argparse.Namespace) -> bool:
    """Join the others where that was asked for, before any device is touched; whether this process prints and writes.

    Raises ValueError where no cluster is found and none is described, and for a description without --distributed.
    """
    import jax

    if args.distributed:
        try:
            jax.distributed.initialize(args.coordinator, args.processes, args.process)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"--distributed: {str(error).splitlines()[0]} (give --coordinator, --processes and --process where no cluster is found)"
            ) from error
    elif args.coordinator or args.processes or args.process is not None:
        raise ValueError("--coordinator, --processes and --process go with --distributed")
    return jax.process_index() == 0
