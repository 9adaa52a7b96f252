"""The flags that say how to draw, shared by `ldm sample`, `ldm evaluate` and `ldm generate`; and grids of several ways to draw.

--sampler=NAME:OPTION=VALUE,...        a name of a table, and options of it
--guidance=1,4,7.5  --sampler=a,b      lists: the same seeds drawn once for each value, or each combination of values
"""

import argparse
import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ldm_jax.cli import checks

if TYPE_CHECKING:
    import numpy as np

NAMED = "NAME[:OPTION=VALUE,...]"
# Flag, and the fields of sampling.settings.Settings that it fills in.
FLAGS = (
    ("sampler", "name", "options"),
    ("grid", "grid", "grid_options"),
    ("guidance_method", "guidance_method", "guidance_options"),
    ("guidance_schedule", "guidance_schedule", "schedule_options"),
    ("threshold", "threshold", "threshold_options"),
)
LISTS = ("sampler", "guidance", "classifier_scale")
CALLED = {"guidance": "guidance", "classifier_scale": "classifier"}  # what the grid calls a scale
SHOWN = 100  # images in grid.png, at most


class Numbers(list):
    """Numbers of one flag, printed as they stand on a command line."""

    def __str__(self) -> str:
        return ",".join(map(str, self))


def numbers(text: str) -> Numbers:
    """'1,4,7.5' -> [1.0, 4.0, 7.5]."""
    return Numbers(float(word) for word in text.split(","))


numbers.__name__ = "float"  # as argparse's message calls the type of a flag


def add_arguments(parser: argparse.ArgumentParser, grid: str = "spacing of the times; listed there as well") -> None:
    """How to draw: sampler, grid, guidance and threshold."""
    add = parser.add_argument
    add("--sampler", metavar=NAMED, help="update rule; `ldm samplers` lists them; several, A,B,...: a grid of them")
    add("--steps", type=int, metavar="N", help="steps of the sampler")
    add("--grid", metavar=NAMED, help=grid)
    add(
        "--guidance",
        type=numbers,
        metavar="W",
        help="scale of classifier-free guidance; 1: none; several, A,B,...: a grid of them",
    )
    add(
        "--guidance-method",
        metavar=NAMED,
        help="cfg, apg, cfg_zero or cfg_pp (CFG++: a scale in 0..1, samplers like ddim); listed there as well",
    )
    add("--guidance-schedule", metavar=NAMED, help="the scale over time, such as linear; listed there")
    add("--guidance-interval", metavar="LO,HI", help="guide at times LO to HI alone, 0 being data and 1 noise (0,1)")
    add("--threshold", metavar=NAMED, help="none, static or dynamic: the estimate kept in range, for pixels")
    add(
        "--classifier",
        metavar="DIR",
        help="guide a run by this classifier of noisy data, a run of the task noisy_classifier, to the classes that are drawn",
    )
    add(
        "--classifier-scale",
        type=numbers,
        metavar="S",
        help="scale of its gradient (1); 0: none; several, A,B,...: a grid of them",
    )


def _value(text: str) -> int | float | bool | str:
    for read in (int, float, {"true": True, "false": False}.__getitem__):
        try:
            return read(text)
        except (ValueError, KeyError):
            pass
    return text


def named(flag: str, text: str) -> tuple[str, dict[str, int | float | bool | str]]:
    """'NAME:OPTION=VALUE,...' -> (NAME, {OPTION: value}). Raises ValueError naming the flag and the word without a value."""
    name, _, rest = text.partition(":")
    options = {}
    for word in rest.split(",") if rest else ():
        option, equals, value = word.partition("=")
        if not option or not equals or not value:
            raise ValueError(f"{flag}={text}: {word!r} is no option; expected NAME:OPTION=VALUE,...")
        options[option] = _value(value)
        if options[option] != options[option]:
            raise ValueError(f"{flag}={text}: {word!r} is not a number")
    return name, options


def names(text: str) -> list[str]:
    """'ddim:eta=0.5,noise=1,euler' -> ['ddim:eta=0.5,noise=1', 'euler']: a word that is no OPTION=VALUE begins another name."""
    items: list[str] = []
    for word in text.split(","):
        option = items and (not word or ("=" in word and ":" not in word.partition("=")[0]))
        if option:
            items[-1] += "," + word
        else:
            items.append(word)
    return items


def interval(text: str | None) -> dict[str, float]:
    """'0.2,0.8' -> {'t_lo': 0.2, 't_hi': 0.8}; {} for None."""
    if text is None:
        return {}
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--guidance-interval={text}; expected LO,HI, two times from 0 to 1") from None
    if not 0 <= low < high <= 1:
        raise ValueError(f"--guidance-interval={text}; expected 0 <= LO < HI <= 1")
    return {"t_lo": low, "t_hi": high}


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Settings that the flags of one variant give, each name with its options. ValueError that names the flag."""
    checks.number("steps", args.steps, 1, checks.MOST_STEPS)
    fields = {"steps": args.steps, "guidance": None}
    if args.guidance is not None:
        if len(args.guidance) != 1:
            raise ValueError(f"--guidance={args.guidance}; expected one number here")
        (fields["guidance"],) = args.guidance
    for flag, key, options in FLAGS:
        text = getattr(args, flag)
        if text is not None:
            fields[key], fields[options] = named("--" + flag.replace("_", "-"), text)
    fields |= interval(args.guidance_interval)
    return {key: value for key, value in fields.items() if value is not None}


def classifier(args: argparse.Namespace) -> tuple[str, float] | None:
    """(folder, scale) of the classifier that guides one variant; None for none. ValueError that names the flag."""
    scales = args.classifier_scale
    if args.classifier is None:
        if scales is not None:
            raise ValueError(f"--classifier-scale={scales} goes with --classifier=DIR")
        return None
    scale, *more = [1.0] if scales is None else scales
    if more:
        raise ValueError(f"--classifier-scale={scales}; expected one number here")
    if not 0 <= scale <= 1000:
        raise ValueError(f"--classifier-scale={scale:g}; expected a number from 0 to 1000")
    return args.classifier, scale


def variants(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of each way to draw that lists ask for, a value of each of LISTS; one way where there is no list."""
    axes = {"sampler": [None] if args.sampler is None else names(args.sampler)}
    for flag in LISTS[1:]:
        axes[flag] = [None] if getattr(args, flag) is None else [Numbers([scale]) for scale in getattr(args, flag)]
    made = []
    for values in itertools.product(*axes.values()):
        made.append(copy.copy(args))
        vars(made[-1]).update(zip(axes, values))
    for flag, values in axes.items():
        if any(value in values[:i] for i, value in enumerate(values)):
            raise ValueError(f"--{flag.replace('_', '-')}: a value stands there twice")
    if len(made) > SHOWN:
        several = " and ".join(f"--{flag.replace('_', '-')}" for flag, values in axes.items() if len(values) > 1)
        raise ValueError(f"{several} ask for {len(made)} ways to draw; a grid shows at most {SHOWN}")
    return made


def side_by_side(
    made: Sequence[argparse.Namespace], images: "Sequence[Sequence[np.ndarray]]", captions: Sequence[str] | None
) -> "tuple[np.ndarray, int, list[str]]":
    """(images, columns, labels) of one grid: row by row the same image, once for each of the values that vary.

    images[v][i] is image i of variant v. Columns are the values of the last of LISTS that has several.
    """
    import numpy as np

    several = {flag: len({str(getattr(v, flag)) for v in made}) for flag in LISTS}
    several = {flag: count for flag, count in several.items() if count > 1}
    columns = [1, *several.values()][-1]
    cells, labels = [], []
    for i in range(min(min(map(len, images)), max(SHOWN // len(made), 1))):
        for variant, drawn in zip(made, images):
            words = [
                variant.sampler if flag == "sampler" else f"{CALLED[flag]} {getattr(variant, flag)[0]:g}"
                for flag in several
            ]
            words += [captions[i]] if captions else []
            cells.append(drawn[i])
            labels.append(", ".join(words))
    return np.stack(cells), columns, labels
