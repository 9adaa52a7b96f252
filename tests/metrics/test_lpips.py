"""LPIPS against the lpips package, with its published heads, and against torch-fidelity: one random VGG16 for all."""

import pathlib

import jax
import numpy as np
import pytest

from ldm_jax.weights import lpips

pytestmark = [pytest.mark.oracle, pytest.mark.slow]


@pytest.fixture
def files(tmp_path, monkeypatch, torchvision_operators):
    """A random VGG16 in a file, the package's heads; whoever asks torchvision for VGG16 meanwhile gets that one."""
    import lpips as theirs
    import torch
    from torchvision.models import vgg

    torch.manual_seed(0)
    network = torch.nn.Module()
    network.features = vgg.make_layers(vgg.cfgs["D"])
    for name, parameter in network.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.kaiming_normal_(parameter)
        else:
            parameter.data = 0.1 * torch.randn_like(parameter)
    torch.save(network.state_dict(), tmp_path / "vgg16.pth")
    monkeypatch.setattr("torchvision.models.vgg16", lambda pretrained: network)
    return tmp_path / "vgg16.pth", pathlib.Path(theirs.__file__).parent / "weights/v0.1/vgg.pth"


def pairs():
    """u8[3, 40, 35, 3] twice: the second is the first with noise, shifted, and another."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (3, 40, 35, 3), np.uint8)
    noisy = np.clip(x[:1] + random.normal(0, 20, x[:1].shape), 0, 255).astype(np.uint8)
    return x, np.concatenate([noisy, np.roll(x[1:2], 2, 1), x[:1]])


def test_equals_the_package_and_torch_fidelity(files, monkeypatch):
    import lpips as package
    import torch
    from torch_fidelity import sample_similarity_lpips as fidelity
    from torchvision import models

    module, params = lpips.load(*files)
    images = pairs()
    x, y = (image.astype(np.float32) / 127.5 - 1 for image in images)
    weight = np.array([1.0, -2.0, 0.5], np.float32)

    @jax.jit
    def run(params, x, y):
        found, pull = jax.vjp(lambda x, y: module.apply({"params": params}, x, y), x, y)
        return found, pull(weight)

    found, gradients = run(params, x, y)
    original = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    theirs = [torch.tensor(image).permute(0, 3, 1, 2).requires_grad_() for image in (x, y)]
    expected = original(*theirs)[:, 0, 0, 0]
    assert expected.min() > 0.01 and expected.std() > 0.02
    print(f"LPIPS {found}: difference {np.abs(found - expected.detach().numpy()).max():.1e}")
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5, rtol=0)
    for g, e in zip(gradients, torch.autograd.grad((torch.tensor(weight) * expected).sum(), theirs)):
        e = e.permute(0, 2, 3, 1).numpy()
        print(f"gradient: relative error {np.abs(g - e).max() / np.abs(e).max():.1e}")
        assert np.abs(g - e).max() < 1e-4 * np.abs(e).max()

    monkeypatch.setattr(fidelity, "torchvision_load_pretrained_vgg16", lambda: models.vgg16(pretrained=False))
    monkeypatch.setattr(
        fidelity, "load_state_dict_from_url", lambda url, map_location, **_: torch.load(files[1], map_location)
    )
    similarity = fidelity.SampleSimilarityLPIPS("lpips-vgg16")
    expected = similarity(*(torch.tensor(image).permute(0, 3, 1, 2) for image in images))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
