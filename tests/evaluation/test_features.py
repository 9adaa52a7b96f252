"""Extractors: batches, padding, several devices, one compile, several outputs of one run, and which figure may be called FID."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10_classifier
from ldm_jax.evaluation import features, fid
from ldm_jax.runs import checkpoint
from ldm_jax.training import experiment
from ldm_jax.weights.tree_hash import tree_sha256
from tests.weights.test_inception import random_state

ROOT = pathlib.Path(__file__).parents[2]
KERNEL = np.random.default_rng(0).normal(size=(4 * 4 * 3, 5)).astype(np.float32)


def network(params, x):
    features = jnp.tanh(x.reshape(len(x), -1) @ params["kernel"])
    return {"features": features, "logits": features[:, :2] - 1}


def images(n, side=4):
    return np.random.default_rng(n).integers(0, 256, (n, side, side, 3), np.uint8)


def expected(pixels):
    return np.tanh((pixels.reshape(len(pixels), -1) / 127.5 - 1) @ KERNEL)


def test_any_number_of_images_is_one_compile():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return network(params, x)

    extractor = features.own(counted, {"kernel": KERNEL}, dim=5, resolution=4, batch=8)
    for n in (1, 8, 9, 20):
        out = extractor.outputs(images(n))
        assert out["features"].dtype == np.float32
        np.testing.assert_allclose(out["features"], expected(images(n)), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(out["logits"], out["features"][:, :2] - 1)
        np.testing.assert_array_equal(extractor.apply(images(n)), out["features"])
    assert traces == [(8, 4, 4, 3)]


def on_four_devices():
    """Run in a process of four devices by the test below: a batch of 6 is one of 8, two images a device."""
    shards = []

    def watched(params, x):
        jax.debug.inspect_array_sharding(x, callback=lambda s: shards.append(s.shard_shape(x.shape)))
        return network(params, x)

    extractor = features.own(watched, {"kernel": KERNEL}, dim=5, resolution=4, batch=6)
    for n in (3, 19):
        out = extractor.outputs(images(n))
        assert {type(value) for value in out.values()} == {np.ndarray}
        np.testing.assert_allclose(out["features"], expected(images(n)), rtol=1e-4, atol=1e-5)
    assert shards == [(2, 4, 4, 3)], shards

    prepared = []

    def prepare(x):
        prepared.append(len(x))
        return features.resized(x, 9)

    resized = features.batched(lambda _, x: x.astype(jnp.float32).mean((1, 2)), (), 3, prepare=prepare)
    np.testing.assert_allclose(resized(images(7)), features.resized(images(7), 9).mean((1, 2)), rtol=1e-6)
    assert prepared == [1] * 8


@pytest.mark.slow
def test_four_devices_share_each_batch():
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", "from tests.evaluation import test_features; test_features.on_four_devices()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_identity_of_weights():
    params = {"kernel": KERNEL, "deep": [np.zeros(2), np.ones(3, np.int32)]}
    same = {"deep": [jnp.zeros(2), jnp.ones(3, jnp.int32)], "kernel": jnp.asarray(KERNEL)}
    digest = tree_sha256(jax.tree.map(jnp.asarray, params))
    assert digest == tree_sha256(same)
    changed = KERNEL.copy()
    changed[-1, -1] += 1e-6
    for other in (same | {"kernel": changed}, same | {"kernel": KERNEL.T}, {"b": same["kernel"], "deep": same["deep"]}):
        assert tree_sha256(other) != digest
    assert features.own(network, same, dim=5, resolution=4).sha256 == digest


def test_only_inception_makes_fid():
    extractor = features.own(network, {"kernel": KERNEL}, dim=5, resolution=4)
    assert fid.figure_name(extractor.name) == "fd_own"
    assert fid.figure_name("inception") == "fid"
    assert fid.figure_name("inception_192") == "fd_inception_192"
    for name in ("inception", "inception_mine", "a b"):
        with pytest.raises(ValueError, match="an extractor cannot be called"):
            features.own(network, {}, dim=5, resolution=4, name=name)


def test_inception_from_a_file(tmp_path):
    from safetensors.numpy import save_file

    save_file(random_state(), tmp_path / "a.safetensors")
    extractor = features.NAMES["inception"](tmp_path / "a.safetensors", feature="64", batch=4)
    assert (extractor.name, extractor.dim, extractor.resolution) == ("inception_64", 64, 299)
    five = images(5, 16)
    out = extractor.apply(five)
    assert out.shape == (5, 64) and out.std(0).min() > 0
    np.testing.assert_allclose(extractor.apply(five[4:]), out[4:], rtol=1e-5)

    # What FID, sFID and the inception score take, of one run.
    out = features.inception(tmp_path / "a.safetensors", batch=1).outputs(five[:1])
    assert {name: value.shape for name, value in out.items()} == {
        "features": (1, 2048),
        "spatial": (1, 2023),
        "logits": (1, 1008),
    }
    unbiased = out["features"] @ random_state()["fc.weight"].T
    np.testing.assert_allclose(out["logits"], unbiased, atol=1e-4 * np.abs(unbiased).max())


def test_names(monkeypatch):
    """`name[:WHERE]`, of which WHERE may hold colons."""
    monkeypatch.setattr(features, "NAMES", {name: lambda where, name=name: (name, where) for name in features.NAMES})
    assert features.named("inception") == ("inception", "")
    assert features.named("clip:hub:openai/clip-vit-large-patch14") == ("clip", "hub:openai/clip-vit-large-patch14")
    for what in ("classifier", "dinov2:", "resnet:somewhere", ""):
        with pytest.raises(
            ValueError, match=rf"features '{what}'; expected inception\[:FILE\|:download\], classifier:DIR"
        ):
            features.named(what)


def test_a_trained_classifier(monkeypatch, tmp_path):
    """The features and the logits of a run's own network, from one application of it; the checkpoint is read elsewhere."""
    config = cifar10_classifier.get_config("smoke")
    network = experiment.parse(config).network
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    averages = {(7, experiment.parse(config).average): {"classifier": params}}
    monkeypatch.setattr(checkpoint, "pick", lambda folder, step: 7)
    monkeypatch.setattr(checkpoint, "restore_params", lambda folder, step, ema: averages[step, ema])
    monkeypatch.setattr(checkpoint, "identity", lambda folder, step: f"{folder.name} {step}")
    extractor = features.named(f"classifier:{tmp_path}")
    pixels = images(3, 32)
    logits, result = jax.jit(network.apply)({"params": params}, pixels / np.float32(127.5) - 1)
    assert (extractor.name, extractor.dim, extractor.resolution) == ("classifier", 16, 32)
    assert extractor.sha256 == f"{tmp_path.name} 7"
    out = extractor.outputs(pixels)
    np.testing.assert_allclose(out["features"], result, atol=1e-4)
    np.testing.assert_allclose(out["logits"], logits, atol=1e-4)
    config.task.name = "autoencoder"
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    with pytest.raises(ValueError, match="holds a run of the task 'autoencoder'; expected 'classifier'"):
        features.classifier(tmp_path)


def test_refusals(monkeypatch, tmp_path):
    extractor = features.own(network, {"kernel": KERNEL}, dim=5, resolution=4)
    with pytest.raises(ValueError, match="images of 8x8, expected 4x4"):
        extractor.apply(images(2, 8))
    with pytest.raises(ValueError, match=r"float32\[2, 4, 4, 3\], expected uint8"):
        extractor.apply(images(2).astype(np.float32))
    with pytest.raises(ValueError, match="no images"):
        extractor.apply(images(2)[:0])
    with pytest.raises(ValueError, match="unknown Inception feature 'pool'"):
        features.inception(feature="pool")
    monkeypatch.delenv("LDM_INCEPTION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="FID needs the weights of Inception-V3"):
        features.inception()
