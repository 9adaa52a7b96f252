"""Every config builds, has a smoke variant that trains, and holds no key that nothing reads."""

import argparse
import json
import math
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from ldm_jax import models
from ldm_jax.cli import evaluate
from ldm_jax.config import config_file
from ldm_jax.evaluation import table
from ldm_jax.kernels import mesh
from ldm_jax.training import blocks, build, check, experiment, frozen_networks, loop, streams
from ldm_jax.weights import files, hub

NAMES = sorted(
    p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py") if p.stem not in ("base", "__init__")
)
KINDS = set()  # of configs whose validation and pictures were traced
# Blocks that go whole, as keywords, to the constructor they name: there a key that nothing reads raises by itself.
CONSTRUCTORS = {"task", "model", "data", "process", "tokenizer", "text", "optimizer"}


def load(name):
    """The smoke config of NAME or NAME:WORD, on shapes where its own images are not at hand."""
    name, _, word = name.partition(":")
    config = config_file.load(f"configs/{name}.py:" + (f"{word},smoke" if word else "smoke"))
    if config.data.name == "zip":
        with config.unlocked():
            config.data = {"name": "shapes", "size": 64}
            config.input.flip = False
            for key, value in (("num_classes", 4), ("num_class_embeds", 5)):
                if key in config.model:
                    config.model[key] = value
    return config


# Of stabilityai/sd-vae-ft-ema, but for keys that have their defaults.
STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """The hub without a network: what is fetched is Stable Diffusion's autoencoder, without its weights."""
    (tmp_path / "config.json").write_text(json.dumps(STABLE_DIFFUSION))
    files.write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", {})
    monkeypatch.setattr(
        hub, "resolve", lambda path, wanted=(): tmp_path if str(path).startswith("hub:") else pathlib.Path(path)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_it_is(name, fetched):
    text = (pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py").read_text()
    doc = text.split('"""')[1]
    for word in (f"ldm train --config=configs/{name}.py", "ldm evaluate --workdir=", "Expected"):
        assert word in doc, "its commands and its figure stand in the docstring"
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    for line in doc.replace("\\\\\n", " ").splitlines():
        if line.strip().startswith("ldm evaluate"):
            args, rest = parser.parse_known_args(line.split()[2:])
            assert not rest and all(metric in table.METRICS for metric in args.metrics.split(","))
    config = config_file.load(f"configs/{name}.py")
    check.check(config)
    assert config.train.images > config_file.load(f"configs/{name}.py:smoke").train.images


def test_the_published_dit_has_its_published_size():
    """675,129,632 numbers in the published code's state dict, of which 256 x 1152 are its fixed table of positions."""
    config = config_file.load("configs/imagenet256_dit_xl2.py")
    shapes = models.shapes(experiment.parse(config).network, (32, 32, 4))["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 675_129_632 - 256 * 1152


def test_each_process_of_score_matching_is_a_word():
    for word in ("ve", "vp", "sub_vp"):
        process = experiment.parse(config_file.load(f"configs/cifar10_score.py:{word}")).process
        assert process.t_min == (0 if word == "ve" else 1e-5), word
    with pytest.raises(ValueError, match="'vpp' after the colon; there are ve, vp, sub_vp, smoke"):
        config_file.load("configs/cifar10_score.py:vpp")


@pytest.mark.parametrize("name", [*NAMES, "cifar10_score:vp", "cifar10_score:sub_vp"])
def test_a_batch_of_the_smoke_variant_fits_all_that_is_compiled(name):
    """Step, validate and pictures take a batch of its data, as shapes. test_spine.py trains the quickstart's."""
    config = load(name)
    with config.unlocked():
        config.first_stage.cache = False
    parsed, state = check.check(config)
    stage, (train, tune), device_mesh = check.stage_of(parsed), build.sources(parsed), mesh.make_mesh()
    task = build.task(parsed, build.context(parsed, stage, train.num_classes, load=frozen_networks.load))
    batch, rows = next(streams.training(parsed, train)(0)), parsed.train.batch_size
    assert {len(x) for x in batch.values()} == {rows}
    after, metrics = jax.eval_shape(task.step, state, task.frozen, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "grad_norm"} & metrics.keys() and all(x.shape == () for x in metrics.values())
    # One config is enough of those that are validated and drawn alike.
    kind = (
        config.task.name,
        config.model.name,
        config.process.name,
        config.sampler.name,
        stage is None,
        *parsed.condition,
    )
    if kind in KINDS:
        return
    KINDS.add(kind)
    key = jax.eval_shape(lambda: jax.random.key(0))
    errors = jax.eval_shape(task.validate, state.params, task.frozen, batch, key)
    assert errors and all(x.shape == (rows,) for x in errors.values())
    if task.pictures:
        shown = streams.for_pictures(parsed, tune, device_mesh)[0]
        images = jax.eval_shape(task.pictures, state.params, task.frozen, shown, key)
        side = parsed.input.resolution
        assert images and all(x.shape[1:] == (side, side, 3) for x in images.values())


def test_every_key_is_read():
    """Each key of base.py outside the constructors' blocks is a field of Experiment, and each field is read somewhere in training/."""
    base, parsed = config_file.base(), experiment.parse(config_file.load("configs/quickstart.py"))
    root = pathlib.Path(experiment.__file__).parent
    code = "\n".join(p.read_text() for p in root.rglob("*.py") if p.name != "experiment.py")
    # Read in a loop over names in loop._intervals, and by role in streams.source.
    assert 'getattr(train, f"{name}_every")' in code and "getattr(experiment.split, role)" in code
    looped = {"validate_every", "pictures_every", "checkpoint_every", *base.split}
    for block in ("split", "input", "first_stage", "init_from", "train", "mesh"):
        fields = getattr(parsed, block)._fields
        assert set(fields) == set(base[block]), block
        assert not [name for name in fields if f".{name}" not in code and name not in looped], block
    assert {*parsed.sampler._fields, "batch_size"} == set(base.sampler)
    rest = {"precision", "ema", "sampler", "seed", "condition"} | CONSTRUCTORS
    assert {*rest, "split", "input", "first_stage", "init_from", "train", "mesh"} == set(base)


def test_a_misspelt_key_in_a_constructors_block_is_named(tmp_path):
    for block, said in (
        ("model", "config.model"),
        ("data", "config.data"),
        ("optimizer", "optimizer"),
        ("task", "config.task"),
    ):
        config = config_file.load("configs/quickstart_vae.py:smoke")
        with config.unlocked():
            config[block]["typo"] = 1
        with pytest.raises(ValueError, match=said):
            loop.train(config, tmp_path / block, quiet=True)


def test_base_blocks_are_config_dicts():
    assert isinstance(config_file.load("configs/quickstart.py").train, ConfigDict)


@pytest.mark.parametrize(
    "learned, channels, words",
    [
        (True, None, "out_channels=None, but 3 channels are modelled .* expected 6"),
        (False, 6, "learned_variance is False, so expected 3"),
        (True, 6, "needs a process with a table"),
    ],
)
def test_a_network_of_the_wrong_width_for_its_variance_is_refused(learned, channels, words):
    config = config_file.load("configs/cifar10_dit_pixel.py:smoke")
    with config.unlocked():
        config.task.learned_variance, config.model.out_channels = learned, channels
    with pytest.raises(ValueError, match=words):
        parsed = experiment.parse(config)
        context = build.context(parsed, None, config.model.num_classes)
        blocks.kind_of(parsed).model(context, **parsed.task.options)
