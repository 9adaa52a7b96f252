"""Schedules read from a scheduler's config against diffusers' own loop of that scheduler: the same noise, and an exact Gaussian model
that both evaluate at the number which the scheduler feeds it, as a network would be."""

import importlib
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.denoiser import make_denoiser
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.samplers import sample
from ldm_jax.diffusion.samplers.brownian import draws, fold
from ldm_jax.diffusion.samplers.sampler import noise, row_keys
from ldm_jax.pipelines import schedule as S
from tests.helpers import GAUSSIAN

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
NOISE = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
KEY = jax.random.key(5)
EPS = {"leading": dict(timestep_spacing="leading", steps_offset=1), "trailing": dict(timestep_spacing="trailing")}
V = dict(prediction_type="v_prediction")


def make(name, **options):
    """diffusers' scheduler and our schedule of the config that it would write."""
    theirs = getattr(diffusers, name)(**options)
    config = {"_class_name": name, **{k: v for k, v in theirs.config.items() if not k.startswith("_")}}
    return theirs, S.load(config)


def told(process, kind):
    """model(x_t, input) -> output of a kind: exact for a Gaussian at the time that the input stands for.

    process is one whose time input can be inverted: a table's is N t - 1, a flow's N t, of the rest sigma or its logarithm.
    """

    @jax.jit
    def model(x, u):
        if process.levels is not None:
            t = jnp.minimum((u + 1) / process.levels, 1)  # a compiled quotient may exceed 1
        elif process.affine == 1:
            t = u / 1000
        else:
            t = P.inverse_log_snr(process, -2 * u)
        clean = GAUSSIAN.denoiser(process)(x, t)
        return target(kind, process, clean.x, clean.eps, t)

    return model


# Classes whose state is x_t / alpha.
BY_LEVEL = (
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
)


def follow(scheduler, model, steps, extra=None, **options):
    """The last state of diffusers' generic loop, whose arrays have an axis of length 1 more."""
    scheduler.set_timesteps(steps)
    x = torch.tensor(NOISE)[..., None] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t).float().numpy()[..., 0]
        output = np.asarray(model(jnp.asarray(scaled), jnp.float32(float(t))))
        output = output if extra is None else np.concatenate([output, extra(scaled)], 1)
        x = scheduler.step(torch.tensor(output)[..., None], t, x, **options).prev_sample
    x = x.numpy()[..., 0]
    if type(scheduler).__name__.removesuffix("Scheduler") not in BY_LEVEL:
        return x
    # Classes of two evaluations hold each level twice.
    last = scheduler.sigmas[len(scheduler.timesteps)]
    return x / np.sqrt(1 + float(last) ** 2)


def ours(schedule, model, steps, sampler=None, key=None, **options):
    times, run = schedule.at(steps, sampler=sampler)
    apply = lambda params, x, t, cond: model(x, t)  # noqa: E731
    denoise = run.clipped(make_denoiser(apply, None, run.process, run.prediction))
    x_T = jnp.asarray(run.noise_scale(times[0]) * NOISE)
    go = jax.jit(lambda x: sample(run.method(**options), denoise, run.process, x, jnp.asarray(times), key))
    return np.asarray(go(x_T))


def same(x, y, tolerance=1e-4):
    assert np.isfinite(y).all()
    np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max(), rtol=0)
