"""What a sweep still has to run, whether it is a list or a search."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ldm_jax.sweeps import records
from ldm_jax.sweeps.launchers import Job
from ldm_jax.sweeps.study import Run


class Queue(NamedTuple):
    """take(room) -> at most `room` runs to start now; watch(run, job) while it runs; ended(run, status) after it.

    `runs()` gives all runs that the results show, and `total` is how many there will be.
    """

    take: Callable[[int], list[Run]]
    watch: Callable[[Run, Job], None]
    ended: Callable[[Run, str], None]
    runs: Callable[[], list[Run]]
    total: int


def list_queue(runs: Sequence[Run], retry_failed: bool = False) -> Queue:
    """The runs of a list that have not ended yet, in order; with `retry_failed` the failed ones too."""
    over = ("done", "pruned") if retry_failed else records.ENDED
    pending = [run for run in runs if records.status(run) not in over]

    def take(room: int) -> list[Run]:
        taken, pending[:] = pending[:room], pending[room:]
        return taken

    return Queue(take, lambda run, job: None, lambda run, status: None, lambda: list(runs), len(runs))


def matches(run: Run, terms: Sequence[str]) -> bool:
    """Whether a run fits every term: `KEY=VALUE` (the last part of the key is enough) or a part of the id of the run."""
    for term in terms:
        key, equals, value = term.partition("=")
        values = [str(v) for k, v in run.overrides.items() if key in (k, k.rsplit(".", 1)[-1])]
        if (equals and values and value not in values) or (not (equals and values) and term not in run.id):
            return False
    return True
