"""A published autoencoder as first stage: found in every form, whitened by its own constants, known when it changes, written back."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import cli, models, weights
from ldm_jax.models import MODELS
from ldm_jax.pipelines import components
from ldm_jax.pipelines import latents as pipeline_latents
from ldm_jax.runs import checkpoint
from ldm_jax.training import experiment, facts, first_stage, loop, open_stage, published, restore
from ldm_jax.weights import autoencoders
from tests.training import tiny

# The least that a file in the LDM layout can say: 32 groups, attention in the middle.
KL = {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4}
SCALE = np.float32(0.18215)


def module_and_params(seed=0, name="autoencoder_kl", **options):
    module = MODELS[name](**options)
    shapes = models.shapes(module)["params"]
    rng = np.random.default_rng(seed)
    return module, jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One autoencoder in each of its forms, and what is none."""
    root = tmp_path_factory.mktemp("published")
    weights.save(root / "folder", *module_and_params(**KL), facts={"sample_size": 16, "force_upcast": True})
    shutil.copytree(root / "folder", root / "pipeline" / "vae")
    (root / "pipeline" / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    for words in (["alone.safetensors", "--to=single"], ["orbax", "--to=orbax"]):
        assert cli.main(["convert", str(root / "folder"), str(root / words[0]), words[1]]) == 0
    whole = {f"first_stage_model.{k}": v for k, v in weights.files.open_tensors(root / "alone.safetensors").items()}
    weights.files.write_safetensors(root / "whole.safetensors", whole)
    (root / "unet").mkdir()
    (root / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (root / "dc").mkdir()
    (root / "dc" / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    (root / "no_vae").mkdir()
    (root / "no_vae" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    (root / "empty").mkdir()
    (root / "start").mkdir()
    (root / "start" / "config.json").write_text('{"task": {"name": "weights"}, "converted_from": "/x"}')
    return root


def config(where, **changes):
    c = tiny.config(batch_size=4, images=8).copy_and_resolve_references().unlock()
    c.task = {"name": "diffusion", "prediction": "eps"}
    c.process = {"name": "discrete_vp"}
    c.model = {"name": "dit", "in_channels": 4, "hidden_size": 8, "depth": 1, "num_heads": 1, "num_classes": 4}
    c.model.time_shift = 1.0
    c.condition.label = True
    c.input.update(resolution=16, crop="adm")
    c.train.update(images=8, checkpoint_every=4, log_every=4, validate_images=4, pictures=2)
    c.first_stage.workdir = str(where)
    c.update_from_flattened_dict(changes)
    return c.lock()


def stage_at(path, **changes):
    return open_stage.load(pathlib.Path(path), experiment=experiment.parse(config(path, **changes)))


FORMS = (
    "folder",
    "folder/diffusion_pytorch_model.safetensors",
    "pipeline",
    "alone.safetensors",
    "whole.safetensors",
    "orbax",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_first_stage(root, form):
    expected, met = stage_at(root / "folder"), stage_at(root / form)
    assert (met.sha256, met.decoder, met.shape) == (expected.sha256, expected.decoder, (8, 8, 4))
    assert met.network == expected.network and met.network.dtype == "float32"
    assert not met.mean.any() and np.array_equal(met.std, np.full(4, 1 / SCALE))
    jax.tree.map(np.testing.assert_array_equal, met.params, expected.params)
    assert first_stage.latent_shape(open_stage.network(root / form)[0], (32, 32, 3)) == (16, 16, 4)


@pytest.mark.parametrize(
    "name, options, facts, mean, std",
    [
        ("autoencoder_kl", {"scaling_factor": 0.5, "shift_factor": 0.25}, {}, [0.25] * 4, [2] * 4),
        (
            *("autoencoder_kl", {"scaling_factor": 0.5}),
            *({"latents_mean": [0.1, 0.2, 0, 0], "latents_std": [1, 2, 3, 4]}, [0.1, 0.2, 0, 0], [2, 4, 6, 8]),
        ),
        ("vq", {"scaling_factor": 0.5, "num_vq_embeddings": 8}, {}, [0] * 4, [2] * 4),
    ],
)
def test_latents_are_whitened_as_published_pipelines_do(tmp_path, name, options, facts, mean, std):
    weights.save(tmp_path, *module_and_params(name=name, **(KL | options)), facts=facts)
    stage = stage_at(tmp_path)
    np.testing.assert_array_equal([stage.mean, stage.std], np.float32([mean, std]))
    part = components.Part(stage.network, stage.params, stage.published.config)
    space, params = pipeline_latents.space(part.module, stage.shape), pipeline_latents.parameters(part)
    x = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    expected = pipeline_latents.encode(space, params, x)
    z = first_stage.moments(stage.network, stage.params, jnp.asarray(2 * x - 1))["mean"]
    white = first_stage.to_latent(stage, first_stage.frozen(stage), {"mean": z}, jax.random.key(0))
    np.testing.assert_allclose(white, expected, rtol=1e-5, atol=1e-5)
    image = first_stage.to_image(stage, first_stage.frozen(stage), white)
    np.testing.assert_allclose(
        jnp.clip(image / 2 + 0.5, 0, 1), pipeline_latents.decode(space, params, expected), atol=1e-4
    )


@pytest.mark.parametrize(
    "path, said",
    [
        ("unet", "unet holds a network of the class UNet2DModel; expected an autoencoder: AutoencoderKL, VQModel"),
        ("dc", "dc holds a network of the class AutoencoderDC; expected an autoencoder"),
        ("no_vae", "no_vae: no autoencoder; its model_index.json lists no vae, vqvae, movq"),
        ("empty", "holds neither a run of `ldm train` nor an autoencoder"),
        ("nowhere", "nowhere: no such run, folder or file of an autoencoder: looked for"),
        ("start", "does not say what network it holds: it was written by an earlier version"),
    ],
)
def test_what_is_no_autoencoder_is_said_in_one_line(root, tmp_path, path, said):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        loop.train(config(root / path), tmp_path / "run", quiet=True)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_resolution_that_it_cannot_halve_and_a_scale_that_a_file_does_not_say(root, tmp_path):
    with pytest.raises(ValueError, match=r"resolution=17 does not fit the first stage: .* multiples of 2"):
        stage_at(root / "folder", **{"input.resolution": 17})
    weights.save(tmp_path / "wide", *module_and_params(**(KL | {"latent_channels": 8})))
    assert cli.main(["convert", str(tmp_path / "wide"), str(tmp_path / "wide.safetensors"), "--to=single"]) in (0, 2)
    state = {name: v for name, v in weights.files.open_tensors(root / "alone.safetensors").items()}
    wide = autoencoders.single_file.join(
        {"vae": ({"_class_name": "AutoencoderKL", **KL}, _tensors(tmp_path / "wide"))}, "vae"
    )
    assert state.keys() == wide.keys()
    weights.files.write_safetensors(tmp_path / "file.safetensors", wide)
    with pytest.raises(ValueError, match=r"expected config.first_stage.whitening='measured', or the folder that"):
        stage_at(tmp_path / "file.safetensors")
    assert stage_at(tmp_path / "file.safetensors", **{"first_stage.whitening": "measured"}).shape == (8, 8, 8)


def _tensors(folder):
    return weights.files.open_tensors(folder)


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Two steps on a copy of the folder, the first of them in another call."""
    there = tmp_path_factory.mktemp("run")
    shutil.copytree(root / "folder", there / "vae")
    loop.train(config(there / "vae"), there / "run", quiet=True)
    return there


def test_a_run_trains_on_it_and_shares_its_cache(run):
    assert len(list((run / "vae" / "latents").glob("*/train/meta.json"))) == 1
    meta = checkpoint.restore_meta(run / "run", 2)
    restored = restore.restore(run / "run")
    stage = restored.model.stage
    assert (meta["facts"][facts.FIRST_STAGE], meta["facts"][facts.DECODER]) == (stage.sha256, stage.decoder)
    assert restored.model.shape == (8, 8, 4)


def test_a_moved_folder_is_the_same_and_another_is_refused(root, run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    there, run = run, tmp_path / "moved"
    file, place = run / "run" / "config.json", str(root / "alone.safetensors")
    shutil.rmtree(run / "run" / "checkpoints" / "2")
    loop.train(config(place), run / "run", quiet=True)
    kept = json.loads(file.read_text())
    assert kept["first_stage"]["workdir"] == place and restore.restore(run / "run").step == 2
    theirs, ours = (checkpoint.restore_params(path / "run", 2) for path in (there, run))
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)

    shutil.rmtree(run / "run" / "checkpoints" / "2")
    module, params = module_and_params(**KL)
    weights.save(tmp_path / "encoder", *module_and_params(seed=1, **KL))
    weights.save(tmp_path / "decoder", module, params | {"decoder": module_and_params(seed=1, **KL)[1]["decoder"]})
    weights.save(tmp_path / "scale", module.copy(scaling_factor=0.13025), params)
    for name, said in (
        ("encoder", "was trained with another first stage"),
        ("decoder", "was trained with another decoder of the first stage"),
        ("scale", r"was trained with another whitening std \(\[5\.49, .*\], now \[7\.67"),
    ):
        file.write_text(json.dumps(kept | {"first_stage": kept["first_stage"] | {"workdir": str(tmp_path / name)}}))
        with pytest.raises(ValueError, match=said):
            restore.restore(run / "run")
        with pytest.raises(ValueError, match=said):
            loop.train(config(tmp_path / name), run / "run", quiet=True)
        assert not (tmp_path / name / "latents").exists()
    drawn_with = [restore.restore(run / "run", first_stage=str(tmp_path / name)) for name in ("decoder", "scale")]
    assert all(np.array_equal(drawn.model.stage.std, np.full(4, 1 / SCALE)) for drawn in drawn_with)
    file.write_text(json.dumps(kept | {"first_stage": kept["first_stage"] | {"workdir": str(tmp_path / "gone")}}))
    with pytest.raises(FileNotFoundError, match="--first-stage=PLACE names where it lies now"):
        restore.restore(run / "run")


def test_convert_writes_it_back_bit_for_bit(run, tmp_path):
    for words, folder in (([], "out/vae"), (["--component=first_stage"], "out2")):
        assert cli.main(["convert", str(run / "run"), str(tmp_path / folder.split("/")[0]), *words]) == 0
        name = "diffusion_pytorch_model.safetensors"
        assert (tmp_path / folder / name).read_bytes() == (run / "vae" / name).read_bytes()
        read = [json.loads((path / "config.json").read_text()) for path in (tmp_path / folder, run / "vae")]
        assert read[0] == read[1]


def test_orbax_goes_back_to_the_folder(root, tmp_path, capsys):
    assert cli.main(["convert", str(root / "orbax"), str(tmp_path / "out")]) == 0
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (root / "folder" / name).read_bytes()
    assert cli.main(["convert", str(root / "orbax"), str(tmp_path / "again"), "--to=orbax"]) == 2
    assert "is what that wrote already" in capsys.readouterr().err


def test_measured_statistics_are_kept_in_the_run(root, tmp_path):
    c = experiment.parse(config(root / "folder", **{"first_stage.whitening": "measured"}))
    stage = open_stage.load(root / "folder", experiment=c, workdir=tmp_path)
    assert stage.mean.any() and np.array_equal(json.loads((tmp_path / "whitening.json").read_text())["std"], stage.std)
    assert stage.sha256 == stage_at(root / "folder").sha256
    assert not published.says(stage) and published.says(stage_at(root / "folder"))


def test_a_run_of_ours_in_orbax_keeps_its_whitening(tmp_path):
    loop.train(tiny.config(images=8, checkpoint_every=0), tmp_path / "vae", quiet=True)
    expected = open_stage.load(tmp_path / "vae")
    assert cli.main(["convert", str(tmp_path / "vae"), str(tmp_path / "orbax"), "--to=orbax"]) == 0
    stage = stage_at(tmp_path / "orbax", **{"input.resolution": 32})
    np.testing.assert_allclose(stage.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(stage.std, expected.std, rtol=1e-6)


CONFIG = """
from tests.training import tiny
def get_config(arg=''):
    c = tiny.config().copy_and_resolve_references().unlock()
    c.input.update(resolution=16, crop='adm')
    return c
"""


def test_it_is_encoded_with_and_evaluated(root, tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "images.py"
    file.write_text(CONFIG)
    encode = ["encode", f"--workdir={root / 'folder'}", f"--out={tmp_path / 'cache'}", "--quiet"]
    assert cli.main([*encode, f"--data={file}:train"]) == 0
    assert "64 latents of shape (8, 8, 4)" in capsys.readouterr().out
    evaluate = ["evaluate", f"--workdir={root / 'alone.safetensors'}", "--metrics=psnr,kl", "--num=4"]
    assert cli.main([*evaluate, f"--data={file}", f"--out={tmp_path / 'out'}"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["psnr"] > 0 and row["encoder"] == stage_at(root / "folder").sha256
    assert (tmp_path / "out" / "metrics.jsonl").is_file() and pathlib.Path(row["picture"]).is_file()
    for words, said in (
        ([*encode, "--data=train"], "is a published autoencoder, which has no data set; expected CONFIG.py:SPLIT"),
        (evaluate, "expected --data=CONFIG.py, whose reporting images it is shown, and --out=DIR"),
        ([*evaluate, "--ema=none"], "--ema goes with a run"),
        (
            ["sample", f"--workdir={root / 'folder'}", "--num=1", f"--out={tmp_path / 's'}"],
            "holds a published AutoencoderKL",
        ),
    ):
        assert cli.main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and said in error[0]


def test_a_start_of_other_shapes_names_the_first(root, tmp_path):
    c = tiny.config(images=8).copy_and_resolve_references().unlock()
    c.init_from.workdir = str(root / "orbax")
    said = (
        r"other parameters than this config's: decoder/conv_in/bias is \(32,\) there, \(4,\) here, and \d+ more differ"
    )
    with pytest.raises(ValueError, match=said):
        loop.train(c.lock(), tmp_path / "run", quiet=True)
