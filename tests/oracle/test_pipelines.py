"""Whole pipelines against their diffusers twins: one folder on disk, the same initial noise, latents and pictures compared."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from ldm_jax import pipelines  # noqa: E402
from ldm_jax.diffusion.samplers.brownian import draws, fold  # noqa: E402
from ldm_jax.pipelines import latents as L  # noqa: E402
from ldm_jax.sampling import keys as keys_of  # noqa: E402
from tests.pipelines import published as tiny  # noqa: E402

pytestmark = pytest.mark.oracle

PROMPTS, NEGATIVE = ["a red cat", "two big dogs under a tree"], "blue"
STEPS, GUIDANCE, TOLERANCE = 5, 4.0, 2e-3


def torched(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def ours(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def hand(monkeypatch, pipeline, start=None, steps=None, shape=None, seed=0):
    """Give diffusers our noise: `start` to the pipeline's own draw, that of our sampler's steps to the scheduler's."""
    if start is not None:
        module = sys.modules[type(pipeline).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torched(start))
    if steps is not None:
        keys, like = keys_of.step_keys(keys_of.numbered(seed, shape[0])), jnp.zeros(shape)
        given = iter([torched(draws(fold(keys, i), like, 1)[0]) for i in range(steps)])
        module = sys.modules[type(pipeline.scheduler).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(given))


def both(theirs, mine, decode=True):
    """Latents or pictures of the two sides, which must not be flat."""
    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE, rtol=0)
    assert np.std(theirs) > 0.05 * (1 if not decode else 0.1)


def compare(pipeline, folder, call, **theirs):
    """call(our pipeline, decode) against the twin called with `theirs`: latents, then pictures."""
    pipeline.set_progress_bar_config(disable=True)
    mine = pipelines.load(folder)
    z = pipeline(**theirs, output_type="latent").images
    both(ours(z), call(mine, False), False)
    x = pipeline(**theirs, output_type="np").images
    both(x, call(mine, True))


SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, tiny.DDIM),
    "pndm": (diffusers.PNDMScheduler, tiny.PNDM),
    "euler": (diffusers.EulerDiscreteScheduler, tiny.EULER),
    "v": (diffusers.DDIMScheduler, tiny.DDIM | {"prediction_type": "v_prediction"}),
    "dpm": (diffusers.DPMSolverMultistepScheduler, tiny.TABLE | {"steps_offset": 1}),
    "unipc": (diffusers.UniPCMultistepScheduler, tiny.TABLE),
}


def stable_diffusion(folder, scheduler, kind=diffusers.StableDiffusionPipeline, **unet):
    cls, options = SCHEDULERS[scheduler]
    pipeline = kind(unet=tiny.unet(**unet), scheduler=cls(**options), **tiny.sd_parts())
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text_to_image(tmp_path, scheduler):
    eps = tiny.noise(2)
    compare(
        stable_diffusion(tmp_path, scheduler),
        tmp_path,
        lambda mine, decode: mine.text_to_image(
            PROMPTS, NEGATIVE, steps=STEPS, guidance=GUIDANCE, latents=eps, decode=decode
        ),
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torched(eps),
    )


def test_an_outdated_scheduler_file_is_put_right(tmp_path):
    """As diffusers does on loading: steps_offset 1 and no clipping, whatever the file says."""
    stable_diffusion(tmp_path, "ddim")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps_offset": 0, "clip_sample": True}))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    eps = tiny.noise(1)
    with pytest.warns(UserWarning, match="steps_offset is 0; 1 is taken"):
        compare(
            pipeline,
            tmp_path,
            lambda mine, decode: mine.text_to_image("a", steps=3, guidance=1.0, latents=eps, decode=decode),
            prompt="a",
            num_inference_steps=3,
            guidance_scale=1.0,
            latents=torched(eps),
        )


def test_a_tiny_autoencoder_and_tiles(tmp_path):
    """AutoencoderTiny in the autoencoder's place; an AutoencoderKL decoded in tiles as diffusers does it."""
    eps, told = tiny.noise(1, 12), {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    pipeline = stable_diffusion(tmp_path / "kl", "ddim")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    theirs = pipeline("a", latents=torched(eps), height=24, width=24, **told).images
    mine = pipelines.load(tmp_path / "kl", tile=16)
    z = mine.text_to_image("a", steps=2, guidance=1.0, latents=eps, size=(24, 24), decode=False)
    both(theirs, pipelines.pictures(mine, z))
    assert np.abs(pipelines.pictures(pipelines.load(tmp_path / "kl"), z) - theirs).max() > TOLERANCE
    torch.manual_seed(0)
    options = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    options |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pipeline.vae = tiny.stir(diffusers.AutoencoderTiny(**options))
    pipeline = diffusers.StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "tiny")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline("a", latents=torched(eps[:, :8, :8]), height=16, width=16, **told).images
    mine = pipelines.load(tmp_path / "tiny")
    both(theirs, mine.text_to_image("a", steps=2, guidance=1.0, latents=eps[:, :8, :8], size=(16, 16)))
    with pytest.raises(ValueError, match="tile is 7, expected a multiple of 2 pixels"):
        pipelines.load(tmp_path / "tiny", tile=7)


def test_rescaled_unguided_and_other_samplers(tmp_path):
    """guidance_rescale; guidance 1 and less; sampler='ddim' on a PNDM file is diffusers' DDIMScheduler.from_config of that file."""
    pipeline, eps = stable_diffusion(tmp_path, "pndm"), tiny.noise(2)
    mine = pipelines.load(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    for guidance, rescale in ((4.0, 0.7), (1.0, 0.0), (0.0, 0.0), (-1.0, 0.0)):
        z = pipeline(
            prompt=PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            guidance_rescale=rescale,
            latents=torched(eps),
            output_type="latent",
        ).images
        got = mine.text_to_image(
            PROMPTS, steps=STEPS, guidance=guidance, rescale=rescale, sampler="ddim", latents=eps, decode=False
        )
        both(ours(z), got, False)


@pytest.mark.parametrize("scheduler, strength", [("ddim", 0.5), ("ddim", 1.0), ("euler", 0.5), ("pndm", 0.7)])
def test_image_to_image(monkeypatch, tmp_path, scheduler, strength):
    pipeline = stable_diffusion(tmp_path, scheduler, diffusers.StableDiffusionImg2ImgPipeline)
    eps, image = tiny.noise(2), tiny.picture(2)
    hand(monkeypatch, pipeline, eps)
    compare(
        pipeline,
        tmp_path,
        lambda mine, decode: mine.image_to_image(
            PROMPTS, image, steps=6, guidance=GUIDANCE, strength=strength, latents=eps, decode=decode
        ),
        prompt=PROMPTS,
        image=torched(image),
        strength=strength,
        num_inference_steps=6,
        guidance_scale=GUIDANCE,
    )


@pytest.mark.parametrize(
    "scheduler, channels, strength",
    [
        ("ddim", 4, 1.0),
        ("ddim", 4, 0.6),
        ("ddim", 9, 1.0),
        ("euler", 4, 1.0),
        ("euler", 9, 0.6),
        ("pndm", 4, 0.7),
        ("pndm", 9, 1.0),
    ],
)
def test_inpaint(monkeypatch, tmp_path, scheduler, channels, strength):
    pipeline = stable_diffusion(tmp_path, scheduler, diffusers.StableDiffusionInpaintPipeline, in_channels=channels)
    eps, image = tiny.noise(2), tiny.picture(2)
    mask = np.zeros((1, 16, 16, 1), np.float32)
    mask[:, 4:12, 6:] = 1.0
    hand(monkeypatch, pipeline, eps)
    compare(
        pipeline,
        tmp_path,
        lambda mine, decode: mine.inpaint(
            PROMPTS, image, mask, steps=6, guidance=GUIDANCE, strength=strength, latents=eps, decode=decode
        ),
        prompt=PROMPTS,
        image=torched(image),
        mask_image=torched(mask.repeat(2, 0)),
        strength=strength,
        num_inference_steps=6,
        guidance_scale=GUIDANCE,
        height=16,
        width=16,
    )


def test_pictures_need_not_be_square(monkeypatch, tmp_path):
    """16 x 24 pixels: text to image, and inpainting whose mask would not survive a transposition."""
    pipeline = stable_diffusion(tmp_path, "ddim", diffusers.StableDiffusionInpaintPipeline, in_channels=9)
    pipeline.set_progress_bar_config(disable=True)
    eps = np.random.default_rng(2).standard_normal((1, 8, 12, 4)).astype(np.float32)
    image = np.random.default_rng(3).random((1, 16, 24, 3)).astype(np.float32)
    mask = np.zeros((1, 16, 24, 1), np.float32)
    mask[:, 2:9, 13:] = 1.0
    hand(monkeypatch, pipeline, eps)
    told = {"num_inference_steps": 3, "guidance_scale": GUIDANCE, "height": 16, "width": 24, "output_type": "np"}
    theirs = pipeline(prompt="a", image=torched(image), mask_image=torched(mask), **told).images
    mine = pipelines.load(tmp_path)
    both(theirs, mine.inpaint("a", image, mask, steps=3, guidance=GUIDANCE, latents=eps))
    assert mine.inpaint("a", image, mask, steps=1, guidance=1.0).shape == (1, 16, 24, 3)
    pipeline = stable_diffusion(tmp_path / "plain", "ddim")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(prompt="a", latents=torched(eps), **told).images
    mine = pipelines.load(tmp_path / "plain")
    both(theirs, mine.text_to_image("a", steps=3, guidance=GUIDANCE, latents=eps, size=(16, 24)))


ON_DEVICES = """
import sys, numpy as np, jax
from ldm_jax import pipelines
assert jax.device_count() == 4
images = pipelines.load(sys.argv[1]).text_to_image(["a", "b", "c"], steps=3, guidance=3.0, seed=1, decode=False, batch_size=2)
np.save(sys.argv[2], images)
"""


def test_rows_are_split_among_devices(tmp_path):
    """Three images on four devices are those of one device."""
    stable_diffusion(tmp_path / "model", "ddim")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", ON_DEVICES, str(tmp_path / "model"), str(tmp_path / "z.npy")]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
    alone = pipelines.load(tmp_path / "model").text_to_image(
        ["a", "b", "c"], steps=3, guidance=3.0, seed=1, decode=False
    )
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), alone, atol=1e-4)


def test_depth(monkeypatch, tmp_path):
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    config = DPTConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    parts = {k: v for k, v in tiny.sd_parts().items() if k not in ("safety_checker", "feature_extractor")}
    pipeline = diffusers.StableDiffusionDepth2ImgPipeline(
        unet=tiny.unet(in_channels=5),
        scheduler=diffusers.DDIMScheduler(**tiny.DDIM),
        depth_estimator=DPTForDepthEstimation(config),
        feature_extractor=DPTImageProcessor(),
        **parts,
    )
    pipeline.save_pretrained(tmp_path)
    eps, image = tiny.noise(2), tiny.picture(2)
    depth = np.random.default_rng(3).random((2, 11, 13)).astype(np.float32)
    hand(monkeypatch, pipeline, eps)
    compare(
        pipeline,
        tmp_path,
        lambda mine, decode: mine.image_to_image(
            PROMPTS, image, depth=depth, steps=6, guidance=GUIDANCE, strength=0.8, latents=eps, decode=decode
        ),
        prompt=PROMPTS,
        image=torched(image),
        depth_map=torch.tensor(depth),
        strength=0.8,
        num_inference_steps=6,
        guidance_scale=GUIDANCE,
    )


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral"])
def test_instruct(monkeypatch, tmp_path, scheduler):
    """With the published default too, whose noise is handed over."""
    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    if scheduler == "ddim":
        pipeline = stable_diffusion(tmp_path, "ddim", kind, in_channels=8)
    else:
        pipeline = kind(
            unet=tiny.unet(in_channels=8),
            scheduler=diffusers.EulerAncestralDiscreteScheduler(**tiny.EULER),
            **tiny.sd_parts(),
        )
        pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    eps, image = tiny.noise(2), tiny.picture(2)
    mine = pipelines.load(tmp_path)
    for decode, kind in ((False, "latent"), (True, "np")):
        if scheduler != "ddim":
            hand(monkeypatch, pipeline, steps=STEPS, shape=eps.shape)
        theirs = pipeline(
            prompt=PROMPTS,
            image=torched(image),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            image_guidance_scale=1.6,
            latents=torched(eps),
            output_type=kind,
        ).images
        got = mine.edit(PROMPTS, image, steps=STEPS, guidance=GUIDANCE, image_guidance=1.6, latents=eps, decode=decode)
        both(theirs if decode else ours(theirs), got, decode)
    if scheduler != "ddim":
        return
    for text, picture in ((0.5, 1.6), (1.0, 1.6), (4.0, 0.9), (4.0, 1.0)):
        options = {"num_inference_steps": 3, "guidance_scale": text, "image_guidance_scale": picture}
        theirs = pipeline(prompt=PROMPTS, image=torched(image), latents=torched(eps), output_type="latent", **options)
        options = {"steps": 3, "guidance": text, "image_guidance": picture, "latents": eps, "decode": False}
        both(ours(theirs.images), mine.edit(PROMPTS, image, **options), False)


def xl(folder, kind=diffusers.StableDiffusionXLPipeline, scheduler=None, refiner=False, in_channels=4, **options):
    """Two encoders of widths 8 and 12; the refiner has the second alone and is told an aesthetic score."""
    cross = 12 if refiner else 20
    width = 12 + 8 * (5 if refiner else 6)
    scheduler = scheduler or diffusers.EulerDiscreteScheduler(**tiny.EULER)
    # diffusers' inpainting reads them on the way out alone.
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.1, 0.9, 1.0, 1.3]}
    statistics = {} if "Inpaint" in kind.__name__ else statistics
    pipeline = kind(
        unet=tiny.xl_unet(width=width, cross_attention_dim=cross, in_channels=in_channels),
        scheduler=scheduler,
        vae=tiny.vae(scaling_factor=0.13025, **statistics),
        text_encoder=None if refiner else tiny.text_encoder(8),
        tokenizer=None if refiner else tiny.tokenizer(),
        text_encoder_2=tiny.text_encoder(12, projection=12, act="gelu"),
        tokenizer_2=tiny.tokenizer(),
        **options,
    )
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("negative, scheduler", [(None, None), (NEGATIVE, diffusers.DDIMScheduler(**tiny.DDIM))])
def test_xl(tmp_path, negative, scheduler):
    eps = tiny.noise(2)
    compare(
        xl(tmp_path, scheduler=scheduler, force_zeros_for_empty_prompt=True),
        tmp_path,
        lambda mine, decode: mine.text_to_image(
            PROMPTS,
            negative,
            steps=STEPS,
            guidance=GUIDANCE,
            latents=eps,
            decode=decode,
            sizes=pipelines.Sizes(original=(24, 20), crop=(2, 3)),
        ),
        prompt=PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torched(eps),
        original_size=(24, 20),
        crops_coords_top_left=(2, 3),
        negative_original_size=(24, 20),
        negative_crops_coords_top_left=(2, 3),
    )


def test_xl_base_hands_over_to_its_refiner(tmp_path):
    base = xl(tmp_path / "base")
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    refiner = xl(tmp_path / "refiner", kind, refiner=True, requires_aesthetics_score=True)
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
    eps = tiny.noise(2)
    shared = {"prompt": PROMPTS, "num_inference_steps": 10, "guidance_scale": GUIDANCE}
    left = base(**shared, latents=torched(eps), denoising_end=0.7, output_type="latent").images
    theirs = refiner(**shared, image=left, denoising_start=0.7, output_type="latent").images
    mine, mine_refiner = pipelines.load(tmp_path / "base"), pipelines.load(tmp_path / "refiner")
    options = {"steps": 10, "guidance": GUIDANCE, "decode": False}
    z = mine.text_to_image(PROMPTS, latents=eps, end=0.7, **options)
    both(ours(left) / np.sqrt(1 + float(base.scheduler.sigmas[7]) ** 2), z, False)  # theirs is x_t / alpha
    both(ours(theirs), mine_refiner.image_to_image(PROMPTS, z, start=0.7, **options), False)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_xl_image_to_image(monkeypatch, tmp_path, strength):
    pipeline = xl(tmp_path, diffusers.StableDiffusionXLImg2ImgPipeline)
    eps, image = tiny.noise(2), tiny.picture(2)
    hand(monkeypatch, pipeline, eps)
    compare(
        pipeline,
        tmp_path,
        lambda mine, decode: mine.image_to_image(
            PROMPTS, image, NEGATIVE, steps=6, guidance=GUIDANCE, strength=strength, latents=eps, decode=decode
        ),
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        image=torched(image),
        strength=strength,
        num_inference_steps=6,
        guidance_scale=GUIDANCE,
    )


@pytest.mark.parametrize("channels", [4, 9])
def test_xl_inpaint(monkeypatch, tmp_path, channels):
    pipeline = xl(tmp_path, diffusers.StableDiffusionXLInpaintPipeline, in_channels=channels)
    eps, image = tiny.noise(2), tiny.picture(2)
    mask = np.zeros((1, 16, 16, 1), np.float32)
    mask[:, 4:12, 6:] = 1.0
    hand(monkeypatch, pipeline, eps)
    compare(
        pipeline,
        tmp_path,
        lambda mine, decode: mine.inpaint(
            PROMPTS, image, mask, NEGATIVE, steps=6, guidance=GUIDANCE, strength=0.8, latents=eps, decode=decode
        ),
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        image=torched(image),
        mask_image=torched(mask.repeat(2, 0)),
        strength=0.8,
        num_inference_steps=6,
        guidance_scale=GUIDANCE,
        height=16,
        width=16,
    )


def test_latent_consistency(monkeypatch, tmp_path):
    pipeline = diffusers.LatentConsistencyModelPipeline(
        unet=tiny.unet(time_cond_proj_dim=16), scheduler=diffusers.LCMScheduler(**tiny.DDIM), **tiny.sd_parts()
    )
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    eps = tiny.noise(2)
    hand(monkeypatch, pipeline, steps=4, shape=eps.shape)
    theirs = pipeline(
        prompt=PROMPTS, num_inference_steps=4, guidance_scale=8.5, latents=torched(eps), output_type="latent"
    ).images
    mine = pipelines.load(tmp_path)
    both(ours(theirs), mine.text_to_image(PROMPTS, steps=4, guidance=8.5, latents=eps, decode=False), False)
    # With a picture: all of the steps, over a fifth of the way.
    pipeline = diffusers.LatentConsistencyModelImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    hand(monkeypatch, pipeline, eps)
    hand(monkeypatch, pipeline, steps=4, shape=eps.shape)
    image = tiny.picture(2)
    options = {"num_inference_steps": 4, "guidance_scale": 8.5, "strength": 0.2, "output_type": "latent"}
    theirs = pipeline(prompt=PROMPTS, image=torched(image), **options).images
    options = {"steps": 4, "guidance": 8.5, "strength": 0.2, "latents": eps, "decode": False}
    both(ours(theirs), mine.image_to_image(PROMPTS, image, **options), False)


def pixels(**options):
    torch.manual_seed(0)
    return tiny.stir(
        diffusers.UNet2DModel(
            **{
                "sample_size": 8,
                "block_out_channels": (4, 8),
                "norm_num_groups": 2,
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 4,
                **options,
            }
        )
    )


def test_ddpm_and_ddim_in_pixels(monkeypatch, tmp_path):
    pipeline, eps = diffusers.DDPMPipeline(pixels(), diffusers.DDPMScheduler()), tiny.noise(2, channels=3)
    pipeline.save_pretrained(tmp_path / "ddpm")
    pipeline.set_progress_bar_config(disable=True)
    mine = pipelines.load(tmp_path / "ddpm")
    hand(monkeypatch, pipeline, eps, 10, eps.shape)
    theirs = pipeline(batch_size=2, num_inference_steps=10, output_type="np").images
    np.testing.assert_allclose(mine.draw(2, steps=10, latents=eps), theirs, atol=TOLERANCE)
    monkeypatch.undo()
    pipeline = diffusers.DDIMPipeline(pixels(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    hand(monkeypatch, pipeline, eps)
    theirs = pipeline(batch_size=2, num_inference_steps=10, output_type="np").images
    np.testing.assert_allclose(mine.draw(2, steps=10, sampler="ddim", latents=eps), theirs, atol=TOLERANCE)


def test_classes_in_latents(monkeypatch, tmp_path):
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    tiny.stir(network)
    for block in network.transformer_blocks[1:]:  # one embedder in training, a copy for each block in the file
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    pipeline = diffusers.DiTPipeline(network, tiny.vae(), diffusers.DDIMScheduler(**tiny.DDIM))
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    eps = tiny.noise(2)
    hand(monkeypatch, pipeline, eps)
    theirs = pipeline([3, 7], guidance_scale=0.5, num_inference_steps=STEPS, output_type="np").images
    mine = pipelines.load(tmp_path).draw(2, labels=[3, 7], steps=STEPS, guidance=0.5, latents=eps)
    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)


def test_variations_by_inversion_round_trip(tmp_path):
    """Inverted and drawn again under the same words, a picture's latent comes back, the better the more steps.

    The network's output is small: what a random one draws is no smooth path."""
    pipeline = stable_diffusion(tmp_path, "ddim")
    with torch.no_grad():
        pipeline.unet.conv_out.weight *= 0.1
    pipeline.save_pretrained(tmp_path)
    mine, image = pipelines.load(tmp_path), tiny.picture(1)
    z = L.encode(mine.space, mine.space_params, image)
    errors = []
    for steps in (20, 200):
        again = mine.vary("a cat", image, source="a cat", steps=steps, guidance=1.0, decode=False)
        errors.append(np.abs(again - z).max())
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.1, errors


def test_rows_depend_on_themselves_alone(tmp_path):
    """Row i is what it is drawn alone, whatever the batch; interpolation begins and ends at its two prompts and seeds."""
    stable_diffusion(tmp_path, "euler")
    mine = pipelines.load(tmp_path)
    options = {"steps": 4, "guidance": 3.0, "seed": 5}
    all_of = mine.text_to_image(PROMPTS * 2, **options, batch_size=4)
    few = mine.text_to_image(PROMPTS * 2, **options, batch_size=3)
    np.testing.assert_allclose(all_of, few, atol=1e-4)
    ways = mine.interpolate(tuple(PROMPTS), (5, 6), num=3, steps=4, guidance=3.0)
    np.testing.assert_allclose(ways[0], all_of[0], atol=1e-4)
    assert np.abs(ways[1] - ways[0]).max() > 1e-3 and np.abs(ways[1] - ways[2]).max() > 1e-3


def test_one_program_serves_every_prompt_seed_scale_and_number_of_steps(tmp_path):
    from ldm_jax.sampling.draw import Plan, program
    from ldm_jax.sampling.settings import Guidance

    stable_diffusion(tmp_path, "ddim")
    mine = pipelines.load(tmp_path)
    mine.text_to_image("a", steps=4, guidance=3.0, decode=False)
    compiled = program.cache_info().currsize
    for i, (prompt, steps, guidance) in enumerate((("b", 7, 2.0), ("a long one", 20, 9.0))):
        mine.text_to_image(prompt, "no", steps=steps, guidance=guidance, seed=i, decode=False)
    assert program.cache_info().currsize == compiled
    course = mine.course(mine.defaults._replace(steps=4), (16, 16))
    plan = Plan(course.model, course.sampler, Guidance())
    assert program.cache_info().currsize == compiled and program(plan).__wrapped__._cache_size() == 1
    assert program.cache_info().currsize == compiled, "the plan is that of what was drawn"


def test_offloaded_parts_and_bf16_draw_the_same(tmp_path):
    stable_diffusion(tmp_path, "ddim")
    options = {"steps": 3, "guidance": 3.0, "decode": False}
    whole = pipelines.load(tmp_path).text_to_image("a cat", **options)
    parts = pipelines.load(tmp_path, offload=True)
    assert isinstance(jax.tree.leaves(parts.params)[0], np.ndarray)
    np.testing.assert_allclose(parts.text_to_image("a cat", **options), whole, atol=1e-5)
    low = pipelines.load(tmp_path, "bfloat16")
    assert low.parts.denoiser.module.dtype == "bfloat16"
    assert np.abs(low.text_to_image("a cat", **options) - whole).max() < 0.2


def test_single_file(tmp_path):
    """A tiny Stable Diffusion 1 in one LDM-layout file draws what its folder draws."""
    from ldm_jax.weights import files, layout, single_file

    widths = {"block_out_channels": (4, 8, 8, 8), "layers_per_block": 2, "attention_head_dim": 2}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    parts = tiny.sd_parts() | {"vae": tiny.vae(levels=4)}
    pipeline = diffusers.StableDiffusionPipeline(
        unet=tiny.unet(**widths, **blocks), scheduler=diffusers.PNDMScheduler(**tiny.PNDM), **parts
    )
    pipeline.save_pretrained(tmp_path / "folder")

    def component(model):
        config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
        return config, layout.tensors({name: value.numpy() for name, value in model.state_dict().items()})

    joined = single_file.join(
        {name: component(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")}, "sd1"
    )
    files.write_safetensors(tmp_path / "model.safetensors", joined)
    options = {"unet": {"norm_num_groups": 2, "attention_head_dim": 2, "sample_size": 8}}
    options |= {"vae": {"norm_num_groups": 2}, "text_encoder": {"num_attention_heads": 2, "eos_token_id": 1}}
    mine = pipelines.load(tmp_path / "folder")
    alone = pipelines.load(tmp_path / "model.safetensors", tokenizer=tmp_path / "folder", kind="sd1", options=options)
    told = {"steps": 3, "guidance": 3.0, "decode": False}
    np.testing.assert_array_equal(alone.text_to_image("a cat", **told), mine.text_to_image("a cat", **told))
    with pytest.raises(ValueError, match="has no tokenizer"):
        pipelines.load(tmp_path / "model.safetensors", kind="sd1", options=options)
    with pytest.raises(ValueError, match="tokenizer is for single files"):
        pipelines.load(tmp_path / "folder", tokenizer=tmp_path)


def test_consistency_models(monkeypatch, tmp_path):
    network = pixels(num_class_embeds=5, resnet_time_scale_shift="scale_shift")
    pipeline = diffusers.ConsistencyModelPipeline(network, diffusers.CMStochasticIterativeScheduler())
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    eps = tiny.noise(2, channels=3)
    for steps in (1, 3):
        hand(monkeypatch, pipeline, steps=steps, shape=eps.shape)
        theirs = pipeline(
            batch_size=2, class_labels=[1, 4], num_inference_steps=steps, latents=torched(eps), output_type="np"
        ).images
        mine = pipelines.load(tmp_path).draw(2, labels=[1, 4], steps=steps, latents=eps)
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)


def test_score_sde(monkeypatch, tmp_path):
    """One image: the corrector's step is measured over a row by ours, over the batch by theirs."""
    from diffusers.pipelines.deprecated import ScoreSdeVePipeline

    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=10.0, snr=0.1)
    pipeline = ScoreSdeVePipeline(pixels(time_embedding_type="fourier"), scheduler)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    eps, steps = tiny.noise(1, channels=3), 4
    hand(monkeypatch, pipeline, eps)
    keys = keys_of.step_keys(keys_of.numbered(0, 1))
    # In a step the corrector draws first, ours under the second name.
    order = [draws(fold(keys, i), jnp.zeros(eps.shape), 2)[k] for i in range(steps) for k in (1, 0)]
    given = iter([torched(z) for z in order])
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *a, **k: next(given))
    predict, means = scheduler.step_pred, []

    def noted(*args, **kwargs):
        out = predict(*args, **kwargs)
        means.append(ours(out.prev_sample_mean))
        return out

    # Before they are clipped: an untrained network leaves [0, 1] nearly everywhere.
    monkeypatch.setattr(pipeline.scheduler, "step_pred", noted)
    theirs = pipeline(batch_size=1, num_inference_steps=steps, output_type="np").images
    mine = pipelines.load(tmp_path)
    z = mine.draw(1, steps=steps, latents=eps, decode=False)
    np.testing.assert_allclose(z, means[-1], atol=1e-4 * np.abs(means[-1]).max())
    np.testing.assert_allclose(pipelines.pictures(mine, z, True), theirs, atol=TOLERANCE)


def test_unconditional_in_vq_latents(monkeypatch, tmp_path):
    from diffusers import LDMPipeline

    torch.manual_seed(0)
    vq = diffusers.VQModel(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=2,
        num_vq_embeddings=16,
    )
    scheduler = diffusers.DDIMScheduler(**tiny.DDIM)
    pipeline = LDMPipeline(vqvae=tiny.stir(vq), unet=pixels(), scheduler=scheduler)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    eps = tiny.noise(2, channels=3)
    hand(monkeypatch, pipeline, eps)
    theirs = pipeline(batch_size=2, num_inference_steps=STEPS, output_type="np").images
    mine = pipelines.load(tmp_path).draw(2, steps=STEPS, latents=eps)
    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)
