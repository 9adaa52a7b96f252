"""LPIPS against torch's own layers with the same random VGG16, read from files as torchvision and lpips write them.

The lpips package itself, with the published heads, is in tests/metrics.
"""

import jax
import numpy as np
import pytest
import torch
from torch import nn

from ldm_jax.weights import lpips

pytestmark = pytest.mark.oracle

WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
# relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
TAPS = (3, 8, 15, 22, 29)


def vgg() -> nn.Sequential:
    layers, channels = [], 3
    for width in WIDTHS:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        # Of a size that keeps the activations near 1 through all layers.
        nn.init.kaiming_normal_(layers[-2].weight)
        layers[-2].bias.data = 0.1 * torch.randn(width)
        channels = width
    return nn.Sequential(*layers)


def their_distance(layers: nn.Sequential, heads: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((image - shift[:, None, None]) / scale[:, None, None] for image in (x, y))
    total = 0
    for i, layer in enumerate(layers):
        x, y = layer(x), layer(y)
        if i in TAPS:
            a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
            total = total + nn.functional.conv2d((a - b).square(), heads[TAPS.index(i)]).mean((1, 2, 3))
    return total


def test_equals_torch(tmp_path):
    torch.manual_seed(0)
    layers = vgg()
    heads = [torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512)]
    classifier = {"classifier.0.weight": torch.zeros(4, 8), "classifier.0.bias": torch.zeros(4)}
    torch.save({f"features.{k}": v for k, v in layers.state_dict().items()} | classifier, tmp_path / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, tmp_path / "heads.pth")
    module, params = lpips.load(tmp_path / "vgg16.pth", tmp_path / "heads.pth")

    random = np.random.default_rng(0)
    x, y = random.uniform(-1, 1, (2, 2, 16, 18, 3)).astype(np.float32)
    weight = np.array([1.0, -2.0], np.float32)
    theirs = [torch.tensor(image).permute(0, 3, 1, 2).requires_grad_() for image in (x, y)]
    expected = their_distance(layers, heads, *theirs)
    slope = torch.autograd.grad((torch.tensor(weight) * expected).sum(), theirs[1])[0].permute(0, 2, 3, 1).numpy()

    @jax.jit
    def run(params, x, y):
        distances, pull = jax.vjp(lambda y: module.apply({"params": params}, x, y), y)
        return distances, pull(weight)[0]

    distances, got = run(params, x, y)
    assert expected.min() > 0.1
    np.testing.assert_allclose(distances, expected.detach(), atol=1e-5, rtol=0)
    assert np.abs(got - slope).max() < 1e-4 * np.abs(slope).max()
