"""Data that is no image: a source of signals f32[N, C], trained by the diffusion task and drawn, against the Gaussian that they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from ldm_jax import models
from ldm_jax.data import SOURCES
from ldm_jax.sampling import draw, keys
from ldm_jax.sampling.settings import Rule
from ldm_jax.training import check, drawable, loop, restore, sampling, spaces, streams

SHAPE = (5, 2)
MEAN = np.linspace(-1, 1, 10).reshape(SHAPE).astype("f4")
STD = np.linspace(0.3, 1.2, 10).reshape(SHAPE).astype("f4")


class Signals:
    """Independent numbers of these means and standard deviations, in the entry 'signal' of a batch."""

    name, num_classes, class_names, has_text = "signals", 0, (), False

    def __init__(self, split: str = "train"):
        self.rows = (MEAN + STD * np.random.default_rng(len(split)).normal(size=(4096, *SHAPE))).astype("f4")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"signal": self.rows[i], "label": np.int32(0), "text": ""}

    def where(self, i):
        return f"signals[{i}]"

    def fingerprint(self):
        return "signals"


class Gaussian(nn.Module):
    """E[x | x_t] of independent Gaussians under x_t = (1 - t) x + t eps, whose means and standard deviations are its parameters."""

    in_channels: int = 2
    out_channels: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, t, cond=None, train=False):
        mean = self.param("mean", nn.initializers.zeros, x.shape[1:])
        std = jnp.exp(self.param("log_std", nn.initializers.zeros, x.shape[1:]))
        t = t.reshape(-1, 1, 1) / 1000
        variance = ((1 - t) * std) ** 2 + t**2
        return mean + (1 - t) * std**2 / variance * (x - (1 - t) * mean)


def config():
    c = base.get_config("smoke")
    base.smoke(c)
    c.task = {"name": "diffusion", "prediction": "x", "weight": "simple"}
    c.model, c.data = {"name": "gaussian"}, {"name": "signals"}
    c.input.update(entry="signal", shape=SHAPE, num_threads=1)
    c.optimizer = {"name": "adamw", "learning_rate": 0.02, "schedule": "cosine", "weight_decay": 0.0}
    c.ema.half_lives = (2_000,)
    c.train.update(images=25_600, batch_size=128, log_every=12_800, validate_every=0, checkpoint_every=0)
    return c.lock()


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setitem(SOURCES, "signals", Signals)
    monkeypatch.setitem(models.MODELS, "gaussian", Gaussian)


def test_signals_are_trained_and_drawn_as_the_gaussian_that_they_are(tables, tmp_path):
    loop.train(config(), tmp_path, quiet=True)
    run = restore.restore(tmp_path)
    space = sampling.space(run.model)
    assert (space.shape, space.entry, space.bounded) == (SHAPE, "signal", False)
    learned = run.params["denoiser"]
    # 25,600 rows of a noisy target: a few hundredths.
    np.testing.assert_allclose(learned["mean"], MEAN, atol=0.12)
    np.testing.assert_allclose(np.exp(learned["log_std"]), STD, atol=0.12)
    count, settings = 4000, sampling.Settings("heun", 24)
    draws = keys.numbered(0, count)
    times = sampling.make_times(run.model, settings)
    plan = draw.Plan(sampling.network(run.model), Rule("heun"), last=sampling.ends_in_noise(run.model.process))
    x = draw.draw(plan, run.params, keys.noise(draws, SHAPE), times, draws, [{}], batch_size=count)
    x = np.asarray(space.show(space.decode({}, x)))
    # The flow of the network that was learned is exact, so that its draws have its moments, to their standard errors.
    std = np.exp(learned["log_std"])
    assert np.abs(x.mean(0) - learned["mean"]).max() < 4.5 * std.max() / count**0.5
    assert np.abs(x.std(0) / std - 1).max() < 4.5 / (2 * count) ** 0.5 + 0.01
    assert not (tmp_path / "pictures").exists()
    with pytest.raises(ValueError, match=r"models signal of shape \(5, 2\); pipelines draw images"):
        drawable.pipeline(run, "run")


def test_the_shape_is_what_the_config_says(tables):
    c = config().unlock()
    c.input.shape = (5, 3)
    with pytest.raises(ValueError, match=r"in_channels=2, but what is modelled has shape \(5, 3\)"):
        check.check(c)
    batch = next(streams.one_pass(check.check(config())[0], Signals("val"), 4))
    np.testing.assert_array_equal(batch["signal"], Signals("val").rows[:4])


def test_video_is_shown_as_pictures_are_and_signals_as_numbers():
    video, sound = spaces.of_data("video", (2, 4, 4, 3)), spaces.of_data("audio", (8, 1))
    frames = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(video.show(video.load(jnp.asarray(frames))), frames)
    waves = jax.random.normal(jax.random.key(0), (3, 8, 1))
    np.testing.assert_array_equal(sound.show(sound.load(waves)), waves)
    assert video.bounded and not sound.bounded
