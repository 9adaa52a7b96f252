"""AutoencoderKL against diffusers', with the same random weights: outputs to 1e-4, gradients to 1e-3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Original

from ldm_jax import weights
from ldm_jax.models.autoencoder_kl import AutoencoderKL, tiled_decode, tiled_encode
from ldm_jax.models.tiling import sliced

pytestmark = pytest.mark.oracle

CONFIGS = {
    "sd": {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2, "latent_channels": 4},
    "sd3": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no_attention": {
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "latent_channels": 3,
        "in_channels": 1,
        "out_channels": 1,
        "act_fn": "gelu",
        "mid_block_add_attention": False,
    },
    "attention_at_a_level": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
}


def pair(config: dict) -> tuple[torch.nn.Module, AutoencoderKL, dict]:
    torch.manual_seed(0)
    levels = len(config["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    original = Original(**{**types, **config}).eval()
    for parameter in original.parameters():
        # Norm scales and biases start at one and zero: random ones show a swap.
        parameter.data += 0.05 * torch.randn_like(parameter)
    state = {k: v.detach().numpy() for k, v in original.state_dict().items()}
    module = AutoencoderKL(**config)
    return original, module, weights.from_state(module, state)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal(name):
    config = CONFIGS[name]
    original, ours, params = pair(config)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, config.get("in_channels", 3))).astype(np.float32)
    with torch.no_grad():
        expected = original.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist
        image = original.decode(expected.mean).sample.permute(0, 2, 3, 1).numpy()
    reconstruction, posterior = jax.jit(ours.apply)({"params": params}, x)
    np.testing.assert_allclose(posterior.mean, expected.mean.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(posterior.logvar, expected.logvar.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(reconstruction, image, atol=1e-4)
    back = weights.to_state(ours, params)
    assert back.keys() == original.state_dict().keys()
    for key, value in original.state_dict().items():
        np.testing.assert_array_equal(back[key], value.numpy(), key)


def test_tiles_and_slices_equal_theirs():
    """Tiles of 8 pixels and 4 latents that begin every 6 and 3; the last ones are smaller, down to 2 pixels and 1 latent."""
    original, ours, params = pair(CONFIGS["sd3"] | {"mid_block_add_attention": False})
    original.tile_sample_min_size, original.tile_latent_min_size = 8, 4
    random = np.random.default_rng(2)
    x = random.uniform(-1, 1, (2, 6, 14, 3)).astype(np.float32)
    z = random.normal(size=(2, 6, 7, 16)).astype(np.float32)

    @jax.jit
    def run(params, x, z):
        slices = sliced(lambda z: ours.apply({"params": params}, z, method="decode"), z)
        tiles = sliced(lambda z: tiled_decode(ours, params, z, tile=8), z)
        return slices, tiles, tiled_encode(ours, params, x, tile=8)

    slices, tiles, posterior = run(params, x, z)
    with torch.no_grad():
        plain = original.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample
        original.enable_slicing()
        original.enable_tiling()
        decoded = original.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample
        encoded = original.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist
    np.testing.assert_allclose(slices, plain.permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(tiles, decoded.permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(posterior.mean, encoded.mean.permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(posterior.logvar, encoded.logvar.permute(0, 2, 3, 1), atol=1e-5)
    assert np.abs(tiles - slices).max() > 0.1


def test_gradients_equal():
    original, ours, params = pair(CONFIGS["sd"])
    x = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    images = torch.tensor(x).permute(0, 3, 1, 2)
    posterior = original.encode(images).latent_dist
    ((original.decode(posterior.mean).sample - images).square().mean() + 1e-2 * posterior.kl().mean()).backward()
    expected = weights.from_state(ours, {k: p.grad.numpy() for k, p in original.named_parameters()})

    def loss(params):
        reconstruction, posterior = ours.apply({"params": params}, x)
        return jnp.square(reconstruction - x).mean() + 1e-2 * posterior.kl().mean()

    got = jax.jit(jax.grad(loss))(params)
    # A bias of all keys changes no attention: its gradient is rounding alone.
    floor = 1e-3 * max(np.abs(e).max() for e in jax.tree.leaves(expected))
    for (path, e), g in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        assert np.abs(g - e).max() < 1e-4 * max(np.abs(e).max(), floor), jax.tree_util.keystr(path)
