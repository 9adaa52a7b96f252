"""Grids and trajectories against diffusers' schedulers: the same times, the same start, the exact eps of a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import grids
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from tests.helpers import GAUSSIAN

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

TABLE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VP, FLOW = P.discrete_vp("scaled_linear"), P.flow()
NOISE = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)


def compare(name, process, times, theirs, atol=1e-4):
    """Our whole trajectory against a list of theirs, in the process's own scaling."""
    run = jax.jit(
        lambda x, times: sample(SAMPLERS[name](), GAUSSIAN.denoiser(process), process, x, times, trajectory=True)
    )
    ours = np.asarray(run(jnp.asarray(NOISE), jnp.asarray(times, jnp.float32)))
    assert len(theirs) == len(ours) - 1
    np.testing.assert_allclose(ours[1:], theirs, atol=atol, rtol=0)


def follow(scheduler, process, kind, per_step=1, times=None, in_ve=False):
    """States of diffusers' loop, in the scaling x_t = alpha x + sigma eps; the exact model predicts `kind`.

    in_ve: the scheduler's state is x_t / alpha. times: where the model is asked, when the scheduler rounds its timesteps.
    """

    @jax.jit
    def model(x, t):
        clean = GAUSSIAN.denoiser(process)(x, t)
        return target(kind, process, clean.x, clean.eps, t)

    shrink = lambda i: 1 / np.sqrt(1 + float(scheduler.sigmas[i]) ** 2) if in_ve else 1.0  # noqa: E731
    x = torch.tensor(NOISE) / shrink(0)
    states = []
    for i, index in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, index) if in_ve else x
        t = times[i] if times is not None else (float(index) + (process is VP)) / 1000
        x = scheduler.step(torch.tensor(np.array(model(scaled.numpy(), t))), index, x).prev_sample
        states.append(x.numpy() * shrink(i + 1))
    # A scheduler of two evaluations hands back its predictor first; its last step, into sigma = 0, has none.
    return states if per_step == 1 else [*states[1:-1:2], states[-1]]


def times_of(scheduler, process, per_step=1):
    """Our times of the scheduler's timesteps, ending in clean data; Heun's stand twice but for the first."""
    index = np.asarray(scheduler.timesteps, np.float64)
    index = index if per_step == 1 else index[[0, *range(1, len(index), 2)]]
    return np.append((index + (process is VP)) / 1000, 0.0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_table_grids_are_those_of_ddim(spacing, steps):
    scheduler = diffusers.DDIMScheduler(
        **TABLE, timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0
    )
    scheduler.set_timesteps(steps)
    times = grids.leading(VP, steps, offset=1) if spacing == "leading" else grids.GRIDS[spacing](VP, steps)
    np.testing.assert_array_equal(VP.time_input(times[:-1]), scheduler.timesteps.numpy())


@pytest.mark.parametrize("steps", [5, 20])
def test_karras_grid_is_that_of_euler_discrete(steps):
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    times = grids.karras(VP, steps - 1)
    np.testing.assert_allclose(np.exp(-0.5 * P.log_snr(VP, times)), scheduler.sigmas[:-1], rtol=1e-4)
    np.testing.assert_allclose(VP.time_input(times), scheduler.timesteps, atol=0.05)


@pytest.mark.parametrize("kind, name", [("eps", "epsilon"), ("v", "v_prediction"), ("x", "sample")])
def test_ddim(kind, name):
    scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing", prediction_type=name)
    scheduler.set_timesteps(20)
    compare("ddim", VP, times_of(scheduler, VP), follow(scheduler, VP, kind))


@pytest.mark.parametrize("karras", [False, True])
def test_euler_discrete(karras):
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, use_karras_sigmas=karras)
    scheduler.set_timesteps(20)
    compare("euler", VP, times_of(scheduler, VP), follow(scheduler, VP, "eps", in_ve=True))


@pytest.mark.parametrize("karras", [False, True])
def test_heun_discrete(karras):
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE, use_karras_sigmas=karras)
    scheduler.set_timesteps(20)
    compare("heun", VP, times_of(scheduler, VP, 2), follow(scheduler, VP, "eps", 2, in_ve=True))


@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m(karras):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=karras
    )
    scheduler.set_timesteps(20)
    # Its noise levels are Karras's but its timesteps are rounded: the model is asked at the levels' own times.
    times = np.append(P.inverse_log_snr(VP, -2 * np.log(scheduler.sigmas[:-1].numpy())), 0.0)
    compare("dpmpp_2m", VP, times, follow(scheduler, VP, "eps", times=times))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "heun", "ddim"])
def test_flow_match(name, shift):
    kind = "FlowMatchHeunDiscreteScheduler" if name == "heun" else "FlowMatchEulerDiscreteScheduler"
    scheduler, per_step = getattr(diffusers, kind)(shift=shift), 2 if name == "heun" else 1
    scheduler.set_timesteps(20)
    compare(name, FLOW, times_of(scheduler, FLOW, per_step), follow(scheduler, FLOW, "flow", per_step))
