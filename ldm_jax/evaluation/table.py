"""METRICS: every metric of `ldm evaluate` by its name in --metrics, and what follows from the table.

A new metric is one file with its METRIC and one line of FILES. A file that is loaded as a plug-in adds to METRICS by itself:
METRICS |= {name: METRIC for name in METRIC.names}.
"""

import importlib
import textwrap
from collections.abc import Iterable

from ldm_jax.evaluation.metrics import Figure, Flag, Metric, networks_of

FILES = (
    "fid",
    "sfid",
    "fid_by_class",
    "inception_score",
    "kid",
    "precision_recall",
    "cmmd",
    "clip_score",
    "accuracy",
    "shapes",
    "neighbours",
    "bits",
    "psnr",
    "ssim",
    "lpips",
    "rfid",
    "codebook",
    "kl",
    "spectrum",
)

_LISTED = [importlib.import_module(f"ldm_jax.evaluation.{file}").METRIC for file in FILES]
METRICS: dict[str, Metric] = {name: metric for metric in _LISTED for name in metric.names}


def flags() -> list[Flag]:
    """The flags that metrics bring along, each once."""
    return list({flag.name: flag for metric in METRICS.values() for flag in metric.flags}.values())


def readers(flag: str) -> list[str]:
    """Names of the metrics that bring along or read this flag."""
    return [
        name
        for name, metric in METRICS.items()
        if flag in metric.reads or any(flag == brought.name for brought in metric.flags)
    ]


def choices(metrics: Iterable[str], networks: Iterable[str]) -> dict[str, Figure]:
    """The figures that these metrics give with these networks and by which a checkpoint may be chosen, by name."""
    return {
        figure.name: figure
        for metric in map(METRICS.__getitem__, metrics)
        for network in networks_of(metric, networks)
        for figure in metric.gives(network)
    }


def _line(metric: Metric) -> str:
    """A metric's help, with the unit and the direction of its figures where they agree on it."""
    network = "inception" if metric.networks == ("any",) else (*metric.networks, "")[0]
    units, directions = ({figure[i] for figure in metric.gives(network)} for i in (1, 2))
    facts = [*units] if len(units) == 1 else []
    facts += ["higher is better" if higher else "lower is better" for higher in directions if len(directions) == 1]
    facts = [fact for fact in facts if fact]
    return f"{metric.help} ({', '.join(facts)})" if facts else metric.help


def listing() -> str:
    """The metrics as `ldm evaluate --help` lists them, by heading."""
    lines: dict[str, list[str]] = {}
    for metric in dict.fromkeys(METRICS.values()):
        text = textwrap.wrap(_line(metric), 112)
        names = ", ".join(metric.names)
        lines.setdefault(metric.of, []).extend(f"  {names if i == 0 else '':13} {part}" for i, part in enumerate(text))
    return "\n".join("\n".join([f"{heading}:", *rows]) for heading, rows in lines.items())
