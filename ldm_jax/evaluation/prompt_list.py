"""The prompts of --prompts: the lines of a text file, or the captions of a split of the run's data."""

import pathlib

from ldm_jax.data import captions
from ldm_jax.data.subset import spread
from ldm_jax.evaluation import images
from ldm_jax.training import restore, streams


def read(run: restore.Restored, where: str, num: int) -> list[str]:
    """`num` captions: of 'split:NAME' of the run's data, evenly spread, or the lines of a text file in order; repeated.

    A file is UTF-8, with a byte order mark or without; lines without a word are left out. Raises FileNotFoundError,
    or ValueError for a file without a line or in another encoding, and for a run that takes no captions.
    """
    if "prompts" not in run.model.conditioning.takes:
        raise ValueError(f"--prompts={where}: this run takes no captions")
    if where.startswith("split:"):
        source = streams.source(images.of_split(run.experiment, where.removeprefix("split:")), "report")
        source = spread(source, min(num, len(source)))
        return [source[i % len(source)]["text"] for i in range(num)]
    path = pathlib.Path(where)
    if not path.is_file():
        raise FileNotFoundError(f"--prompts={where} is no file; expected a text file, one prompt a line, or split:NAME")
    # Only line feeds end a line: str.splitlines also splits at characters that print as a blank (U+2028, U+0085, form feeds).
    lines = [line.removesuffix("\r") for line in captions.as_text(path.read_bytes(), f"--prompts={where}").split("\n")]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"--prompts={where} holds no line with a prompt")
    return [lines[i % len(lines)] for i in range(num)]
