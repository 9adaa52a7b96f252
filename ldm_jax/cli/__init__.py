"""The console script `ldm`, one file a verb. A user's mistake is one clear line and exit code 2, never a traceback."""

import argparse
import importlib
import os
import sys

VERBS = {
    "train": "train what a config describes, or go on training it",
    "sample": "draw images from a trained run",
    "generate": "draw images with a published pipeline: Stable Diffusion and its kin",
    "evaluate": "generate from checkpoints and measure (FID and others)",
    "encode": "encode a data set with a trained autoencoder, once",
    "convert": "write a model as a folder of diffusers', one file, or weights to train from",
    "sweep": "run a study: many trainings or evaluations, resumed and tabulated",
    "samplers": "list the samplers and the time grids, with their facts",
}


# What a wrong path raises; every other OSError (a full disk, a lost network) is not the user's mistake.
WRONG_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


# What runs few large programs, and should fit beside its weights: there a kept heap saves little time and costs much memory.
GIVES_BACK = ("generate", "convert")


def _start_jax(verb: str) -> None:
    """Quiet logs, freed memory kept where steps are many, and the compilation cache: 18 s become 1 s on the second run."""
    import logging

    import absl.logging

    from ldm_jax.models import heap

    if verb not in GIVES_BACK:
        heap.keep()

    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "ldm_jax", "jit"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main(argv: list[str] | None = None) -> int:
    """Run `ldm VERB ...`; the result is the exit code: 0 done, 1 failed on the way, 2 a mistake in what was asked, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not sys.stderr.isatty():  # A bar redrawn ten times a second is for eyes; in a log file it is a megabyte.
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    epilog = (
        "verbs:\n"
        + "\n".join(f"  {verb:9} {what}" for verb, what in VERBS.items())
        + "\n\n`ldm VERB --help` says more. LDM_TRACEBACK=1 in the environment shows where an error came from."
    )
    parser = argparse.ArgumentParser(
        prog="ldm",
        description="Latent diffusion research in JAX: train, resume, sample, evaluate, sweep.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ldm VERB [options]",
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do (below)")
    args = parser.parse_args(argv[:1] or ["--help"])
    verb = importlib.import_module(f"ldm_jax.cli.{args.verb}")
    own = argparse.ArgumentParser(
        prog=f"ldm {args.verb}",
        description=verb.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_arguments(own)
    parsed, rest = own.parse_known_args(argv[1:])
    if rest and not getattr(verb, "TAKES_CONFIG", False):
        own.error(f"unknown argument {rest[0]!r}; `ldm {args.verb} --help` lists them")
    from ldm_jax.training.stopped import Stopped

    try:
        if args.verb not in ("sweep", "samplers"):  # They compute nothing themselves.
            _start_jax(args.verb)
        return verb.run(parsed, rest)
    except BrokenPipeError:  # `ldm samplers | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, *WRONG_PATHS) as error:
        if os.environ.get("LDM_TRACEBACK"):
            raise
        print(f"ldm {args.verb}: {error}", file=sys.stderr)
        return 2
    except (Stopped, OSError) as error:
        if os.environ.get("LDM_TRACEBACK"):
            raise
        print(f"ldm {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nldm {args.verb}: stopped; run the same command again to go on", file=sys.stderr)
        return 130


def console() -> None:
    sys.exit(main())
