"""PNDMScheduler (Liu et al. 2022, PNDM, arXiv:2202.09778).

With skip_prk_steps (PLMS, equation 12 with Heun's step at the start) a step extrapolates the network's last four outputs e:

    e' = (55 e_i - 59 e_{i-1} + 37 e_{i-2} - 9 e_{i-3}) / 24

and the second evaluation repeats the first step with the mean of both outputs. diffusers has that repetition in its list of times,
so its grid has n + 1 steps. Without skip_prk_steps the first steps are Runge-Kutta steps (equation 13).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers import Sampler
from ldm_jax.schedules.ddim import Strided, strides, table_facts, table_grid
from ldm_jax.schedules.family import Config, Facts, Grid, Loop, SchedulerClass, Steps
from ldm_jax.schedules.options import BETAS, LEADING, PREDICTIONS

# Weights of the last four outputs, the latest first, at the 1st, 2nd, ... evaluation. The second is Heun's.
WEIGHTS = (
    (1.0, 0.0, 0.0, 0.0),
    (1 / 2, 1 / 2, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class History(NamedTuple):
    """x [B, ...] now; the state `origin` and the time `t` before the first step; the last three outputs; evaluations so far."""

    x: Array
    origin: Array
    t: Array
    outputs: Array
    count: Array


class RepeatedFirstStep(NamedTuple):
    """The sampler plms with one evaluation a step, on a grid t_0, t_1, t_1, t_2, ...: its second step repeats the first one.

    Other code that changes the state between evaluations (editing.preserve) thereby sees every state of diffusers, and a grid can be
    cut anywhere, as diffusers does in image to image. Extrapolated is the network's output itself, of the kind `prediction`.
    """

    prediction: str
    strided: Strided | None

    def __call__(self, sampler: Sampler) -> Sampler:
        def init(process: Process, x_T: Array, times: Array, keys: Array | None) -> History:
            return History(x_T, x_T, times[0], jnp.zeros((3, *x_T.shape), x_T.dtype), jnp.zeros((), jnp.int32))

        def step(
            denoise: Denoiser, process: Process, carry: History, t: Array, s: Array, keys: Array | None
        ) -> History:
            again = carry.count == 1
            clean = denoise(carry.x, t)
            outputs = jnp.concatenate([target(self.prediction, process, clean.x, clean.eps, t)[None], carry.outputs])
            weights = jnp.asarray(WEIGHTS, carry.x.dtype)[jnp.minimum(carry.count, len(WEIGHTS) - 1)]
            eps = jnp.tensordot(weights, outputs, 1)
            x = jnp.where(again, carry.origin, carry.x)
            start = jnp.where(again, carry.t if self.strided is None else t + self.strided.stride, t)
            end = jnp.where(again, t, s if self.strided is None else self.strided.next_time(t, s))
            if self.prediction == "v":
                eps = process.alpha(start) * eps + process.sigma(start) * x
            x_0 = (x - process.sigma(start) * eps) / process.alpha(start)
            return History(
                process.alpha(end) * x_0 + process.sigma(end) * eps,
                jnp.where(carry.count == 0, carry.x, carry.origin),
                carry.t,
                jnp.where(again, carry.outputs, outputs[:3]),
                carry.count + 1,
            )

        return Sampler(init, step, order=2, evaluations=1)


def facts(name: str, config: Config) -> Facts:
    return table_facts(name, config, "epsilon", "v_prediction")


def grid(config: Config, steps: Steps) -> Grid:
    return table_grid(config, steps.count, config["set_alpha_to_one"])


def rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return ("plms" if config["skip_prk_steps"] else "pndm"), {}


def loop(config: Config, grid: Grid, first: int) -> tuple[Grid, Loop | None]:
    """PLMS: the second time twice, a float apart. Runge-Kutta steps are those of the sampler pndm, on a grid of equal steps only."""
    (times, inputs), strided, equal = strides(config, grid)
    n, steps = config["num_train_timesteps"], len(inputs)
    if config["skip_prk_steps"]:
        # A run that begins with the repeated time goes back by a stride at its second evaluation, not to where it began.
        equal = equal and first != 1
        if steps > 1:
            times = np.insert(times, 2, np.nextafter(np.float32(times[1]), np.float32(0)))
            inputs = np.insert(inputs, 2, inputs[1])
        kind = PREDICTIONS[config["prediction_type"]]
        return Grid(times, inputs), RepeatedFirstStep(kind, None if equal else strided)
    if not equal or n // steps % 2 or steps < 4 or first or config["prediction_type"] != "epsilon":
        raise ValueError(
            "PNDMScheduler: skip_prk_steps is False, expected True but for at least 4 whole runs of equal, even steps of an "
            f"epsilon network; steps is {steps} of {n}, timestep_spacing {config['timestep_spacing']!r}"
        )
    return Grid(times, inputs), None


PNDM = SchedulerClass(
    options=BETAS | LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
    facts=facts,
    grid=grid,
    rule=rule,
    loop=loop,
    samplers={"plms": {"skip_prk_steps": True}},
)
