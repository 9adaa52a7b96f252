"""A run that pipelines draw from: what `ldm sample` draws, and every other way of drawing."""

import jax
import numpy as np
import pytest

from configs import cifar10_dit_pixel, quickstart, quickstart_vae
from ldm_jax.evaluation import generate
from ldm_jax.pipelines import Request
from ldm_jax.pipelines import latents as L
from ldm_jax.training import blocks, build, conditioning, drawable, experiment, first_stage, restore, sampling

PROMPTS = ["a red circle", "a small blue square"]


def stirred(params, seed=0):
    """Random parameters everywhere: the output of a fresh denoiser is 0, whatever it is given."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32) for x in leaves])


def restored(config, stage, num_classes):
    parsed = experiment.parse(config)
    model = blocks.kind_of(parsed).model(build.context(parsed, stage, num_classes), **parsed.task.options)
    params = conditioning.init(model.conditioning, jax.random.key(0))
    params["denoiser"] = sampling.init(model, jax.random.key(1), params)
    facts = {"prompts": PROMPTS, "class_names": [f"class {i}" for i in range(num_classes)]}
    return restore.Restored(parsed, model, stirred(params), sampling.frozen(model), 1, "", facts)


@pytest.fixture(scope="module")
def text_run():
    """Whitened latents of a first stage, captions."""
    config, network = quickstart.get_config("smoke"), experiment.parse(quickstart_vae.get_config("smoke")).network
    shape = first_stage.latent_shape(network, (32, 32, 3))
    params = network.init(jax.random.key(2), np.zeros((1, 32, 32, 3), np.float32))["params"]
    mean, std = np.linspace(-1, 1, shape[-1], dtype=np.float32), np.linspace(0.5, 2, shape[-1], dtype=np.float32)
    return restored(config, first_stage.FirstStage(network, params, mean, std, shape), 0)


@pytest.fixture(scope="module")
def pixel_run():
    """Pixels, classes."""
    config = cifar10_dit_pixel.get_config("smoke")
    return restored(config, None, config.model.num_classes)


def sampled(run, settings, labels=(), prompts=(), count=3, seed=5):
    """f32[N, H, W, 3] in [0, 1], as `ldm sample` draws them."""
    what = generate.asked(run, count, labels, prompts)
    tokenizer = run.experiment.tokenizer
    images = generate.draw(run, settings, what, count=count, seed=seed, tokenizer=tokenizer, batch_size=2, quiet=True)
    return np.concatenate([*images]) / 255


def close(images, expected):
    """To a step of 8 bits: sampled ones are rounded."""
    assert images.std() > 0.05, "the pictures show something"
    np.testing.assert_allclose(images, expected, atol=1.01 / 255)


def test_a_run_draws_what_ldm_sample_draws(text_run, pixel_run):
    pipeline = drawable.pipeline(text_run, "run")
    settings = text_run.experiment.sampler._replace(steps=3)
    images = pipeline.text_to_image(PROMPTS, num=2, steps=3, seed=5)
    close(images, sampled(text_run, settings, prompts=PROMPTS, count=2))
    shared = {"options": {"eta": 0.7}, "guidance": 0.5, "guidance_method": "cfg_zero"}
    pipeline = drawable.pipeline(pixel_run, "run")
    settings = pixel_run.experiment.sampler._replace(steps=3, name="ddim", **shared)
    images = pipeline.draw(3, [3, 1], steps=3, seed=5, sampler="ddim", **shared)
    close(images, sampled(pixel_run, settings, labels=[3, 1]))
    later = pipeline.draw(1, [3, 1], steps=3, seed=5, first=2, sampler="ddim", **shared)
    np.testing.assert_allclose(later[0], images[2], atol=1e-4)


def test_every_way_of_drawing_takes_a_run(text_run):
    pipeline, options = drawable.pipeline(text_run, "run"), {"steps": 4, "seed": 5, "batch_size": 2}
    picture = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32).repeat(4, 1).repeat(4, 2)
    shown = pipeline.text_to_image(PROMPTS[:1], **options)
    away = pipeline.text_to_image(PROMPTS[:1], PROMPTS[1], **options)
    ends = pipeline.interpolate(tuple(PROMPTS), (5, 6), num=3, steps=4)
    np.testing.assert_allclose(ends[0], shown[0], atol=1e-3)
    assert np.abs(away - shown).max() > 1e-2 and np.abs(ends[1] - ends[0]).max() > 1e-2
    # What lies outside the mask is what the first stage gives back of the picture.
    coded, mask = np.asarray(L.encode(pipeline.space, pipeline.space_params, picture)), np.zeros((1, 32, 32, 1), "f4")
    mask[:, :16] = 1
    half = pipeline.inpaint(PROMPTS[0], picture, mask, decode=False, **options)
    rows = half.shape[1] // 2
    np.testing.assert_allclose(half[:, rows:], coded[:, rows:], atol=1e-4)
    assert np.abs(half[:, :rows] - coded[:, :rows]).max() > 0.1
    near, far = (pipeline.image_to_image(PROMPTS[0], picture, strength=s, decode=False, **options) for s in (0.25, 1))
    assert np.abs(near - coded).mean() < np.abs(far - coded).mean()
    # Inverted and drawn again under the same words.
    again = pipeline.vary(PROMPTS[0], picture, PROMPTS[0], steps=40, guidance=1.0, decode=False, seed=5)
    assert np.abs(again - coded).mean() < 0.2 * coded.std()
    tiles = drawable.pipeline(text_run, "run", tile=16, offload=True)
    assert tiles.text_to_image(PROMPTS[:1], size=(64, 32), **options).shape == (1, 64, 32, 3)


def test_an_interval_without_a_step_is_unguided(pixel_run):
    pipeline, options = drawable.pipeline(pixel_run, "run"), {"steps": 2}
    plain = pipeline.draw(1, [3], guidance=1.0, **options)
    low = pipeline.draw(1, [3], guidance=5.0, t_lo=0.0, t_hi=1e-6, **options)
    np.testing.assert_allclose(low, plain, atol=1e-4)
    assert np.abs(pipeline.draw(1, [3], guidance=5.0, **options) - plain).max() > 1e-2
    settings = pipeline.settings(Request(guidance_method="apg", guidance_options={"eta": 0.5}, steps=9))
    assert settings.guidance_options == {"eta": 0.5} and settings.steps == 9
    assert settings.name == pixel_run.experiment.sampler.name


@pytest.mark.parametrize(
    "way, options, said",
    [
        ("text_to_image", {"prompts": PROMPTS[0], "labels": [1]}, "labels: this network has no classes"),
        ("text_to_image", {"prompts": PROMPTS[0], "end": 0.5}, "start and end go with pipelines that hand over"),
        ("text_to_image", {"prompts": PROMPTS[0], "size": (30, 33)}, "multiples of 4; the nearest is"),
        ("edit", {"prompts": PROMPTS[0], "images": np.zeros((32, 32, 3))}, "its network takes 0 channels besides"),
        ("draw", {}, "run takes prompts: use text_to_image"),
    ],
)
def test_what_a_run_does_not_take(text_run, way, options, said):
    with pytest.raises(ValueError, match=said):
        getattr(drawable.pipeline(text_run, "run"), way)(**options)
