"""Guidance against diffusers' guiders and thresholds: the same branches, and the guided prediction to 1e-5.

The guiders combine whatever the network predicts, ours combine Clean: each is asked in the prediction for which its
paper states it, on branches of a VP process (v, x) and of the flow.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import guidance
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.prediction import target, to_clean
from ldm_jax.diffusion.samplers import SAMPLERS, sample

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
guiders = pytest.importorskip("diffusers.guiders")

pytestmark = pytest.mark.oracle

VP, FLOW, T = P.discrete_vp("scaled_linear"), P.flow(), 0.6
# Three predictions and x_t, [B, C, H, W]; rows of different sizes, so that thresholds bind on some.
C, U, S, X_T = (
    np.random.default_rng(0).standard_normal((4, 4, 2, 3, 3)).astype(np.float32)
    * np.float32([[0.4], [0.8], [1.2], [2.0]])[:, None, None]
)
SETTINGS = [(3.0, 0.0), (7.5, 0.0), (7.5, 0.7)]


def branches(process, kind, *outputs):
    return lambda x_t, t: tuple(to_clean(kind, process, jnp.asarray(output), x_t, t) for output in outputs)


def ours(denoise, process, kind):
    """The guided prediction of a kind."""
    clean = jax.jit(denoise)(jnp.asarray(X_T), jnp.float32(T))
    return np.asarray(target(kind, process, clean.x, clean.eps, T))


def theirs(guider, *outputs, step=5):
    guider.set_state(step=step, num_inference_steps=10, timestep=torch.tensor(500))
    return guider.forward(*(torch.tensor(output) for output in outputs)).pred.numpy()


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale, rescale", SETTINGS)
def test_classifier_free_guidance(scale, rescale):
    guider = guiders.ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale)
    denoise = guidance.cfg(branches(VP, "v", C, U), scale, rescale=rescale)
    close(ours(denoise, VP, "v"), theirs(guider, C, U))


def test_classifier_free_guidance_is_off_outside_its_interval():
    guider = guiders.ClassifierFreeGuidance(guidance_scale=5.0, start=0.0, stop=0.4)
    denoise = guidance.cfg(branches(VP, "v", C, U), 5.0, t_lo=0.61)
    close(ours(denoise, VP, "v"), theirs(guider, C, U))


@pytest.mark.parametrize("scale, rescale", SETTINGS)
def test_autoguidance(scale, rescale):
    guider = guiders.AutoGuidance(guidance_scale=scale, guidance_rescale=rescale, auto_guidance_layers=[0], dropout=0.1)
    strong, weak = (lambda x_t, t, o=o: branches(VP, "v", o)(x_t, t)[0] for o in (C, U))
    close(ours(guidance.autoguidance(strong, weak, scale, rescale=rescale), VP, "v"), theirs(guider, C, U))


@pytest.mark.parametrize("scale", [3.0, 7.5])
def test_cfg_zero_star(scale):
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=scale, zero_init_steps=1)
    denoise = guidance.cfg_zero(branches(FLOW, "flow", C, U), scale, FLOW, t_zero=0.9)
    close(ours(denoise, FLOW, "flow"), theirs(guider, C, U))
    first = guidance.cfg_zero(branches(FLOW, "flow", C, U), scale, FLOW, t_zero=T)
    close(ours(first, FLOW, "flow"), theirs(guider, C, U, step=0))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_adaptive_projected_guidance(eta, threshold):
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=6.5, eta=eta, adaptive_projected_guidance_rescale=threshold, use_original_formulation=True
    )
    denoise = guidance.apg(branches(VP, "x", C, U), 7.5, eta, threshold or np.inf)
    close(ours(denoise, VP, "x"), theirs(guider, C, U))


@pytest.mark.parametrize("scale, rescale", SETTINGS)
@pytest.mark.parametrize("name", ["SkipLayerGuidance", "PerturbedAttentionGuidance"])
def test_third_branch(name, scale, rescale):
    kwargs = (
        dict(skip_layer_guidance_scale=2.8, skip_layer_guidance_layers=[0], skip_layer_guidance_stop=0.8)
        if name == "SkipLayerGuidance"
        else dict(perturbed_guidance_scale=2.8, perturbed_guidance_layers=[0], perturbed_guidance_stop=0.8)
    )
    guider = getattr(guiders, name)(guidance_scale=scale, guidance_rescale=rescale, **kwargs)
    triple = branches(VP, "v", C, U, S)
    close(ours(guidance.third_branch(triple, scale, 2.8, rescale=rescale), VP, "v"), theirs(guider, C, U, S))
    late = guidance.third_branch(triple, scale, guidance.within(2.8, 0.7, 1.0, 0.0), rescale=rescale)
    close(ours(late, VP, "v"), theirs(guider, C, U, S, step=9))


@pytest.mark.parametrize("ratio", [0.9, 0.995])
def test_dynamic_threshold(ratio):
    scheduler = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=1e9)
    denoise = guidance.dynamic_threshold(lambda x_t, t: branches(VP, "x", C)(x_t, t)[0], VP, ratio)
    close(ours(denoise, VP, "x"), scheduler._threshold_sample(torch.tensor(C)).numpy())
    assert np.abs(ours(denoise, VP, "x") - C).max() > 0.1


@pytest.mark.parametrize("threshold", ["static", "dynamic"])
def test_a_ddim_step_with_the_clipped_estimate(threshold):
    """eps follows the clipped x: diffusers' use_clipped_model_output."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=threshold == "static",
        thresholding=threshold == "dynamic",
        dynamic_thresholding_ratio=0.9,
        sample_max_value=1e9,
    )
    scheduler.set_timesteps(10)

    def denoise(x_t, t):
        return to_clean("eps", VP, jnp.asarray(C), x_t, t)

    clipped = (
        guidance.static_threshold(denoise, VP)
        if threshold == "static"
        else guidance.dynamic_threshold(denoise, VP, 0.9)
    )
    x, times = torch.tensor(X_T), np.append((np.asarray(scheduler.timesteps) + 1) / 1000, 0.0)
    for index in scheduler.timesteps:
        x = scheduler.step(torch.tensor(C), index, x, use_clipped_model_output=True).prev_sample
    got = jax.jit(lambda x: sample(SAMPLERS["ddim"](), clipped, VP, x, jnp.asarray(times, jnp.float32)))(X_T)
    np.testing.assert_allclose(got, x.numpy(), atol=1e-4)


def test_instruct_pix2pix_is_the_combination_of_its_pipeline():
    """diffusers.StableDiffusionInstructPix2PixPipeline: uncond + s_T (text - image) + s_I (image - uncond), on eps."""
    eps = ours(guidance.dual(branches(VP, "eps", C, U, S), 7.5, 1.5), VP, "eps")
    close(eps, S + 7.5 * (C - U) + 1.5 * (U - S))
