"""Starting from parameters that exist: those of another run, or of a published network's file (config.init_from)."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax.sharding import Sharding

from ldm_jax import runs, weights
from ldm_jax.models import vq
from ldm_jax.runs import checkpoint
from ldm_jax.training import open_stage
from ldm_jax.training.experiment import Experiment
from ldm_jax.training.state import TrainState
from ldm_jax.training.task import Kind
from ldm_jax.weights import files

# The names in TrainState.variables of what a network carries besides its parameters.
CARRIED = {"autoencoder": ("codebook",), "discriminator": ("discriminator", "anchors")}


def _read(experiment: Experiment, network: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """({network: parameters}, variables as plain dicts, where they are from) of config.init_from.

    network: the name of the network that config.model describes, which is the one that a file holds.
    """
    if experiment.init_from.workdir:
        run, average = _run(experiment)
        step = run.step()
        return run.params(step, average), checkpoint.restore_variables(run.workdir, step), f"{run.workdir}, step {step}"
    path = pathlib.Path(experiment.init_from.file)
    try:
        # On the host: a device may have room for its part of the network alone.
        params = weights.from_tensors(experiment.network, files.open_file(path), place=lambda path, value: value)
    except ValueError as error:
        raise ValueError(f"config.init_from.file={path} does not hold this network: {error}") from error
    return {network: params}, {}, str(path)


def _run(experiment: Experiment) -> tuple[runs.Run, str | None]:
    """The run that config.init_from.workdir names, and the average to take; None for the raw parameters."""
    run = runs.read(experiment.init_from.workdir)
    return run, run.named_average(experiment.init_from.ema or None)


def check(experiment: Experiment, network: str, shapes: TrainState) -> None:
    """Raise ValueError where `start` would. Reads what a checkpoint says of its parameters, and no parameter of it."""
    if experiment.init_from.workdir:
        run, average = _run(experiment)
        step = run.step()
        _shared(checkpoint.stored_params(run.workdir, step, average), shapes.params, f"{run.workdir}, step {step}")
    elif experiment.init_from.file:
        params, _, where = _read(experiment, network)
        _shared(params, shapes.params, where)


def _shared(stored: dict[str, Any], params: dict[str, Any], where: str) -> list[str]:
    """The networks that both have. Raises ValueError where there is none, or one has other parameters."""
    shared = sorted(stored.keys() & params.keys())
    if not shared:
        raise ValueError(f"config.init_from: {where} holds {sorted(stored)}; this run trains {sorted(params)}")
    for name in shared:
        if differ := checkpoint.differ(stored[name], params[name]):
            raise ValueError(
                f"config.init_from: the network {name!r} of {where} has other parameters than this config's: {differ}"
            )
    return shared


def start(
    experiment: Experiment, kind: Kind, state: TrainState, shardings: TrainState, say: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]]:
    """The state with the networks that config.init_from names in place of fresh ones, and what the checkpoints of this run inherit.

    Networks that both have are taken. What they carry in `variables` comes with them where it has the shapes of this config's: a
    codebook's averages, the statistics or vectors of the discriminator's norms. Raises ValueError where none fits, or one has other
    parameters than this config's.
    """
    if not experiment.init_from.workdir and not experiment.init_from.file:
        return state, {}
    stored, carried, where = _read(experiment, kind.network)
    shared = _shared(stored, state.params, where)
    params = dict(state.params)

    @functools.cache
    def copy_to(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda x: x.copy(), out_shardings=sharding)

    def put(value: Any, like: jax.Array, sharding: Sharding) -> jax.Array:
        # mesh.copied for one leaf, so that a device holds no second copy of the others; one program a shape, not one a call.
        return copy_to(sharding)(jax.device_put(np.asarray(value, like.dtype), sharding))

    for name in shared:
        params[name] = jax.tree.map(put, stored[name], state.params[name], shardings.params[name])
    fresh, placed = map(serialization.to_state_dict, (state.variables, shardings.variables))
    names = carried.keys() & fresh.keys() & {name for shared_name in shared for name in CARRIED.get(shared_name, ())}
    shapes, expected = (jax.tree.map(lambda x: x.shape, tree) for tree in (carried, fresh))
    variables = {name: carried[name] for name in sorted(names) if shapes[name] == expected[name]}
    say(
        f"starting from {', '.join(shared)} of {where}"
        + (f", carrying over {', '.join(variables)}" if variables else "")
    )
    if "codebook" in fresh and "autoencoder" in shared:  # its averages stand for entries: those of this network
        variables.setdefault("codebook", vq.codebook(stored["autoencoder"]["quantize"]["embedding"])._asdict())
    fresh |= {name: jax.tree.map(put, value, fresh[name], placed[name]) for name, value in variables.items()}
    averages = {h: jax.tree.map(lambda x: x.copy(), params) for h in state.ema}
    state = state._replace(params=params, variables=serialization.from_state_dict(state.variables, fresh), ema=averages)
    return state, _inherited(experiment, kind)


# What a checkpoint inherits from the run that it began with, and hands on: the name of latents that it goes on with.
INHERITED = ("latents_of",)


def _inherited(experiment: Experiment, kind: Kind) -> dict[str, Any]:
    """{'latents_of': the sha256 that names the latents} of a decoder that is tuned alone: its encoder stays as it was."""
    block = experiment.init_from
    if not kind.keeps_encoder(**experiment.task.options) or not block.workdir or block.ema:
        return {}
    workdir = pathlib.Path(block.workdir)
    return {"latents_of": open_stage.name_of_latents(workdir, checkpoint.pick(workdir, None))}


def inherited(meta: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint of a run that goes on has inherited, by its meta."""
    return {name: meta[name] for name in INHERITED if meta.get(name) is not None}
