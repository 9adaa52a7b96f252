"""The types in which a file of this folder describes a family of scheduler classes.

A scheduler class of diffusers is one SchedulerClass: its options with their defaults, and three functions of the options that a file
sets. classes.py lists them by `_class_name`. To add a class, write its SchedulerClass in a file of its family and add its line there.

Time runs from t = 0, data, to t = 1, noise. Where a paper speaks of sigma, a noise level here is sigma / alpha.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.process import Process, per_row
from ldm_jax.diffusion.samplers import Sampler

# The options of a class, each with the file's value or its default.
Config = Mapping[str, Any]
# (H, W) in pixels.
Size = tuple[int, int] | None
# (process, x, x_t, t) -> x: changes a clean estimate x of a state x_t.
Estimate = Callable[[Process, Array, Array, Array], Array]


class Steps(NamedTuple):
    """What a grid depends on besides the options.

    count     number of steps n
    size      (H, W) of the image in pixels, for a flow whose shift depends on it
    sigmas    f[n], the levels that a pipeline prescribes to a flow, before the shift; None: those of the class
    strength  the part of the original steps of a distilled network that may be used (takes_strength)
    """

    count: int
    size: Size = None
    sigmas: tuple[float, ...] | None = None
    strength: float = 1.0


class Grid(NamedTuple):
    """times f64[n + 1], from the first state to the last; inputs f64[n], the number that the network takes at each of the first n."""

    times: np.ndarray
    inputs: np.ndarray


class Clip(NamedTuple):
    """Clips a clean estimate x to [-bound, bound].

    With a percentile, s is that percentile of |x| over a row, limited to 1 <= s <= bound; x is clipped to [-s, s] and divided by s
    (dynamic thresholding: Saharia et al. 2022, Imagen, arXiv:2205.11487, section 2.3).
    keep_eps: eps remains what the network says, as in diffusers' DDIM. Otherwise eps is computed anew from x_t and the clipped x.
    """

    bound: float = 1.0
    percentile: float | None = None
    keep_eps: bool = False

    def __call__(self, x: Array) -> Array:
        if self.percentile is None:
            return jnp.clip(x, -self.bound, self.bound)
        size = jnp.quantile(jnp.abs(x).reshape(x.shape[0], -1), self.percentile, axis=1)
        s = per_row(jnp.minimum(jnp.maximum(size, 1), self.bound), x)
        return jnp.clip(x, -s, s) / s


class Facts(NamedTuple):
    """What the options of a file say about its network, whatever it is sampled with. These are fields of Schedule.

    process           with the time input that the network takes
    prediction        what the network predicts, a name in diffusion.prediction.PREDICTIONS
    prior             x_T is `prior` times unit noise, in the scaling x_t = alpha x + sigma eps; None: sigma(times[0]) times
    clip              how the clean estimate is clipped, None: not at all
    parametrization   an Estimate that is part of what the network's output means; it comes before the clipping
    boundary          an Estimate that makes a consistency function; it comes after the clipping, under the rule of the class alone
    learned_variance  whether the update rule takes an output of twice the channels
    """

    process: Process
    prediction: str
    prior: float | None = 1.0
    clip: Clip | None = None
    parametrization: Estimate | None = None
    boundary: Estimate | None = None
    learned_variance: bool = False


# A name in diffusion.samplers.SAMPLERS, and options of it.
Rule = tuple[str, dict[str, Any]]
# Changes how a sampler steps. It is hashable: compiled programs are cached by it.
Loop = Callable[[Sampler], Sampler]


class SchedulerClass(NamedTuple):
    """One scheduler class of diffusers.

    options          option -> its default in diffusers. A file of this class may set these
    facts            (name of the class, options) -> Facts; ValueError for a value that is not supported
    grid             (options, Steps) -> Grid
    rule             (options, number of steps) -> Rule, the update rule of the class
    fixed            option -> the values that are supported, for options that nothing here depends on
    loop             (options, Grid, index of the first step) -> (Grid, Loop or None), where no sampler steps as the class
    takes_strength   whether `grid` reads Steps.strength: image to image then begins at another set of steps
    respaceable      whether the steps may be spaced in another way (respacing.py); not so for a network distilled on its steps
    samplers         name in SAMPLERS -> the options with which this class steps so; respacing.py reads grids of that sampler here
    private          options that another class gives another meaning: they do not go over to it with a file
    """

    options: dict[str, Any]
    facts: Callable[[str, Config], Facts]
    grid: Callable[[Config, Steps], Grid]
    rule: Callable[[Config, int], Rule]
    fixed: Mapping[str, tuple] = {}
    loop: Callable[[Config, Grid, int], tuple[Grid, Loop | None]] | None = None
    takes_strength: bool = False
    respaceable: bool = True
    samplers: Mapping[str, dict[str, Any]] = {}
    private: tuple[str, ...] = ()


def always(sampler: str, **options: Any) -> Callable[[Config, int], Rule]:
    """The rule of a class that has one sampler, whatever its options are."""
    return lambda config, steps: (sampler, options)
