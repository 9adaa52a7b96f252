"""The weights of models.lpips, from two published files. Neither is part of this project.

ours              theirs
vgg/features_{i}  features.{i}      torchvision's vgg16, trained on ImageNet; its classifier.{i} are not read
heads_{i}         lin{i}.model.1    weights/v0.1/vgg.pth of the lpips package
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ldm_jax import models
from ldm_jax.models.lpips import LPIPS
from ldm_jax.weights import files, layout
from ldm_jax.weights.kinds import CONV2D, PIXEL
from ldm_jax.weights.layout import Row

VGG = (
    Row("features_{i}", "features.{i}", CONV2D),
    Row(None, "classifier.{i}.weight"),
    Row(None, "classifier.{i}.bias"),
)
HEADS = (Row("heads_{i}", "lin{i}.model.1", PIXEL),)
HOW = (
    "LPIPS takes two files: VGG16 as torchvision publishes it (vgg16-397923af.pth, its IMAGENET1K_V1) and the heads, "
    "weights/v0.1/vgg.pth of the lpips package (github.com/richzhang/PerceptualSimilarity)"
)


def _read(path: str | pathlib.Path, table: tuple[Row, ...], shapes: Mapping[str, Any]) -> dict[str, Any]:
    path = pathlib.Path(path)
    try:
        return layout.read(table, shapes, files.open_file(path), dtype="float32")
    except ValueError as error:
        named = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise ValueError(f"{named}. {HOW}") from None


def load(vgg: str | pathlib.Path, heads: str | pathlib.Path) -> tuple[LPIPS, dict[str, Any]]:
    """The files of VGG16 and of the heads -> (module, params), in f32. module.apply({'params': params}, x, y) gives distances.

    Each file is .safetensors, or one of torch.save, which is read without executing it. Raises ValueError naming a file that is missing
    or damaged, or in which a tensor is missing or has another shape; the message says where the files are published.
    """
    module = LPIPS()
    shapes = dict(models.shapes(module)["params"])
    return module, {"vgg": _read(vgg, VGG, shapes.pop("vgg"))} | _read(heads, HEADS, shapes)
