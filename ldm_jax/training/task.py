"""What a task is, and what a run gives to it.

A task is plain functions over a TrainState. `make(context, **block)` builds it: `context` is what the run gives to every task,
`block` the keys of config.task besides the name. training/tasks lists them by name.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ldm_jax.diffusion.process import Process
from ldm_jax.training import sampling
from ldm_jax.training.first_stage import FirstStage
from ldm_jax.training.state import Averages, Batch, Metrics, TrainState


class Context(NamedTuple):
    """What a run gives to its task. A task reads the fields that it needs; the others may be None.

    network      linen module of config.model
    optimizer    optimizer(start_images=0, **overrides) -> GradientTransformation: that of config.optimizer with the overrides, whose
                 schedule begins after `start_images` images and ends with the run
    schedule     step -> learning rate of config.optimizer, for the log
    averages     the EMAs that the state keeps
    resolution   pixels a side of the images
    process      diffusion process of config.process
    model        what diffuses: network, conditioning, first stage, process, prediction
    settings     how pictures are drawn while training: config.sampler
    stage        first stage of config.first_stage; None in pixels
    preview      small autoencoder that decodes these pictures in the place of the first stage; None for none
    load         load('KIND:WHERE') -> (module, parameters) of a frozen network: 'classifier:DIR', a finished run; 'lpips:FILE,FILE' and
                 'dinov2:DIR', published files. None where no parameters are read: when a config is only checked
    """

    network: Any = None
    batch_size: int = 1
    accumulate: int = 1
    resolution: int = 0
    optimizer: Callable[..., optax.GradientTransformation] | None = None
    schedule: optax.Schedule | None = None
    averages: Averages = Averages()
    process: Process | None = None
    model: sampling.Model | None = None
    settings: sampling.Settings | None = None
    stage: FirstStage | None = None
    preview: FirstStage | None = None
    load: Callable[[str], tuple[Any, Any]] | None = None


class Task(NamedTuple):
    """What the loop trains.

    init(key) -> TrainState
    step(state, frozen, batch) -> (state, metrics), pure and jittable; training/step.make_step makes it
    validate(params, frozen, batch, key) -> {metric: f32[B]}, a value for each example; an empty dict: nothing to validate
    pictures(params, frozen, batch, key) -> {name: f32[N, H, W, 3] in [-1, 1]}; None: no pictures
    frozen: parameters that are used and not trained (a first stage, a teacher). They are not part of the checkpoint
    facts: {name: sha256} of what the loss depends on and no checkpoint holds. A run goes on only where they are the same;
        a name is that of the key of config.task
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
    validate: Callable[[Any, Any, Batch, jax.Array], Metrics]
    pictures: Callable[[Any, Any, Batch, jax.Array], dict[str, jax.Array]] | None = None
    frozen: Any = {}  # noqa: RUF012 (never written to)
    facts: dict[str, str] = {}  # noqa: RUF012


def digest(tree: Any) -> str:
    """sha256 of a tree of arrays: of each array's path and bytes."""
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sha256.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return sha256.hexdigest()
