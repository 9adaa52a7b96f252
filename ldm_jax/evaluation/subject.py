"""One evaluation: what is measured, what is asked of it, and whether the two fit. `ldm evaluate` and Loaded.evaluate share it.

    subject = of_run(DIR)                               or of_published(PATH, CONFIG, DIR)
    asked = Asked(metrics, flags, settings)
    row = measured(subject, asked)                      check, tools, request, evaluate.measure, record

What is asked has the names of the flags of `ldm evaluate`, and so have the messages.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ldm_jax.config import config_file, construct
from ldm_jax.diffusion import seeds
from ldm_jax.evaluation import evaluate, features, metrics, table, ways
from ldm_jax.kernels import processes
from ldm_jax.runs import log
from ldm_jax.training import blocks, experiment, first_stage, open_stage, restore, sampling, task

# Flags of every evaluation besides those of metrics and of drawing, and besides which checkpoint is measured.
FLAGS = frozenset(("num", "features", "reference", "samples", "prompts", "labels", "seed", "subset", "out"))


class Subject(NamedTuple):
    """What is measured.

    home       where figures, grids and statistics of real images go: the folder of the run, or one for a published autoencoder
    config     of the run, or of the data that a published autoencoder is shown; figures: what its task offers
    published  the published autoencoder, None for a run
    run        the diffusion run, where its parameters are read already, with the average `ema` and another `first_stage`
    classifier (folder, scale) of what guides it, where Asked names none
    """

    home: pathlib.Path
    config: experiment.Experiment
    figures: task.Figures
    published: first_stage.FirstStage | None = None
    run: restore.Restored | None = None
    ema: str | None = None
    first_stage: str = ""
    classifier: tuple[str, float] | None = None


class Asked(NamedTuple):
    """What is asked of an evaluation.

    metrics   names of table.METRICS
    flags     {flag: value} of the flags of `ldm evaluate` that the user gives, with '_' in the place of '-'
    settings  how images are drawn, where they are drawn; classifier: (folder, scale) of what guides them besides
    plugins   {file name: sha256} of the plug-ins in use; quiet: no progress bars
    """

    metrics: tuple[str, ...]
    flags: Mapping[str, Any]
    settings: sampling.Settings | None = None
    plugins: Mapping[str, str] = {}
    quiet: bool = False
    classifier: tuple[str, float] | None = None


def of_run(workdir: pathlib.Path) -> Subject:
    """The run in a folder. Raises as runs.read."""
    config = experiment.of_run(workdir)
    return Subject(workdir, config, blocks.kind_of(config).figures)


def of_published(path: pathlib.Path, data: str, home: pathlib.Path) -> Subject:
    """The published autoencoder at `path` before the reporting images of the config `data`, FILE.py[:WORDS]."""
    config = experiment.parse(config_file.load(data))
    measured = config.first_stage._replace(whitening="measured")
    config = config._replace(task=construct.Block(open_stage.TASK, {}), dtype="float32", first_stage=measured)
    stage = open_stage.load(path, experiment=config)
    return Subject(home, config, blocks.kind_of(config).figures, stage)


# --- whether it fits -----------------------------------------------------------------------------------------------------

# What to say of a flag that a way to get images reads, where nothing reads it; drawn images for the others.
DRAWN = "images that are drawn from a diffusion run"
READ_BY = {
    "ema": "a checkpoint of a diffusion run or an autoencoder",
    "num": "images that are drawn, reconstructed or of a split",
    "out": "grids of an autoencoder's run",
}


def way_of(subject: Subject, asked: Asked) -> ways.Way:
    """How the images are made that are measured."""
    return ways.way_of(asked.flags.get("samples", ""), subject.figures)


def feature_words(subject: Subject, asked: Asked) -> list[str]:
    """NAME[:WHERE] of each feature network."""
    words = asked.flags.get("features") or subject.figures.features.format(workdir=subject.home)
    return [word for word in words.split(",") if word]


def _listed(names: Iterable[str]) -> str:
    """'the metric A', 'the metrics A, B and C'."""
    *first, last = names
    return f"the metrics {', '.join(first)} and {last}" if first else f"the metric {last}"


def reads(subject: Subject, asked: Asked) -> dict[str, tuple[bool, str]]:
    """{flag: (whether anything reads it, what does)}, of flags that not every evaluation reads."""
    chosen, way = [table.METRICS[name] for name in asked.metrics], way_of(subject, asked)
    available = [word.partition(":")[0] for word in feature_words(subject, asked)]
    seen = any(metric.takes or metric.each for metric in chosen)
    by_way = {*way.reads, *(way.draws if seen else ())}
    used = {network for metric in chosen for network in metrics.networks_of(metric, available)}
    unused = [network for network in available if network not in used]
    result = {
        "features": (not unused, f"metrics of {', '.join(unused)}"),
        "reference": (any(metric.compares for metric in chosen), "metrics that compare with it, such as fid"),
        "subset": (
            any(how == "subset" for metric in chosen for how, _ in metric.takes),
            "metrics of some of the images' features, such as fid",
        ),
    }
    of_ways = [flag for each in ways.WAYS.values() for flag in (*each.reads, *each.draws)]
    of_metrics = [
        flag for metric in table.METRICS.values() for flag in (*metric.reads, *(f.name for f in metric.flags))
    ]
    for flag in dict.fromkeys([*of_ways, *of_metrics]):
        readers, what = table.readers(flag), []
        if flag in of_ways:
            what.append(READ_BY.get(flag, DRAWN))
        if readers:
            what.append(_listed(readers))
        result[flag] = (flag in by_way or not set(asked.metrics).isdisjoint(readers), ", or ".join(what))
    return result


def check(subject: Subject, asked: Asked) -> None:
    """Raise ValueError for what is wrong, does not go together on such a subject, or is read by nothing."""
    names, flags = asked.metrics, asked.flags
    seeds.check("--seed", flags.get("seed", 0))
    for name in names:
        if name not in table.METRICS:
            raise ValueError(f"--metrics={name} is unknown; there are {', '.join(table.METRICS)}")
        if names.count(name) > 1:
            raise ValueError(f"--metrics={','.join(names)} names {name} twice")
    for flag, least in (("num", 2), ("subset", 4)):
        if flag in flags and flags[flag] < least:
            raise ValueError(f"--{flag}={flags[flag]}; expected at least {least}")
    for flag in table.flags():
        if flag.name in flags:
            flag.check(flags[flag.name])
    evaluate.check_networks(names, [word.partition(":")[0] for word in feature_words(subject, asked)])
    for flag, (is_read, what) in reads(subject, asked).items():
        if flag in flags and not is_read:
            raise ValueError(f"--{flag.replace('_', '-')}={flags[flag]} goes with {what}; nothing reads it here")


# --- what it takes -------------------------------------------------------------------------------------------------------


def tools(subject: Subject, asked: Asked) -> dict[str, Any]:
    """What every checkpoint is measured with: a metrics.Case but for its images. ValueError for networks that cannot be read."""
    flags, networks, options = asked.flags, {}, {}
    for word in feature_words(subject, asked):
        extractor = features.named(word)
        if extractor.name in networks:
            raise ValueError(f"--features={flags.get('features', word)} names {extractor.name} twice")
        networks[extractor.name] = extractor
    settings = metrics.Settings(
        reference=flags.get("reference") or f"split:{subject.config.split.report}",
        folder=subject.home / "statistics",
        pictures=pathlib.Path(flags.get("out") or subject.home / "pictures"),
        subset=flags.get("subset", 10_000),
        seed=flags.get("seed", 0),
        quiet=asked.quiet,
        plugins=asked.plugins,
    )
    for metric in (table.METRICS[name] for name in asked.metrics):
        options |= {name: flags[name] for name in metric.reads if name in flags}
        for flag in metric.flags:
            if flag.name in flags and flag.name not in options:
                options[flag.name] = flag.open(flags[flag.name])
    return {"config": subject.config, "networks": networks, "settings": settings, "options": options}


def request(
    subject: Subject, asked: Asked, step: int | None = None, workdir: pathlib.Path | None = None
) -> ways.Request:
    """The images to measure; checkpoints are read in `workdir` (None: in the subject's home), step None is the newest."""
    flags = asked.flags
    return ways.Request(
        workdir or subject.home,
        subject.config,
        num=flags.get("num", subject.figures.num),
        step=step,
        ema=flags.get("ema", subject.ema),
        samples=flags.get("samples", ""),
        published=subject.published,
        settings=asked.settings,
        seed=flags.get("seed", 0),
        prompts=flags.get("prompts", ""),
        labels=flags.get("labels", ""),
        first_stage=flags.get("first_stage", subject.first_stage),
        classifier=asked.classifier or subject.classifier,
        run=subject.run,
    )


def record(subject: Subject, row: Mapping[str, Any]) -> None:
    """Append the row to metrics.jsonl in the subject's home; of several processes the first one does."""
    if not processes.is_first():
        return
    subject.home.mkdir(parents=True, exist_ok=True)
    log.append(subject.home / "metrics.jsonl", row)


def measured(subject: Subject, asked: Asked, step: int | None = None) -> dict[str, Any]:
    """The row of one checkpoint, which is recorded too. ValueError as `check` and evaluate.measure, before any image is made."""
    check(subject, asked)
    common = tools(subject, asked)
    images, run = way_of(subject, asked).make(request(subject, asked, step))
    row = evaluate.measure(metrics.Case(images, run=run, **common), asked.metrics)
    record(subject, row)
    return row
