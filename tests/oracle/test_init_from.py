"""A training that starts from a file that diffusers wrote holds diffusers' numbers."""

import jax
import numpy as np
import pytest

from ldm_jax.config import config_file
from ldm_jax.sampling.model import from_uint8
from ldm_jax.training import loop, open_stage

pytestmark = pytest.mark.oracle


def published(folder, channels=(8, 8, 8)):
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=6,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    model.save_pretrained(folder)
    return model, folder / "diffusion_pytorch_model.safetensors"


def config(file):
    c = config_file.load("configs/quickstart_vae.py:smoke", [f"--config.init_from.file={file}"])
    with c.unlocked():
        c.train.update(images=16, log_every=16, validate_every=0, checkpoint_every=0)
        c.optimizer.learning_rate = 0.0
    return c


def test_training_starts_from_a_published_network(tmp_path):
    import torch

    model, file = published(tmp_path / "theirs")
    c = config(file)
    loop.train(c, tmp_path / "run", quiet=True)  # one step at a learning rate of 0
    stage = open_stage.load(tmp_path / "run")
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    ours = stage.network.apply({"params": stage.params}, from_uint8(jax.numpy.asarray(x)), method="encode").mean
    with torch.no_grad():
        theirs = model.encode(torch.tensor(np.asarray(from_uint8(x))).permute(0, 3, 1, 2)).latent_dist.mean
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_a_file_that_does_not_fit_is_named(tmp_path):
    _, file = published(tmp_path / "wider", (16, 16, 16))
    with pytest.raises(ValueError, match=r"does not hold this network: .* of another shape: .* \(expected"):
        loop.train(config(file), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        loop.train(config(tmp_path / "none.safetensors"), tmp_path / "run2", quiet=True)
