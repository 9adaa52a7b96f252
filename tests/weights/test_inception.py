"""The table from torch-fidelity's names, the folding of batch normalisation, and where the file is looked for.

The whole network is compared with torch-fidelity in tests/metrics.
"""

import functools
import hashlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax import models
from ldm_jax.models.inception import InceptionV3, preprocess
from ldm_jax.weights import inception


@functools.cache
def random_state():
    """A state dict in torch-fidelity's layout, read off our own tree of shapes. Not to be written to."""
    generator = np.random.default_rng(0)

    def normal(scale, shape):
        return generator.standard_normal(shape, np.float32) * np.float32(scale)

    shapes = models.shapes(InceptionV3(("logits",)))["params"]
    state = {"fc.weight": normal(0.02, (1008, 2048)), "fc.bias": normal(1, 1008)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = ".".join(entry.key for entry in path)
        if name.endswith("conv.kernel"):
            layer = name.removesuffix(".conv.kernel")
            h, w, i, o = leaf.shape
            state[f"{layer}.conv.weight"] = normal((2 / (h * w * i)) ** 0.5, (o, i, h, w))
            state[f"{layer}.bn.weight"] = generator.uniform(0.5, 1.5, o)
            state[f"{layer}.bn.bias"] = normal(0.1, o)
            state[f"{layer}.bn.running_mean"] = normal(0.1, o)
            state[f"{layer}.bn.running_var"] = generator.uniform(0.5, 1.5, o)
            state[f"{layer}.bn.num_batches_tracked"] = np.int64(1)
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


@pytest.fixture(scope="module")
def state():
    return random_state()


def test_published_architecture(state):
    """94 convolutions, and as many learned numbers as torchvision's inception_v3 without its auxiliary head."""
    learned = [v for k, v in state.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert sum(name.endswith("conv.weight") for name in state) == 94
    # 23,834,568 for 1000 classes; the graph of 2015 has 1008.
    assert sum(v.size for v in learned) == 23834568 + 8 * 2049


@pytest.mark.oracle
def test_stem_equals_torch(state):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    network = InceptionV3(("64",))
    run = jax.jit(lambda params, images: network.apply({"params": params}, images)["64"])
    ours = run(inception.from_torch(state), images)
    x = torch.from_numpy(np.array(jax.jit(preprocess)(images)).transpose(0, 3, 1, 2))
    for layer, stride, padding in (("Conv2d_1a_3x3", 2, 0), ("Conv2d_2a_3x3", 1, 0), ("Conv2d_2b_3x3", 1, 1)):
        w = {k.removeprefix(f"{layer}."): torch.from_numpy(v) for k, v in state.items() if k.startswith(f"{layer}.")}
        x = functional.conv2d(x, w["conv.weight"], stride=stride, padding=padding)
        norm = (w["bn.running_mean"], w["bn.running_var"], w["bn.weight"], w["bn.bias"])
        x = functional.relu(functional.batch_norm(x, *norm, eps=1e-3))
    theirs = functional.max_pool2d(x, 3, 2).mean((2, 3)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_files_of_both_kinds(tmp_path, state, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    first, digest = inception.load(tmp_path / "a.pth")
    assert digest == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    monkeypatch.setenv("LDM_INCEPTION", str(tmp_path / "a.safetensors"))
    second, _ = inception.load()
    jax.tree.map(np.testing.assert_array_equal, first, second)
    (tmp_path / "b.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"b\.safetensors: not a \.safetensors file"):
        inception.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_6c.branch7x7_2.bn.bias"), r"Mixed_6c\.branch7x7_2\.bn\.bias is missing"),
        (lambda s: s.update({"AuxLogits.fc.weight": np.zeros(3)}), r"AuxLogits\.fc\.weight and 0 more entries"),
        (lambda s: s.update({"fc.weight": s["fc.weight"][:1000]}), r"fc_kernel is \(2048, 1000\), expected"),
        (lambda s: s.update({"fc.bias": s["fc.bias"] * np.nan}), "fc_bias is not finite"),
    ],
)
def test_wrong_files_are_named(state, change, message):
    state = dict(state)
    change(state)
    with pytest.raises(ValueError, match=message):
        inception.from_torch(state)


def test_without_weights_the_error_says_how(tmp_path, monkeypatch):
    monkeypatch.delenv("LDM_INCEPTION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"not here: fetch https://github\.com/toshas/torch-fidelity.* LDM_INCEPTION"):
        inception.load()
    monkeypatch.setenv("LDM_INCEPTION", "/nowhere/a.pth")
    with pytest.raises(ValueError, match=r"\(LDM_INCEPTION\): no file /nowhere/a\.pth"):
        inception.load()


def test_download_checks_what_came(tmp_path, monkeypatch):
    (tmp_path / "source.pth").write_bytes(b"something else")
    url = (tmp_path / "source.pth").as_uri()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="expected one that begins with 6726825d"):
        inception.download(url)
    with pytest.raises(ValueError, match="cannot be fetched"):
        inception.download((tmp_path / "none.pth").as_uri())
    assert list((tmp_path / "cache" / "ldm_jax").iterdir()) == []
    digest = hashlib.sha256(b"something else").hexdigest()
    monkeypatch.setattr(inception, "SHA256_PREFIX", digest[:8])
    assert inception.download(url) == inception.cached_path()
    assert inception.find() == inception.cached_path()
