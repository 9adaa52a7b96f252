"""Grids of noise levels against diffusers' schedulers and pipelines."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import grids
from ldm_jax.diffusion import process as P

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

TABLE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VP, FLOW = P.discrete_vp("scaled_linear"), P.flow()


def level(process, times):
    """sigma / alpha."""
    return np.exp(-0.5 * np.asarray(P.log_snr(process, times), np.float64))


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    "flag, name, options",
    [
        ("use_karras_sigmas", "karras", {}),
        ("use_exponential_sigmas", "log_snr", {}),
        ("use_lu_lambdas", "log_snr", {}),
        ("use_beta_sigmas", "beta", {"by_level": True}),
    ],
)
def test_levels_of_dpm_solver(flag, name, options, steps):
    """Its n levels run from the noisiest entry to the first; the last of its sigmas, 0, is a step of its own."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, **{flag: True})
    scheduler.set_timesteps(steps)
    times = grids.GRIDS[name](VP, steps - 1, **options)
    np.testing.assert_allclose(level(VP, times), scheduler.sigmas[:-1], rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_of_dpm_solver(shift):
    """Its uniform grid begins at 0.999 and is shifted after."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(20)
    process = P.flow(shift)
    times = grids.uniform(process, 20, start=0.999)
    np.testing.assert_allclose(process.sigma(times), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 5000])
def test_dynamic_shift_of_flux(tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=calculate_shift(tokens))
    np.testing.assert_allclose(grids.dynamic_shifted(FLOW, 20, tokens=tokens), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize("stochastic", [False, True])
def test_beta_sigmas_on_the_flow(stochastic):
    """There diffusers spaces sigma = t, from 1 to 1 / 1000."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True, stochastic_sampling=stochastic)
    scheduler.set_timesteps(20)
    np.testing.assert_allclose(grids.beta(FLOW, 19, end=1e-3), scheduler.sigmas[:-1], atol=2e-6)


def test_tables_of_align_your_steps():
    from diffusers.schedulers import AysSchedules

    for model, name in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("svd", "StableDiffusionVideo")):
        assert list(grids.ALIGNED[model][:-1]) == AysSchedules[f"{name}Sigmas"][:-1]
    for model, name in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")):
        # Entries of the table that Stable Diffusion was trained on, published rounded.
        times = grids.align_your_steps(VP, 10, model=model)
        np.testing.assert_allclose(VP.time_input(times[:-1]), AysSchedules[f"{name}Timesteps"], atol=3.5)


@pytest.mark.parametrize("steps", [2, 9, 50])
def test_linear_quadratic_of_mochi_and_ltx(steps):
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule as ltx
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule as mochi

    times = np.asarray(grids.linear_quadratic(FLOW, steps))
    np.testing.assert_allclose(times[:-1], mochi(steps, 0.025), atol=1e-6)
    np.testing.assert_allclose(times[:-1], ltx(steps), atol=1e-6)
    np.testing.assert_allclose(
        grids.linear_quadratic(FLOW, steps, threshold=0.03, linear_steps=1)[:-1], mochi(steps, 0.03, 1), atol=1e-6
    )


def test_times_of_levels_are_the_interpolated_timesteps():
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, use_exponential_sigmas=True)
    scheduler.set_timesteps(12)
    np.testing.assert_allclose(VP.time_input(grids.by_log_snr(VP, 11)), scheduler.timesteps, atol=0.05)
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, use_beta_sigmas=True)
    scheduler.set_timesteps(12)
    times = grids.beta(VP, 11, by_level=True)
    np.testing.assert_allclose(VP.time_input(jnp.asarray(times)), scheduler.timesteps, atol=0.05)
