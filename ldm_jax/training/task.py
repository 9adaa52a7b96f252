"""What a task is, and what a run gives to it.

A task is plain functions over a TrainState. `make(context, **block)` builds it: `context` is what the run gives to every task,
`block` the keys of config.task besides the name. training/tasks lists them by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from ldm_jax.data import Tokenizer
from ldm_jax.diffusion.process import Process
from ldm_jax.sampling.model import Space
from ldm_jax.training import sampling
from ldm_jax.training.conditioning import Conditioning
from ldm_jax.training.first_stage import FirstStage
from ldm_jax.training.state import Averages, Batch, Metrics, TrainState


class Context(NamedTuple):
    """What a run gives to its task. A task reads the fields that it needs; the others may be None.

    network      linen module of config.model
    optimizer    optimizer(start_images=0, **overrides) -> GradientTransformation: that of config.optimizer with the overrides, whose
                 schedule begins after `start_images` images and ends with the run
    schedule     step -> learning rate of config.optimizer, for the log
    averages     the EMAs that the state keeps
    space        of the data, before any first stage: its shape of any rank, and the entry of a batch that holds it
    process      diffusion process of config.process
    tokenizer    of captions, and `text`, the encoder of config.text, which is trained on them
    num_classes  classes of the data
    conditioning what a denoiser is conditioned on: config.condition. The conditions themselves are made from the fields above
    settings     how pictures are drawn while training: config.sampler
    stage        first stage of config.first_stage; None in pixels
    preview      small autoencoder that decodes these pictures in the place of the first stage; None for none
    load         load('KIND:WHERE') -> (module, parameters) of a frozen network: 'classifier:DIR', a finished run; 'lpips:FILE,FILE' and
                 'dinov2:DIR', published files. None where no parameters are read: when a config is only checked
    """

    network: Any = None
    batch_size: int = 1
    accumulate: int = 1
    space: Space = Space(())
    optimizer: Callable[..., optax.GradientTransformation] | None = None
    schedule: optax.Schedule | None = None
    averages: Averages = Averages()
    process: Process | None = None
    tokenizer: Tokenizer | None = None
    text: Any = None
    num_classes: int = 0
    conditioning: Conditioning = Conditioning()
    settings: sampling.Settings | None = None
    stage: FirstStage | None = None
    preview: FirstStage | None = None
    load: Callable[[str], tuple[Any, Any]] | None = None


class Task(NamedTuple):
    """What the loop trains.

    init(key) -> TrainState
    step(state, frozen, batch) -> (state, metrics), pure and jittable; training/step.make_step makes it
    validate(params, frozen, batch, key) -> {metric: f32[B]}, a value for each example; an empty dict: nothing to validate
    pictures(params, frozen, batch, key) -> {name: f32[N, H, W, 3] in [-1, 1]}; None: no pictures, or the data is none
    frozen: parameters that are used and not trained (a first stage, a teacher). They are not part of the checkpoint
    facts: {name: sha256} of what the loss depends on and no checkpoint holds. A run goes on only where they are the same;
        a name is that of the key of config.task, or of another block with that block before it, 'condition.NAME.KEY'
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
    validate: Callable[[Any, Any, Batch, jax.Array], Metrics]
    pictures: Callable[[Any, Any, Batch, jax.Array], dict[str, jax.Array]] | None = None
    frozen: Any = {}  # noqa: RUF012 (never written to)
    facts: dict[str, str] = {}  # noqa: RUF012


class Figures(NamedTuple):
    """What the runs of a task offer to `ldm evaluate`.

    way        a name in evaluation.ways.WAYS: how the images are made that are measured
    num        how many images where --num is not given; None: all
    features   --features where that is not given; {workdir} stands for the run
    """

    way: str = "real"
    num: int | None = 1000
    features: str = ""


class Kind(NamedTuple):
    """A line of TASKS: how a task is built, and what has to be said of it before it is.

    make           make(context, **block) -> Task; `block` are the keys of config.task
    network        the name in TrainState.params of the network that config.model describes
    stage          'no': works on images; 'may': in the latents of config.first_stage where it names one; 'must': needs a first stage
    latents        whether it trains on latents alone, so that a data set is encoded once; else it needs images
    conditioned    whether config.condition says anything to it
    blocks         keys of config.task that are blocks: {key: the function that takes the block}
    model          model(context, **block) -> sampling.Model, for a task whose runs draw; None for any other
    figures        what `ldm evaluate` measures of its runs
    classes        classes(network, label) -> the number of classes that a network was made for; raises ValueError where `label`, of
                   config.condition, says otherwise
    check_classes  check_classes(network, label, num_classes) raises ValueError unless the network has the data's classes
    keeps_encoder  keeps_encoder(**block): whether the latents stay those of the run that config.init_from names
    """

    make: Callable[..., Task]
    network: str
    stage: str = "no"
    latents: bool = False
    conditioned: bool = False
    blocks: Mapping[str, Callable[..., Any]] = {}
    model: Callable[..., sampling.Model] | None = None
    figures: Figures = Figures()
    classes: Callable[[Any, bool], int] | None = None
    check_classes: Callable[[Any, bool, int], None] | None = None
    keeps_encoder: Callable[..., bool] = lambda **block: False
