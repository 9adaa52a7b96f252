"""Extractors: batches, padding, sharding, one compile, and which figure may be called FID."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.evaluation import features

ROOT = pathlib.Path(__file__).parents[2]
KERNEL = np.random.default_rng(0).normal(size=(4 * 4 * 3, 5)).astype(np.float32)


def network(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params["kernel"])


def images(n, side=4):
    return np.random.default_rng(n).integers(0, 256, (n, side, side, 3), np.uint8)


def expected(pixels):
    return np.tanh((pixels.reshape(len(pixels), -1) / 127.5 - 1) @ KERNEL)


def test_any_number_of_images_is_one_compile():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return network(params, x)

    extractor = features.classifier(counted, {"kernel": KERNEL}, dim=5, resolution=4, batch=8)
    for n in (1, 8, 9, 20):
        out = extractor.apply(images(n))
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected(images(n)), rtol=1e-4, atol=1e-5)
    assert traces == [(8, 4, 4, 3)]


def sharded():
    """Run in a process of two devices by the test below."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    extractor = features.classifier(network, {"kernel": KERNEL}, dim=5, resolution=4, batch=3)
    out = extractor.apply(jax.device_put(images(8), sharding))
    assert out.sharding.is_equivalent_to(sharding, 2), out.sharding
    np.testing.assert_allclose(out, expected(images(8)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(extractor.apply(images(8)), out, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sharded_images_stay_sharded():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "from tests.evaluation import test_features; test_features.sharded()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_identity_of_weights():
    params = {"kernel": KERNEL, "deep": [np.zeros(2), np.ones(3, np.int32)]}
    same = {"deep": [jnp.zeros(2), jnp.ones(3, jnp.int32)], "kernel": jnp.asarray(KERNEL)}
    digest = features.params_sha256(jax.tree.map(jnp.asarray, params))
    assert digest == features.params_sha256(same)
    changed = KERNEL.copy()
    changed[-1, -1] += 1e-6
    for other in (same | {"kernel": changed}, same | {"kernel": KERNEL.T}, {"b": same["kernel"], "deep": same["deep"]}):
        assert features.params_sha256(other) != digest
    assert features.classifier(network, same, dim=5, resolution=4).sha256 == digest


def test_only_inception_makes_fid():
    extractor = features.classifier(network, {"kernel": KERNEL}, dim=5, resolution=4)
    assert features.figure_name(extractor) == "fd_classifier"
    assert features.figure_name(extractor._replace(name="inception")) == "fid"
    assert features.figure_name(extractor._replace(name="inception_192")) == "fd_inception_192"
    for name in ("inception", "inception_mine", "a b"):
        with pytest.raises(ValueError, match="an extractor cannot be called"):
            features.classifier(network, {}, dim=5, resolution=4, name=name)


def test_inception_from_a_file(tmp_path):
    from safetensors.numpy import save_file

    from tests.weights.test_inception import random_state

    save_file(random_state(), tmp_path / "a.safetensors")
    extractor = features.NAMES["inception"](tmp_path / "a.safetensors", feature="64", batch=4)
    assert (extractor.name, extractor.dim, extractor.resolution) == ("inception_64", 64, 299)
    five = images(5, 16)
    out = extractor.apply(five)
    assert out.shape == (5, 64) and out.std(0).min() > 0
    np.testing.assert_allclose(extractor.apply(five[4:]), out[4:], rtol=1e-5)


def test_refusals(monkeypatch, tmp_path):
    extractor = features.classifier(network, {"kernel": KERNEL}, dim=5, resolution=4)
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
