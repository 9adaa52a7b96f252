"""Facts: what a run depends on and no checkpoint holds, by name, so that a run goes on only where they are the same.

    facts = {name: sha256 of a file's or a network's content, or a list of numbers}

A first stage gives the sha256 of its encoder and its whitening, a perceptual loss that of its network. They stand in the meta of each
checkpoint. The comparison does not know what a fact means. Hashes have to be equal; numbers have to be equal to 1 %, because
statistics that another machine measures anew differ in their last digits.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

Facts = dict[str, str | list[float]]

FIRST_STAGE, DECODER = "first stage", "decoder of the first stage"
MEAN, STD = "whitening mean", "whitening std"
TOLERANCE = 1e-2


def of_task(facts: Mapping[str, str]) -> Facts:
    """The facts of a task and of its conditions, each under the name that an error message gives it: that of its config key."""
    return {
        f"network in config.{'' if name.startswith('condition.') else 'task.'}{name}": x for name, x in facts.items()
    }


def of_meta(meta: Mapping[str, Any]) -> Facts:
    """The facts that a checkpoint states. Checkpoints written before there was the key 'facts' have a key for each of them."""
    if "facts" in meta:
        return dict(meta["facts"])
    out = {}
    if meta.get("first_stage"):
        out[FIRST_STAGE] = meta["first_stage"]
    if "decoder" in meta:
        out[DECODER] = meta["decoder"]
    for name, key in ((MEAN, "mean"), (STD, "std")):
        if key in meta.get("whitening", {}):
            out[name] = meta["whitening"][key]
    return out | of_task(meta.get("judges", {}))


def check(workdir: pathlib.Path, then: Facts, now: Facts) -> None:
    """Raise ValueError, which names the fact, unless all facts that both state are the same. workdir: the run, for the message."""
    for name in now:
        if name in then and not _same(then[name], now[name]):
            raise ValueError(
                f"{workdir} was trained with another {name} ({_shown(then[name])}, now {_shown(now[name])}): it was trained anew, "
                "exchanged or damaged; put it back"
            )


def _same(then: str | list[float], now: str | list[float]) -> bool:
    if isinstance(then, str) or isinstance(now, str):
        return then == now
    return len(then) == len(now) and np.allclose(then, now, rtol=TOLERANCE, atol=TOLERANCE * float(np.max(np.abs(now))))


def _shown(fact: str | list[float]) -> str:
    return (fact[:12] or "none") if isinstance(fact, str) else str(np.round(fact, 4).tolist())
