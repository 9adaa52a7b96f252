"""All that evaluation does on devices: reconstructions, features, a reference, drawn images, bits a dimension."""

import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

from ldm_jax.data import pipeline
from ldm_jax.diffusion.process import flow
from ldm_jax.evaluation import bits, evaluate, features, generate, reconstructions
from ldm_jax.evaluation.metrics import Case, Settings
from ldm_jax.training import conditioning, experiment, restore, sampling
from ldm_jax.training.experiment import Experiment
from tests.training import tiny


def pixels(params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """A few pixels as features: the same to the last bit in any batch."""
    return {"features": x[:, ::16, ::16, 1].reshape(len(x), -1)}


class White:
    """A denoiser without weights: exact where images are Gaussian, each pixel by itself, of deviation 1 / 4."""

    def apply(self, variables, x, t, cond):
        t = t.reshape(-1, 1, 1, 1) / 1000  # the time input that flow() gives to a network
        return x * ((1 - t) / 16) / (((1 - t) / 4) ** 2 + t**2)


def watched(function: Callable, sizes: list[int]) -> Callable:
    """`function`, noting how much of its last argument each device has."""

    def wrapped(*args):
        x = args[-1]
        jax.debug.inspect_array_sharding(x, callback=lambda sharding: sizes.append(sharding.shard_shape(x.shape)[0]))
        return function(*args)

    return wrapped


def figures(workdir: pathlib.Path, out: pathlib.Path, name: str) -> dict[str, Any]:
    """Of the tiny run in `workdir`; statistics are shared in `out`, pictures are those of the process `name`."""
    parsed, sizes, decoded, crop = experiment.parse(tiny.config()), [], [], pipeline.crop_image

    def counted(*args):
        decoded.append(1)
        return crop(*args)

    with mock.patch.object(pipeline, "crop_image", counted):
        with mock.patch.object(reconstructions, "from_uint8", watched(reconstructions.from_uint8, sizes)):
            row = first_stage(parsed, workdir, out, name)
        with mock.patch.object(bits.likelihood, "dequantise", watched(bits.likelihood.dequantise, sizes)):
            row |= diffusion(parsed)
    return row | {"images of a device": sizes, "decoded": len(decoded)}


def first_stage(parsed: Experiment, workdir: pathlib.Path, out: pathlib.Path, name: str) -> dict[str, Any]:
    made = reconstructions.of_run(workdir, parsed, 12, None, 30)
    networks = {"own": features.own(pixels, {}, dim=4, resolution=32, batch=20)}
    settings = Settings("split:test", out, out / name, subset=25, quiet=True)
    case = Case(made, parsed, networks, settings, {"draws": 0})
    return evaluate.measure(case, ["psnr", "rfid", "kl", "latents"])


def diffusion(parsed: Experiment) -> dict[str, Any]:
    model = sampling.Model(White(), conditioning.Conditioning(), None, flow(), "x", (32, 32, 3))
    run = restore.Restored(parsed, model, {"denoiser": {"w": np.ones(3, np.float32)}}, {}, 1, "", {})
    settings = sampling.Settings("euler", steps=2)
    drawn = generate.draw(run, settings, generate.Asked(), count=5, seed=1, tokenizer=None, batch_size=3, quiet=True)
    means = np.concatenate([*drawn]).mean((1, 2, 3)).tolist()
    return {"drawn": means, **bits.bits(run, num=5, steps=2, seed=1)}
