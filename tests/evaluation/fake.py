"""Made-up images, an extractor without a network, and a case of them: nothing here is trained or drawn."""

import numpy as np

from ldm_jax.evaluation import images as sources
from ldm_jax.evaluation.features import Extractor
from ldm_jax.evaluation.metrics import Case, Settings
from ldm_jax.training import experiment
from tests.training import tiny

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(70) % 3
MIX = RNG.normal(size=(48, 6)).astype(np.float32)


def extractor(name="classifier", runs=None):
    """Features of 4 x 4 means, without a network; `runs` counts the images that went through."""

    def outputs(pixels):
        pixels = np.asarray(pixels)
        if runs is not None:
            runs.append(len(pixels))
        side = pixels.shape[1] // 4
        means = pixels.reshape(len(pixels), 4, side, 4, side, 3).mean((2, 4)).reshape(len(pixels), 48)
        features = np.einsum("nk,kd->nd", means / 255, MIX).astype(np.float32)  # by itself, whatever the batch
        return {"features": features, "logits": features[:, :3], "spatial": features[:, ::-1]}

    return Extractor(name, 6, f"sha-of-{name}", 16, outputs)


def images(pixels=PIXELS, labels=None, size=32, **more):
    def batches():
        for start in range(0, len(pixels), size):
            part = {"image": pixels[start : start + size]}
            yield part if labels is None else part | {"label": labels[start : start + size]}

    holds = frozenset({"image"} if labels is None else {"image", "label"})
    return sources.Images(batches, len(pixels), {"images": "made up"}, holds, 0 if labels is None else 3, **more)


def config():
    return experiment.parse(tiny.config())


def case(tmp_path, made, names=("classifier",), options=None, **settings):
    settings = {"reference": "split:test", "quiet": True, **settings}
    settings = Settings(folder=tmp_path / "s", pictures=tmp_path / "p", **settings)
    return Case(made, config(), {name: extractor(name) for name in names}, settings, {"draws": 40, **(options or {})})
