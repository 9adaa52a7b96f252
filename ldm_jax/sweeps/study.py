"""What a study file declares: the runs (a list, or a space to search), the commands of a run, and what to show.

A run is one or more commands. Its result is the last JSON object that they print, completed by the last value of every key in the
`metrics.jsonl` of the run. This module starts nothing; `ldm_jax.sweeps.run` does.
"""

import hashlib
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ldm_jax import plugins
from ldm_jax.config import config_file
from ldm_jax.sweeps.algebra import Overrides

# (overrides, folder of the run) -> the command lines to run one after the other
Commands = Callable[[Overrides, pathlib.Path], list[list[str]]]


class Range(NamedTuple):
    """A searched number between `low` and `high`, both included; uniform in its logarithm with `log`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


class Search(NamedTuple):
    """An optuna search for the best `Study.objective`.

    space:   dotted key -> Range, or a list of choices
    trials:  how many trials to finish (complete or pruned)
    sampler: {'name': 'tpe' | 'random', **its arguments}
    pruner:  {'name': 'none' | 'median' | 'successive_halving' | 'percentile', **its arguments}; successive_halving
             needs `min_resource` in units of `step`: the guess of optuna uses one finished trial only
    report:  the key of metrics.jsonl that the pruner judges by while a run trains (default: the objective)
    step:    the key of metrics.jsonl that counts progress
    fixed:   overrides that every trial shares
    """

    space: dict[str, Range | Sequence[Any]]
    trials: int = 20
    sampler: dict[str, Any] = {"name": "tpe"}  # noqa: RUF012
    pruner: dict[str, Any] = {"name": "median"}  # noqa: RUF012
    report: str = ""
    step: str = "step"
    seed: int = 0
    fixed: Overrides = {}  # noqa: RUF012


class Plot(NamedTuple):
    """One figure over the finished runs.

    kind:  'line': y over x, a curve for each value of `hue`, a panel for each value of `facet`
           'heat': colour y over the two override keys x (across) and hue (down), a panel for each value of `facet`
    Several runs at one point (seeds) are drawn as their mean with the range as a band. Only runs that have the overrides in `where`
    are drawn.
    """

    x: str
    y: str
    hue: str = ""
    facet: str = ""
    kind: str = "line"
    log_x: bool = False
    log_y: bool = False
    where: Overrides = {}  # noqa: RUF012


class Study(NamedTuple):
    """A study has either `runs` (a list of overrides) or a `search`.

    name:      letters, digits, - and _
    commands:  what a run does: train_and_evaluate(...), evaluate_only(...) or (overrides, folder) -> command lines
    objective: the metric that ranks the runs ('' ranks none); direction: 'minimize' or 'maximize'
    columns:   the metrics that the table shows (default: the objective); plot: a Plot or several
    """

    name: str
    commands: Commands
    runs: Sequence[Overrides] = ()
    search: Search | None = None
    objective: str = ""
    direction: str = "minimize"
    columns: Sequence[str] = ()
    plot: Plot | Sequence[Plot] = ()
    title: str = ""


class Run(NamedTuple):
    """One run of a study: its folder is DIR/runs/ID; `fingerprint` changes with the overrides or with any command."""

    id: str
    overrides: Overrides
    folder: pathlib.Path
    commands: list[list[str]]
    fingerprint: str


def flag(value: Any) -> str:
    """A value as it stands behind `--key=`: strings bare, floats by repr (which is exact), lists as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, dict | list) else repr(value)


def train_and_evaluate(
    config: str, evaluate: Sequence[dict[str, Any]] = (), fixed: Overrides | None = None
) -> Commands:
    """Each run trains `config` with its overrides in the folder of the run, then evaluates once for each dict in `evaluate`.

        train_and_evaluate('configs/cifar10_vae.py', evaluate=[dict(metrics='psnr', num=500)])

    `fixed` are overrides that all runs share; names and tables do not repeat them. A run that is started again
    resumes from its last checkpoint, because `ldm train` does.
    """

    def commands(overrides: Overrides, folder: pathlib.Path) -> list[list[str]]:
        program = [sys.executable, "-m", "ldm_jax"]
        settings = [f"--config.{key}={flag(value)}" for key, value in {**(fixed or {}), **overrides}.items()]
        lines = [[*program, "train", f"--config={config}", f"--workdir={folder}", *settings]]
        for flags in evaluate:
            settings = [f"--{key}={flag(value)}" for key, value in flags.items()]
            lines.append([*program, "evaluate", f"--workdir={folder}", *settings])
        return lines

    return commands


def evaluate_only(workdir: str | pathlib.Path, **flags: Any) -> Commands:
    """Each run is one `ldm evaluate` of the checkpoint in `workdir`; overrides and `flags` become `--key=value`.

    evaluate_only('runs/cifar10_ldm_dit', metrics='fid,accuracy', features='classifier:DIR', num=500)
    """

    def commands(overrides: Overrides, folder: pathlib.Path) -> list[list[str]]:
        settings = [f"--{key}={flag(value)}" for key, value in {**flags, **overrides}.items()]
        return [[sys.executable, "-m", "ldm_jax", "evaluate", f"--workdir={workdir}", *settings]]

    return commands


def make_run(study: Study, overrides: Overrides, workdir: pathlib.Path) -> Run:
    """The run of `overrides` in `workdir`.

    The id is readable and ends in a hash of the overrides and the first command. A study with new runs keeps its finished ones, an
    evaluation that changes is repeated on the trained checkpoint, and a training command that changes gets a new folder and not the
    checkpoint of another command. The places of `workdir` and of the interpreter do not matter.
    """
    plain = [
        ["python" if word == sys.executable else word for word in line]
        for line in study.commands(dict(overrides), pathlib.Path("RUN"))
    ]
    if not plain:
        raise ValueError(f"study {study.name!r}: commands() returned no command for {overrides}")
    parts = [f"{key.rsplit('.', 1)[-1]}={flag(value)}" for key, value in overrides.items()]
    readable = re.sub(r"[^A-Za-z0-9=.+_-]+", "-", "_".join(parts))
    id = f"{readable[:100] or study.name}_{_hash([overrides, plain[0]])[:8]}"
    folder = workdir / "runs" / id
    return Run(id, dict(overrides), folder, study.commands(dict(overrides), folder), _hash([overrides, plain]))


def make_runs(study: Study, workdir: pathlib.Path) -> list[Run]:
    """The runs of a study that lists them; a run that is listed twice is one run."""
    return list({run.id: run for run in (make_run(study, overrides, workdir) for overrides in study.runs)}.values())


def _arguments(config: Any) -> dict[str, Any]:
    from ldm_jax.training import blocks  # seconds that most studies need not wait: their keys stand in the config files

    return blocks.arguments(config)


def check_trainings(run: Run) -> None:
    """Raise ValueError or FileNotFoundError, with the run's id, for an `ldm train` whose config file or overrides are wrong.

    Only keys, types and ranges are checked: the training builds the networks, on its device.
    """
    for line in run.commands:
        if line[1:4] != ["-m", "ldm_jax", "train"]:
            continue
        overrides = [word for word in line if word.startswith("--config.")]
        for word in line:
            if word.startswith("--config="):
                try:
                    plugins.load(word.removeprefix("--plugin=") for word in line if word.startswith("--plugin="))
                    config_file.load(word.removeprefix("--config="), overrides, _arguments)
                except (ValueError, FileNotFoundError) as error:
                    raise type(error)(f"run {run.id}: {error}") from error


def load_study(path: str | pathlib.Path) -> Study:
    """`get_study()` of a study file, named from the current folder or from this project, checked.

    Raises ValueError or FileNotFoundError, one line that names the file.
    """
    path = pathlib.Path(path)
    if not path.is_file() and (config_file.PROJECT / path).is_file():
        path = config_file.PROJECT / path
    if not path.is_file():
        raise FileNotFoundError(f"no study file {path} (a study is a Python file with get_study(), see experiments/)")
    spec = importlib.util.spec_from_file_location(f"ldm_jax_study_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: a study is experiments/NAME.py with get_study()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_study"):
            raise ValueError("it has no get_study()")
        study = module.get_study()
        if not isinstance(study, Study):
            raise ValueError(f"get_study() returned {type(study).__name__}, expected Study")
        check(study)
    except (Exception, SystemExit) as error:
        # One line for any error in the file: its name and line help, the stack of this module does not.
        traceback, line = error.__traceback__, 0
        while traceback:
            if traceback.tb_frame.f_code.co_filename == str(path):
                line = traceback.tb_lineno
            traceback = traceback.tb_next
        line = error.lineno or 0 if isinstance(error, SyntaxError) else line
        where = f"{path}, line {line}" if line else str(path)
        raise ValueError(f"study file {where}: {type(error).__name__}: {error}") from error
    return study


def check(study: Study) -> None:
    """Raise ValueError where a study contradicts itself."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", study.name):
        raise ValueError(f"name {study.name!r} has other characters than letters, digits, - and _")
    if study.direction not in ("minimize", "maximize"):
        raise ValueError(f"direction {study.direction!r}, expected 'minimize' or 'maximize'")
    if bool(study.runs) == (study.search is not None):
        raise ValueError("a study has either runs or search, " + ("not both" if study.runs else "this one has neither"))
    for overrides in study.runs:
        if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
            raise ValueError(f"a run is a dict from dotted keys to values, got {overrides!r}")
        try:
            json.dumps(overrides)
        except TypeError:
            raise ValueError(f"a run's values are numbers, strings, lists or None, got {overrides!r}") from None
    if study.search is not None:
        if not study.objective:
            raise ValueError("a search needs an objective: the metric to optimise")
        if not study.search.space or study.search.trials < 1:
            raise ValueError("a search needs a space of at least one key and at least one trial")
    for plot in plots(study):
        if plot.kind not in ("line", "heat"):
            raise ValueError(f"plot kind {plot.kind!r}, expected 'line' or 'heat'")
        if plot.kind == "heat" and not plot.hue:
            raise ValueError("a heat plot needs two override keys: x and hue")
        keys = {name for run in study.runs for key in run for name in (key, key.rsplit(".", 1)[-1])}
        if study.runs and (unknown := sorted(set(plot.where) - keys)):
            raise ValueError(
                f"a plot's where names {', '.join(unknown)}, which no run sets; there are {', '.join(sorted(keys))}"
            )


def plots(study: Study) -> tuple[Plot, ...]:
    """The plots of a study as a tuple, whether it declares none, one or several."""
    return (study.plot,) if isinstance(study.plot, Plot) else tuple(study.plot)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
