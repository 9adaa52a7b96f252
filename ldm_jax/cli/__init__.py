"""The console script `ldm`, one file a verb. A user's mistake is one clear line and exit code 2, never a traceback."""

import argparse
import difflib
import importlib
import itertools
import os
import pathlib
import re
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ldm_jax.plugins import Plugin

VERBS = {
    "train": "train what a config describes, or go on training it",
    "data": "say what a config's data is, and show it as the network sees it",
    "sample": "draw images from a trained run",
    "generate": "draw images with a published pipeline (Stable Diffusion and its kin) or a trained run",
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


# argparse's words for what can be wrong with a flag, and ours.
SAID = (
    (r"argument (.+): invalid int value: (.*)", r"\1=\2; expected a whole number"),
    (r"argument (.+): invalid float value: (.*)", r"\1=\2; expected a number"),
    (r"argument (.+): invalid choice: (.*) \(choose from (.*)\)", r"\1=\2; expected one of \3"),
    (r"argument (.+): expected one argument", r"\1 needs a value"),
    (r"argument (.+): ignored explicit argument (.*)", r"\1=\2: it takes no value"),
    (r"argument (.+): not allowed with argument (.+)", r"\1 does not go with \2"),
    (r"the following arguments are required: (.*)", r"needs \1"),
)


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line that names the flag; abbreviated flags are none."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        for theirs, ours in SAID:
            if matched := re.fullmatch(theirs, message, re.DOTALL):
                message = matched.expand(ours)
        message = _one_line(message)
        self.exit(2, f"{self.prog}: {message}{'' if message.endswith('?') else ';'} `{self.prog} --help` says more\n")

    def unknown(self, word: str) -> NoReturn:
        """The error for a word that is no flag of this verb, with the flag that it may have been."""
        name = word.partition("=")[0]
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = [flag for flag in flags if len(name) > 3 and flag.startswith(name)]
        near = near or difflib.get_close_matches("--" + name.lstrip("-").partition(".")[0], flags, 1)
        self.error(f"unknown argument {word!r}" + (f"; did you mean {near[0]}?" if near else ""))


def _one_line(said: object) -> str:
    """What an error or a warning says, its line breaks (of a file's name, say) as blanks."""
    return " ".join(line.strip() for line in str(said).splitlines())


def main(argv: list[str] | None = None) -> int:
    """Run `ldm VERB ...`; the result is the exit code: 0 done, 1 failed on the way, 2 a mistake in what was asked, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    form = warnings.formatwarning
    try:
        if argv and argv[0] in VERBS and not os.environ.get("LDM_TRACEBACK"):
            # A line for a reader, without the file and the line of code that said it.
            warnings.formatwarning = lambda message, *where, **line: f"ldm {argv[0]}: warning: {_one_line(message)}\n"
        return _run(argv)
    finally:
        warnings.formatwarning = form


def _run(argv: list[str]) -> int:
    if not sys.stderr.isatty():  # A bar redrawn ten times a second is for eyes; in a log file it is a megabyte.
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    epilog = (
        "verbs:\n"
        + "\n".join(f"  {verb:9} {what}" for verb, what in VERBS.items())
        + "\n\n`ldm VERB --help` says more. LDM_TRACEBACK=1 in the environment shows where an error came from."
    )
    parser = Parser(
        prog="ldm",
        description="Latent diffusion research in JAX: train, resume, sample, evaluate, sweep.",
        epilog=epilog,
        usage="ldm VERB [options]",
    )
    parser.add_argument("verb", metavar="VERB", help="what to do (below)")
    name = argv[0] if argv else "--help"
    if name not in VERBS and name not in ("-h", "--help"):
        near = difflib.get_close_matches(name, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        parser.error(f"unknown verb {name!r}; {hint}")
    args = parser.parse_args([name])
    verb = importlib.import_module(f"ldm_jax.cli.{args.verb}")
    of_verb = Parser(prog=f"ldm {args.verb}", description=verb.__doc__)
    try:
        # Before the flags: a metric that a plug-in adds may bring flags along.
        in_use = _plug_in(argv[1:])
    except (ValueError, *WRONG_PATHS) as error:
        return _failed(args.verb, error, 2)
    verb.add_arguments(of_verb)
    of_verb.add_argument(
        "--plugin",
        action="append",
        metavar="FILE.py",
        help="a file that adds to the tables; may be given several times",
    )
    takes_config = getattr(verb, "TAKES_CONFIG", False)
    for word in argv[1:]:  # first of all: what a misspelt flag leaves out would be said to be missing
        flag = word.partition("=")[0]
        if flag == "--":
            break
        # With a blank in it, it is a value: --prompt "-- fog --".
        is_known = flag in of_verb._option_string_actions or (takes_config and flag.startswith("--config."))
        if flag.startswith("--") and not is_known and " " not in flag:
            of_verb.unknown(word)
    parsed, rest = of_verb.parse_known_args(argv[1:])
    del parsed.plugin
    parsed.in_use = in_use
    if rest and not takes_config:
        of_verb.unknown(rest[0])
    from ldm_jax.runs.stopped import Stopped

    try:
        _check_places(of_verb, argv[1:])
        if args.verb not in ("sweep", "samplers"):  # They compute nothing themselves.
            from ldm_jax import startup
            from ldm_jax.kernels import heap

            if args.verb not in GIVES_BACK:
                heap.keep()
            startup.start()
        return verb.run(parsed, rest)
    except BrokenPipeError:  # `ldm samplers | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, *WRONG_PATHS) as error:
        return _failed(args.verb, error, 2)
    except (Stopped, OSError) as error:
        return _failed(args.verb, error, 1)
    except KeyboardInterrupt:
        print(f"\nldm {args.verb}: stopped; run the same command again to go on", file=sys.stderr)
        return 130


def _failed(verb: str, error: Exception, code: int) -> int:
    """The exit code, after one line that says what the error says; LDM_TRACEBACK=1 raises it instead."""
    if os.environ.get("LDM_TRACEBACK"):
        raise error
    print(f"ldm {verb}: {_one_line(error)}", file=sys.stderr)
    return code


def _plug_in(argv: list[str]) -> "list[Plugin]":
    """Load the plug-ins of installed packages, those of --plugin=FILE.py, and those of runs that a word names; the last two kinds.

    A run's plug-ins are loaded when it is read, too. Here they are early enough for the flags and names of the command line.
    """
    from ldm_jax import plugins

    words = argv[: argv.index("--")] if "--" in argv else argv
    files = [word.removeprefix("--plugin=") for word in words if word.startswith("--plugin=")]
    files += [value for word, value in itertools.pairwise(words) if word == "--plugin"]
    plugins.load_installed()
    in_use = plugins.load(files)
    for word in words:
        place = word.partition("=")[2] if word.startswith("-") else word
        if place and os.path.isfile(os.path.join(place, "plugins.json")):
            from ldm_jax.runs import plugin_record

            in_use += plugin_record.load(pathlib.Path(place))
    return list(dict.fromkeys(in_use))


# What stands for a folder or a file in a flag's help.
PLACES = ("DIR", "FOLDER", "FILE", "F.npy")


def _check_places(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Raise ValueError for a folder or a file that is named and empty: an unset variable of the shell would be the current folder."""
    for action in parser._actions:
        if not any(place in str(action.metavar) for place in PLACES):
            continue
        for flag in action.option_strings:
            at = [i for i, word in enumerate(argv) if word == flag]
            if f"{flag}=" in argv or any(argv[i + 1 : i + 2] == [""] for i in at):
                raise ValueError(f"{flag} is empty; expected {action.metavar}")


def console() -> None:
    sys.exit(main())
