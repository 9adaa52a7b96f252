"""RePaint and image-to-image against diffusers: the same times, the exact eps of a Gaussian, the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import editing
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.exact import GAUSSIAN
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.samplers import sample
from ldm_jax.diffusion.samplers.ode import ddim, euler

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

STEPS = 12
BETAS = np.linspace(1e-3, 0.4, STEPS)
VP = P.discrete_vp(BETAS)
RNG = np.random.default_rng(0)
X, NOISE, Z = (RNG.standard_normal((5, 2)).astype(np.float32) for _ in range(3))
KEEP = np.array([1.0, 0.0], np.float32)


@pytest.mark.parametrize(
    "jump_length, resample, size", [(1, 3, 1.0), (1, 1, 1.0), (3, 4, 0.0), (5, 2, 0.0), (10, 10, 0.0)]
)
def test_repaint(monkeypatch, jump_length, resample, size):
    """Every draw of noise is the same array. Jumps over several levels agree for none alone: diffusers climbs them one by one."""
    noise = size * Z
    scheduler = diffusers.RePaintScheduler(num_train_timesteps=STEPS, trained_betas=BETAS, clip_sample=False)
    scheduler.set_timesteps(STEPS, jump_length, resample)
    module = diffusers.schedulers.scheduling_repaint
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(noise))
    monkeypatch.setattr(editing, "noise", lambda keys, like: jnp.asarray(noise))

    @jax.jit
    def model(x, t):
        clean = GAUSSIAN.denoiser(VP)(x, t)
        return target("eps", VP, clean.x, clean.eps, t)

    theirs, last = torch.tensor(NOISE), int(scheduler.timesteps[0]) + 1
    for t in scheduler.timesteps.tolist():
        if t < last:
            eps = torch.tensor(np.array(model(theirs.numpy(), (t + 1) / STEPS)))
            theirs = scheduler.step(eps, t, theirs, torch.tensor(X), torch.tensor(KEEP)).prev_sample
        else:
            theirs = scheduler.undo_step(theirs, last)
        last = t
    sampler = editing.repaint(euler(), X, KEEP, jump_length=jump_length, resample=resample)
    times = jnp.arange(STEPS, -1, -1) / STEPS
    key = jax.random.key(0)
    ours = jax.jit(lambda x: sample(sampler, GAUSSIAN.denoiser(VP), VP, x, times, key))(jnp.asarray(NOISE))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("steps", [20, 50])
def test_image_to_image_and_inpainting_by_replacement(steps):
    """StableDiffusionImg2Img's get_timesteps; StableDiffusionInpaint's replacement for a network that takes no mask."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline

    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    process = P.discrete_vp("linear")
    scheduler.set_timesteps(steps)
    times = np.append((scheduler.timesteps.numpy() + 1) / 1000, 0.0)

    @jax.jit
    def model(x, t):
        clean = GAUSSIAN.denoiser(process)(x, t)
        return target("eps", process, clean.x, clean.eps, t)

    class Pipeline:
        pass

    pipeline = Pipeline()
    pipeline.scheduler = scheduler
    sampler = editing.preserve(ddim(), jnp.asarray(X), jnp.asarray(KEEP), jnp.asarray(Z))
    ours = jax.jit(lambda x, times: sample(sampler, GAUSSIAN.denoiser(process), process, x, times))
    for strength in (0.33, 0.58, 0.8, 1.0):
        wanted, count = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
        x_t, rest = editing.noised_start(process, jnp.asarray(X), jnp.asarray(Z), jnp.asarray(times), strength)
        np.testing.assert_allclose(process.time_input(rest[:count]), wanted.numpy())
        x, z = torch.tensor(X), torch.tensor(Z)
        theirs = scheduler.add_noise(x, z, wanted[:1])
        np.testing.assert_allclose(x_t, theirs, atol=1e-5)
        for i, t in enumerate(wanted):
            eps = torch.tensor(np.array(model(theirs.numpy(), (float(t) + 1) / 1000)))
            theirs = scheduler.step(eps, t, theirs).prev_sample
            known = scheduler.add_noise(x, z, wanted[i + 1 : i + 2]) if i + 1 < len(wanted) else x
            theirs = torch.tensor(KEEP) * known + (1 - torch.tensor(KEEP)) * theirs
        np.testing.assert_allclose(ours(x_t, rest), theirs, atol=1e-4)
