"""An optuna search as a queue of runs: a trial is a run whose overrides optuna chose.

Only the process of the sweep uses optuna, through its ask and tell; workers do not. A trial that is RUNNING in the database when a
sweep starts therefore belongs to a sweep that was killed (the lock of the work folder shows that no other sweep is alive). It is
marked as FAIL at once and queued again with the same values, so that it gets the same folder, where training resumes. Optuna's
heartbeat would do the same after its grace period, but only inside `study.optimize`. A trial whose command was killed by a signal is
queued again too, once; a trial that ended with an error is not.

Pruning reads metrics.jsonl of the run while it trains, and sends SIGTERM.
"""

import hashlib
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.sweeps import records
from ldm_jax.sweeps.launchers import Job
from ldm_jax.sweeps.queue import Queue
from ldm_jax.sweeps.study import Range, Run, Search, Study, make_run


def search_queue(
    study: Study, workdir: pathlib.Path, workers: int = 1, retry_failed: bool = False, every: float = 0.5
) -> Queue:
    """The trials of `study.search`, `workers` at a time, kept in `workdir/search.db`; metrics are read every `every` s.

    A search whose space, objective or direction changed begins anew in the same database; runs that it chooses again are not
    repeated. Raises ValueError for a wrong number of workers, an unknown sampler or pruner or a space that optuna refuses.
    """
    import optuna

    if not 0 <= study.search.seed < 2**64:
        raise ValueError(f"search seed={study.search.seed}; expected a whole number from 0 to 2**64 - 1")
    if workers < 1:
        raise ValueError("a search needs --workers=N: the trials at a time, since each learns from those before it")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    states = optuna.trial.TrialState
    search = study.search
    space = {key: _distribution(optuna, key, values) for key, values in search.space.items()}
    about = [{key: optuna.distributions.distribution_to_json(d) for key, d in space.items()}, search.fixed]
    about = json.dumps([*about, study.objective, study.direction], sort_keys=True)
    trials = optuna.create_study(
        study_name=f"{study.name}-{hashlib.sha256(about.encode()).hexdigest()[:8]}",
        storage=f"sqlite:///{workdir / 'search.db'}",
        direction=study.direction,
        pruner=_pruner(optuna, search),
        load_if_exists=True,
    )
    before = trials.get_trials(deepcopy=False)
    # The same seed would draw the same first points again.
    trials.sampler = _sampler(optuna, search, search.seed + len(before))

    def again(number: int, params: dict[str, Any]) -> None:
        trials.enqueue_trial(params, user_attrs={"again": number})

    repeated = {trial.user_attrs["again"] for trial in before if "again" in trial.user_attrs}
    for trial in before:
        if trial.state == states.RUNNING:
            trials.tell(trial.number, state=states.FAIL)
            again(trial.number, trial.params)
            repeated.add(trial.number)
        elif retry_failed and trial.state == states.FAIL and trial.number not in repeated:
            again(trial.number, trial.params)
            repeated.add(trial.number)
    runs: dict[str, Run] = {}
    counted = 0  # trials that are finished or under way, one for each chain of repetitions
    for trial in before:
        if trial.state != states.WAITING and trial.number not in repeated:
            counted += 1
            run = make_run(study, {**search.fixed, **trial.params}, workdir)
            runs[run.id] = run

    under_way: dict[str, list[Any]] = {}  # two trials with the same values share one run
    reported: dict[str, int] = {}
    looked: dict[str, tuple[float, int]] = {}  # when, and how long metrics.jsonl was
    pruned: set[str] = set()

    def take(room: int) -> list[Run]:
        nonlocal counted
        new: list[Run] = []
        while len(new) < room and sum(map(len, under_way.values())) < workers and counted < search.trials:
            trial = trials.ask(space)
            counted += 1
            run = make_run(study, {**search.fixed, **trial.params}, workdir)
            runs[run.id] = run
            if run.id in under_way:
                under_way[run.id].append(trial)
                continue
            under_way[run.id] = [trial]
            state = records.status(run)
            if state in ("done", "pruned") or (state == "failed" and "again" not in trial.user_attrs):
                ended(run, state)
            else:
                new.append(run)
        return new

    def watch(run: Run, job: Job) -> None:
        when, size = looked.get(run.id, (0.0, 0))
        if run.id in pruned or time.monotonic() - when < every:
            return
        path = run.folder / "metrics.jsonl"
        looked[run.id] = time.monotonic(), path.stat().st_size if path.exists() else 0
        if looked[run.id][1] == size:
            return
        rows = records.rows(path)
        trial = under_way[run.id][0]
        for row in rows[reported.get(run.id, 0) :]:
            value, step = row.get(search.report or study.objective), row.get(search.step)
            if isinstance(value, int | float) and isinstance(step, int | float):
                trial.report(float(value), int(step))
        reported[run.id] = len(rows)
        if trial.should_prune():
            pruned.add(run.id)
            job.stop()

    def ended(run: Run, state: str) -> None:
        nonlocal counted
        asked = under_way.pop(run.id)
        if run.id in pruned and state != "done":
            state = "pruned"
            metrics = records.last_values(run.folder / "metrics.jsonl")
            records.settle(run.folder, "pruned", metrics=metrics)
        pruned.discard(run.id)
        reported.pop(run.id, None)
        looked.pop(run.id, None)
        value = records.result(run).get("metrics", {}).get(study.objective)
        if state == "done" and not (isinstance(value, int | float) and math.isfinite(value)):
            state = "failed"
            records.settle(run.folder, state, error=f"no finite {study.objective!r} in its result, got {value!r}")
        for trial in asked:
            if state == "done":
                trials.tell(trial, float(value))
            elif state == "pruned":
                trials.tell(trial, state=states.PRUNED)
            else:
                trials.tell(trial, state=states.FAIL)
                if (state == "stopped" or records.result(run).get("killed")) and "again" not in trial.user_attrs:
                    again(trial.number, trial.params)
                    counted -= 1

    return Queue(take, watch, ended, lambda: list(runs.values()), search.trials)


def _distribution(optuna: Any, key: str, values: Range | Sequence[Any]) -> Any:
    try:
        if not isinstance(values, Range):
            return optuna.distributions.CategoricalDistribution(tuple(values))
        if values.integer:
            return optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
        return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)
    except (ValueError, TypeError) as error:
        raise ValueError(f"search space {key!r}: {error}") from None


def _sampler(optuna: Any, search: Search, seed: int) -> Any:
    options = dict(search.sampler)
    name = options.pop("name", None)
    # The generators of optuna take 32 bits.
    seed = seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed, **options)
    if name == "tpe":
        # With constant_liar parallel workers do not all try the same promising point.
        return optuna.samplers.TPESampler(**{"seed": seed, "constant_liar": True, **options})
    raise ValueError(f"search sampler {name!r}, expected 'tpe' or 'random'")


def _pruner(optuna: Any, search: Search) -> Any:
    options = dict(search.pruner)
    name = options.pop("name", None)
    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "percentile": optuna.pruners.PercentilePruner,
        "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    }
    if name not in pruners:
        raise ValueError(f"search pruner {name!r}, expected one of {', '.join(pruners)}")
    if name == "successive_halving" and "min_resource" not in options:
        raise ValueError("search pruner 'successive_halving' needs min_resource, in units of the search's `step`")
    return pruners[name](**options)
