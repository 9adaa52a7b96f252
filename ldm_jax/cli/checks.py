"""What several verbs ask of their flags before any work is done."""

import math
import os
import pathlib
import warnings
from typing import Any

# More images or steps than this are a slip of the hand; the lists of prompts and labels, one an image, would not fit into memory.
MOST_IMAGES, MOST_STEPS = 10_000_000, 1_000_000


def number(flag: str, value: int | None, least: int, most: int | None = None) -> None:
    """ValueError unless the value is at least `least` and at most `most`; None, a flag that was not given, is right."""
    if value is None or (least <= value and (most is None or value <= most)):
        return
    expected = f"at least {least}" if most is None or value < least else f"at most {most}"
    raise ValueError(f"--{flag}={value}; expected {expected}")


def scale(flag: str, value: float | None) -> None:
    """ValueError for a number that is not finite, or that a float32 does not hold; None, a flag that was not given, is right."""
    if value is not None and not (math.isfinite(value) and abs(value) < 3.4e38):
        raise ValueError(f"--{flag}={value}; expected a finite number")


def text(flag: str, value: str | None) -> None:
    """ValueError for a value that is no text: bytes of a command line that are not UTF-8."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"--{flag}={value!r}; expected text in UTF-8") from None


def consistency(sampler: str | None, distilled: bool) -> None:
    """A warning where the update rule of consistency networks is asked of another: it begins anew from each estimate."""
    if sampler in ("lcm", "tcd") and not distilled:
        warnings.warn(
            f"--sampler={sampler} is for consistency networks (LCM, TCD, or one with their LoRA merged in); of an ordinary diffusion "
            "network it draws blurred or grainy images",
            stacklevel=2,
        )


def folder(flag: str, path: str) -> pathlib.Path:
    """The folder to write to, which is made later. ValueError where none can be: for no name, a file in its place, no permission."""
    if not path.strip() or path.splitlines() != [path]:
        raise ValueError(f"--{flag}={path!r}; expected the name of a folder, without a line break")
    at = pathlib.Path(path).absolute()
    if any(len(os.fsencode(part)) > 255 for part in at.parts):
        raise ValueError(f"--{flag}={path[:40]}...: a name of more than 255 bytes")
    while not os.path.lexists(at):
        at = at.parent
    if not at.is_dir():
        raise ValueError(f"--{flag}={path}: {at} is no folder")
    if not os.access(at, os.W_OK | os.X_OK):
        raise ValueError(f"--{flag}={path}: {at} may not be written to")
    return pathlib.Path(path)


def arguments(config: Any) -> dict[str, Any]:
    """training.blocks.arguments, which imports jax: only an override that the config file does not spell out has to wait for it."""
    from ldm_jax.training import blocks

    return blocks.arguments(config)
