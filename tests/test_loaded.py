"""ldm_jax.load and ldm_jax.train: the examples of docs/python.md as they stand, and what each method is held to."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

diffusers = pytest.importorskip("diffusers")

import ldm_jax  # noqa: E402
from configs import base  # noqa: E402
from ldm_jax import cli  # noqa: E402
from ldm_jax.config import config_file  # noqa: E402
from ldm_jax.data import SOURCES  # noqa: E402
from ldm_jax.diffusion.samplers import sample  # noqa: E402
from ldm_jax.sampling import keys  # noqa: E402
from tests.pipelines import published as tiny  # noqa: E402

pytestmark = pytest.mark.slow

EXAMPLES = re.findall(r"```python\n(.*?)```", (pathlib.Path(__file__).parents[1] / "docs/python.md").read_text(), re.S)


def pixel_run():
    c = base.get_config()
    c.task = {"name": "diffusion", "prediction": "flow", "drop": 0.1}
    c.model = {"name": "dit", "patch_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2}
    c.model.num_classes = 4
    c.data = {"name": "shapes", "size": 64}
    c.input.update(crop="none", num_threads=2, prefetch=2)
    c.condition.label = True
    base.smoke(c)
    c.train.update(images=16, validate_images=16)
    return c


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names of all examples, which run in their order in a folder that holds what they load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        ldm_jax.train(pixel_run(), "runs/pixels", quiet=True)
        pipeline = diffusers.StableDiffusionPipeline(
            unet=tiny.unet(), scheduler=diffusers.DDIMScheduler(**tiny.DDIM), **tiny.sd_parts()
        )
        pipeline.save_pretrained("stable-diffusion-v1-5")
        values = {}
        for example in EXAMPLES:
            exec(example, values)
        yield values


def levels(images):
    return np.round(np.asarray(images) * 255).astype(np.uint8)


def stirred(loaded):
    """The same with random parameters: a network of a few steps hardly sees its condition."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), loaded.pipeline.params)
    loaded = loaded._replace(pipeline=loaded.pipeline._replace(params=params))
    if loaded.run is None:
        return loaded
    run = loaded.run._replace(params=params)
    return loaded._replace(run=run, measured=loaded.measured._replace(run=run))


def test_what_the_examples_give(names):
    assert len(EXAMPLES) == 7
    assert names["images"].shape == names["again"].shape == (4, 32, 32, 3) and names["x"].shape == (2, 8, 8, 6)
    assert names["pictures"].shape == (2, 32, 32, 3) and names["near"].shape == names["half"].shape == (1, 32, 32, 3)
    assert 0 <= names["images"].min() and names["images"].max() <= 1 and names["images"].std() > 0.01
    assert names["bits"].shape == (2,) and np.isfinite(names["bits"]).all()
    run, model, vae = names["run"], names["model"], names["vae"]
    assert repr(run).startswith(
        "<runs/a: a diffusion run at step 4, average none, of text: 32 x 32 pixels, latents 8 x 8 x 6"
    )
    assert "a published StableDiffusionPipeline of text: 16 x 16 pixels" in repr(model)
    assert repr(vae).endswith(
        "a published AutoencoderKL of 4 channels, scaled by its scaling_factor 0.18215\n offers encode, decode, evaluate>"
    )
    assert "likelihood" in names["pixels"].offers and "likelihood" not in run.offers


def test_a_run_samples_what_ldm_sample_draws(names):
    words = ["sample", "--workdir=runs/a", "--ema=none", "--num=4", "--seed=1", "--steps=2", "--out=sampled", "--quiet"]
    assert cli.main([*words, "--text=a red circle", "--text=a small blue square"]) == 0
    with np.load("sampled/samples.npz") as file:
        np.testing.assert_array_equal(levels(names["images"]), file["arr_0"])
    # The options of a way of drawing lead through the pipeline, which rounds otherwise.
    other = names["run"].sample(1, "a red circle", seed=1, steps=2, negative=None, decode=True)
    np.testing.assert_allclose(other, names["images"][:1], atol=1.01 / 255)
    assert names["pixels"].sample(1, labels=[names["pixels"].pipeline.class_names[3]], steps=1).shape == (1, 32, 32, 3)


def test_a_published_pipeline_samples_what_ldm_generate_draws(names):
    words = [
        "generate",
        "--model=stable-diffusion-v1-5",
        "--num=3",
        "--seed=2",
        "--steps=2",
        "--out=generated",
        "--quiet",
    ]
    assert cli.main([*words, "--prompt=a fox", "--prompt=a hen", "--guidance=4"]) == 0
    images = names["model"].sample(3, ["a fox", "a hen"], seed=2, steps=2, guidance=4.0)
    drawn = [np.asarray(Image.open(f"generated/{i:06d}.png")) for i in range(3)]
    np.testing.assert_array_equal(levels(images), drawn)
    assert np.abs(images[0] - images[2]).max() > 0.01, "each image has its own noise"


@pytest.mark.parametrize("name, prompt", [("run", "a red circle"), ("model", "a fox in the snow")])
def test_one_sampler_with_the_denoiser_draws_what_the_object_draws(names, name, prompt):
    loaded, asked = stirred(names[name]), {"guidance": 3.0, "guidance_schedule": "linear"}
    pipeline = loaded.pipeline
    settings = pipeline.defaults._replace(steps=2)
    course = pipeline.course(settings, pipeline.frame.shape(None)[1])
    rows = keys.numbered(5, 2)
    x_T = course.noise_scale * keys.noise(rows, loaded.shape)
    z = sample(
        course.sampler(), loaded.denoiser(prompt, **asked), loaded.process, x_T, course.times, keys.step_keys(rows)
    )
    expected = loaded.text_to_image(prompt, num=2, seed=5, steps=2, decode=False, **asked)
    np.testing.assert_allclose(z, expected, atol=1e-3)
    plain = loaded.text_to_image(prompt, num=2, seed=5, steps=2, decode=False, guidance=1.0)
    assert np.abs(expected - plain).max() > 1e-2, "it is guided"


def test_nothing_said_is_what_guidance_goes_away_from(names):
    run, x = stirred(names["run"]), np.random.default_rng(0).standard_normal((3, 8, 8, 6)).astype(np.float32)
    nothing, away = run.denoiser()(x, 0.5), run.denoiser("a red circle", guidance=0.0)(x, 0.5)
    np.testing.assert_allclose(nothing.x, away.x, atol=1e-4)
    assert np.abs(nothing.x - run.denoiser("a red circle", guidance=1.0)(x, 0.5).x).max() > 1e-2
    pixels, x = stirred(names["pixels"]), np.zeros((2, 32, 32, 3), np.float32)
    t, null = np.full(2, 500, np.float32), {"label": np.full(2, 4)}
    v = pixels.run.model.denoiser.apply({"params": pixels.pipeline.params["denoiser"]}, x, t, null)  # eps - x
    np.testing.assert_allclose(pixels.denoiser()(x, 0.5).eps, x + 0.5 * v, atol=1e-4)
    assert np.abs(pixels.denoiser(labels=0, guidance=1.0)(x, 0.5).eps - (x + 0.5 * v)).max() > 1e-2
    with pytest.raises(ValueError, match="x_t has 3 rows, but the denoiser was made for 2"):
        run.denoiser(["a red circle", "a blue square"])(np.zeros((3, 8, 8, 6)), 0.5)
    with pytest.raises(ValueError, match=r"x_t has shape \(1, 4, 4, 6\), expected \[B, 8, 8, 6\]"):
        run.denoiser()(np.zeros((1, 4, 4, 6)), 0.5)


def test_the_mean_of_likelihoods_is_the_metric_bits(names):
    pixels, source = stirred(names["pixels"]), SOURCES["shapes"](split="test", size=64)
    examples = [source[i] for i in range(0, 64, 16)]
    images, labels = np.stack([e["image"] for e in examples]), [int(e["label"]) for e in examples]
    row = pixels.evaluate("bits", 4, steps=2, seed=3)
    values = pixels.likelihood(images, labels=labels, steps=2, seed=3, batch_size=3)
    assert values.mean() == pytest.approx(row["bits"], rel=1e-5)
    np.testing.assert_allclose(
        pixels.likelihood(images[1:2] / np.float32(255), labels=labels[1], steps=2),
        pixels.likelihood(images[1:2], labels=labels[1], steps=2),
    )


def test_evaluate_gives_the_row_of_the_command(names, capsys):
    assert (
        cli.main(["evaluate", "--workdir=runs/a", "--ema=none", "--metrics=shapes", "--num=8", "--steps=2", "--quiet"])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    row = {name: value for name, value in names["row"].items() if name != "plugins"}
    assert json.loads(json.dumps(row)) == printed
    kept = [json.loads(line) for line in pathlib.Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert kept[-1] == printed and kept[-2] == json.loads(json.dumps(names["row"]))


def test_the_first_stage_of_a_run_by_itself(names):
    stage = ldm_jax.load("runs/a/first_stage")
    assert stage.offers == ["encode", "decode", "evaluate"] and stage.shape == (8, 8, 6)
    x = names["run"].encode(names["images"][:2])
    assert x.shape == (2, 8, 8, 6) and 0.1 < x.std() < 3, "whitened"
    np.testing.assert_allclose(stage.encode(names["images"][:2]), x, atol=1e-4)
    np.testing.assert_allclose(stage.decode(x), names["again"][:2], atol=1e-4)
    row = stage.evaluate(["psnr"], 4)
    assert row["step"] == stage.step and row["psnr"] > 0


def test_train_goes_on_and_refuses_as_the_command_does(names):
    config = config_file.load("configs/quickstart.py:smoke").unlock()
    again = ldm_jax.train(config, "runs/a", overrides={"seed": 1}, quiet=True)
    assert again.step == names["run"].step and isinstance(config, ConfigDict) and not config.is_locked
    with pytest.raises(ValueError, match="was started with another config"):
        ldm_jax.train(config, "runs/a", quiet=True)
    with pytest.raises(ValueError, match=r"has no key 'train.imagess'; did you mean train.images"):
        ldm_jax.train("configs/quickstart.py:smoke", "runs/a", overrides={"train.imagess": 1})


@pytest.mark.parametrize(
    "name, call, said",
    [
        (
            "vae",
            lambda o: o.text_to_image("a"),
            r"a published AutoencoderKL .* it has no text_to_image; it offers encode, decode",
        ),
        (
            "pixels",
            lambda o: o.text_to_image("a"),
            "of 4 classes: 32 x 32 pixels: it has no text_to_image; it offers sample, draw",
        ),
        ("run", lambda o: o.likelihood(np.zeros((1, 32, 32, 3))), "latents 8 x 8 x 6: it has no likelihood"),
        ("run", lambda o: o.sample(1, labels=[1]), "labels: runs/a is a diffusion run .* which has no classes"),
        ("pixels", lambda o: o.sample(1, labels=[4]), "label 4 is no class of runs/pixels; expected 0 to 3"),
        ("pixels", lambda o: o.denoiser(labels="cat"), "label 'cat' is no class of runs/pixels; .* or a name, such as"),
        ("run", lambda o: o.decode(np.zeros((1, 32, 32, 3))), r"x has shape \(1, 32, 32, 3\), expected \[N, h, w, 6\]"),
        ("model", lambda o: o.evaluate("fid"), "it has no evaluate; it offers sample"),
        ("vae", lambda o: o.evaluate("psnr"), "expected data='CONFIG.py'"),
        ("run", lambda o: o.evaluate("psnr", 4, lpips="a,b"), "--lpips=a,b goes with the metric lpips"),
        ("run", lambda o: ldm_jax.load("nowhere"), "nowhere: no such run, and no published model: looked for"),
        ("run", lambda o: ldm_jax.load("runs"), "runs holds no run of `ldm train` and no published model"),
        ("run", lambda o: ldm_jax.load("circle.png"), "circle.png"),
        ("run", lambda o: ldm_jax.load(""), "the place is empty"),
        (
            "run",
            lambda o: ldm_jax.load("runs/a", dtype="float32"),
            "dtype='float32' does not go with runs/a, which is a run",
        ),
        ("run", lambda o: ldm_jax.load("runs/a/first_stage", ema=9), "ema='?9'? does not go with runs/a/first_stage"),
        (
            "run",
            lambda o: ldm_jax.load("stable-diffusion-v1-5", step=1),
            "step=1 does not go with stable-diffusion-v1-5",
        ),
        (
            "run",
            lambda o: ldm_jax.load("stable-diffusion-v1-5/unet"),
            "network of the class UNet2DConditionModel; expected an auto",
        ),
    ],
)
def test_what_does_not_apply_is_one_line(names, name, call, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        call(names[name])
    assert "\n" not in str(error.value)


def test_options_that_nothing_reads_raise(names):
    for call in (
        lambda: names["run"].sample(1, colour="red"),
        lambda: names["run"].denoiser("a", steps=3),
        lambda: names["run"].evaluate("shapes", 4, colour="red"),
    ):
        with pytest.raises(TypeError, match=r"unexpected keyword argument '(colour|steps)'"):
            call()


def test_importing_the_package_imports_no_jax():
    code = "import sys, ldm_jax; assert 'jax' not in sys.modules and {'load', 'train'} <= {*dir(ldm_jax)}"
    subprocess.run([sys.executable, "-c", code], check=True)
