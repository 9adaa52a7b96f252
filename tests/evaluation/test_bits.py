"""Bits a dimension of noise whose entropy is known."""

import numpy as np

from configs import base
from ldm_jax.diffusion.process import flow
from ldm_jax.evaluation import bits
from ldm_jax.training import conditioning, experiment, restore, sampling, streams


class Exact:
    """The network that predicts the clean image of N(0, std^2) noise under x_t = (1 - t) x + t eps: a denoiser without weights."""

    std = 0.25

    def apply(self, variables, x, t, cond):
        t = t.reshape(-1, 1, 1, 1) / 1000  # the time that flow() tells a network
        variance = ((1 - t) * self.std) ** 2 + t**2
        return x * ((1 - t) * self.std**2) / variance


def test_bits_of_white_noise_are_its_entropy(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    noise = np.clip(np.floor((rng.normal(0, Exact.std, (40, 8, 8, 3)) + 1) * 128), 0, 255).astype(np.uint8)

    class Noise:
        name, num_classes, class_names, has_text = "noise", 0, (), False

        def __len__(self):
            return 40

        def __getitem__(self, i):
            return {"image": noise[i], "label": np.int32(0), "text": ""}

        def where(self, i):
            return f"noise[{i}]"

    c = base.get_config()
    c.input.update(resolution=8, crop="none")
    c.sampler.batch_size = 16
    monkeypatch.setattr(streams, "source", lambda config, role: Noise())
    model = sampling.Model(Exact(), conditioning.Conditioning(), None, flow(), "x", (8, 8, 3))
    run = restore.Restored(experiment.parse(c), model, {"denoiser": {}}, {}, 1, "", {})
    result = bits.bits(run, num=40, steps=24, seed=0)
    entropy = np.log2(Exact.std * np.sqrt(2 * np.pi * np.e)) + 7
    assert result["bits_num"] == 40 and 0 < result["bits_error"] < 0.05
    assert abs(result["bits"] - entropy) < 0.03
