"""The two files of LPIPS: what is read, and what is said of files that do not fit. Numbers are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax.models.lpips import LPIPS
from ldm_jax.weights import layout, lpips


@pytest.fixture(scope="module")
def states():
    """State dicts of VGG16 and of the heads by their published names; every tensor holds one number of its own."""
    x = jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), x, x)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    params = tree.unflatten([np.full(leaf.shape, k, np.float16) for k, leaf in enumerate(leaves)])
    vgg = layout.write(lpips.VGG, params.pop("vgg"))
    return vgg | {"classifier.6.bias": np.zeros(9, np.float16)}, layout.write(lpips.HEADS, params)


def test_names_and_layout(tmp_path, states):
    vgg, heads = states
    assert [n for n in vgg if n.endswith("weight")][:3] == [
        "features.0.weight",
        "features.10.weight",
        "features.12.weight",
    ]
    assert len(vgg) == 27 and vgg["features.28.weight"].shape == (512, 512, 3, 3)
    assert {n: h.shape for n, h in heads.items()} == {
        f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))
    }
    save_file(vgg, tmp_path / "vgg.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    module, params = lpips.load(tmp_path / "vgg.safetensors", str(tmp_path / "heads.safetensors"))
    assert module == LPIPS()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert np.all(params["vgg"]["features_5"]["kernel"] == vgg["features.5.weight"][0, 0, 0, 0])
    assert np.all(params["heads_3"]["kernel"] == heads["lin3.model.1.weight"][0, 0, 0, 0])


PUBLISHED = r"torchvision publishes it \(vgg16-397923af.pth, .* weights/v0.1/vgg.pth of the lpips package"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, h: v.pop("features.28.bias"), r"vgg\.safetensors: .*1 missing: features\.28\.bias\. LPIPS takes"),
        (lambda v, h: v.update({"features.30.bias": v["features.0.bias"]}), "1 not of this network: features.30.bias"),
        (
            lambda v, h: h.update({"lin4.model.1.weight": h["lin0.model.1.weight"]}),
            r"heads\.safetensors: .*lin4\.model\.1\.weight \[1, 64, 1, 1\] \(expected \[1, 512, 1, 1\]\)",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, states, change, message):
    vgg, heads = map(dict, states)
    change(vgg, heads)
    save_file(vgg, tmp_path / "vgg.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match=f"{message}.*{PUBLISHED}" if "LPIPS" not in message else message):
        lpips.load(tmp_path / "vgg.safetensors", tmp_path / "heads.safetensors")


def test_missing_and_exchanged_files(tmp_path, states):
    with pytest.raises(ValueError, match=rf"vgg16\.pth: no such file.*{PUBLISHED}"):
        lpips.load(tmp_path / "vgg16.pth", tmp_path / "heads.pth")
    save_file(states[1], tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/heads\.safetensors: .*26 missing: features.*{PUBLISHED}"):
        lpips.load(tmp_path / "heads.safetensors", tmp_path / "heads.safetensors")
