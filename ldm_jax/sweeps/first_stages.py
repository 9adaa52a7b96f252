"""A check of the first stages that the trainings of a study name, before a job is submitted and waits in a queue for a day.

First stages from the hub are fetched here, once, where there is a network: the nodes of a cluster read them from the cache.
"""

import pathlib
from collections.abc import Sequence

from ldm_jax.sweeps.study import Run

KEY = "--config.first_stage.workdir="


def named(run: Run) -> set[tuple[str, str]]:
    """(config, first_stage.workdir) of each `ldm train` of a run; '' where the command line does not name it."""
    stages = set()
    for line in run.commands:
        specs = [word.removeprefix("--config=") for word in line if word.startswith("--config=")]
        if "train" in line and specs:
            said = [word.removeprefix(KEY) for word in line if word.startswith(KEY)]
            stages.add((specs[-1], said[-1] if said else ""))
    return stages


def check(runs: Sequence[Run]) -> None:
    """Raise ValueError, one line, for a first stage that does not exist, is no autoencoder, or has not been trained to its end.

    A first stage that the study itself trains, in or below the --workdir of a command, is not checked.
    """
    trainings = set().union(*map(named, runs))
    if not trainings:
        return
    from ldm_jax import plugins
    from ldm_jax.config import config_file  # takes seconds, which studies without training need not wait
    from ldm_jax.training import build, experiment, open_stage, published

    words = [word for run in runs for line in run.commands for word in line]
    made = {_absolute(word.removeprefix("--workdir=")) for word in words if word.startswith("--workdir=")}
    places = {place for _, place in trainings}
    plugins.load(word.removeprefix("--plugin=") for word in words if word.startswith("--plugin="))
    for spec in {spec for spec, place in trainings if not place}:
        parsed = experiment.parse(config_file.load(spec))
        places |= {parsed.first_stage.workdir} if build.needs_stage(parsed) else set()
    for place in sorted(places - {""}):
        if made & {_absolute(place), *_absolute(place).parents}:
            continue
        try:
            path = published.place(place)
            open_stage.check_finished(path)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"config.first_stage.workdir={place}, which runs of this study name: {error}") from None


def _absolute(path: str) -> pathlib.Path:
    return pathlib.Path(path).absolute()
