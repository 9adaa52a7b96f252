"""AutoencoderTiny against diffusers', with the same random weights: outputs to 1e-5, tensors bit for bit."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as Original

from ldm_jax import weights
from ldm_jax.models.autoencoder_tiny import tiled_decode, tiled_encode
from ldm_jax.weights.autoencoder_tiny import TINY

pytestmark = pytest.mark.oracle

CONFIGS = {
    "four_levels": {
        "encoder_block_out_channels": (6, 6, 6, 6),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "num_encoder_blocks": (1, 2, 1, 1),
        "num_decoder_blocks": (1, 1, 2, 1),
    },
    "two_levels_of_sixteen_channels": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (2, 3),
        "num_decoder_blocks": (3, 2),
        "latent_channels": 16,
        "act_fn": "gelu",
        "latent_magnitude": 2.0,
        "latent_shift": 0.4,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "grey": {
        "in_channels": 1,
        "out_channels": 1,
        "encoder_block_out_channels": (4,),
        "decoder_block_out_channels": (4,),
        "num_encoder_blocks": (1,),
        "num_decoder_blocks": (1,),
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_original(name):
    config = CONFIGS[name]
    torch.manual_seed(0)
    original = Original(**config).eval()
    for parameter in original.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours = TINY.module(original.config)
    state = {k: v.numpy() for k, v in original.state_dict().items()}
    params = weights.from_state(ours, state)
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (2, 16, 24, config.get("in_channels", 3))).astype(np.float32)
    images = torch.tensor(x).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = original.encode(images).latents
        # Far beyond the three standard deviations at which the decoder saturates.
        z = torch.tensor(4 * random.normal(size=latents.shape).astype(np.float32))
        decoded = original.decode(z).sample
        forward = original(images).sample

    @jax.jit
    def run(params, x, z):
        variables = {"params": params}
        latents = ours.apply(variables, x, method="encode")
        stored = jax.numpy.round(255 * ours.scale_latents(latents)) / 255
        restored = ours.apply(variables, ours.unscale_latents(stored), method="decode")
        return latents, ours.apply(variables, z, method="decode"), restored, ours.apply(variables, x)

    got = run(params, x, z.permute(0, 2, 3, 1).numpy())
    for mine, theirs in zip(got, (latents, decoded, forward)):
        np.testing.assert_allclose(mine, theirs.permute(0, 2, 3, 1), atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(got[3], original.decode(latents).sample.permute(0, 2, 3, 1), atol=1e-5)
    back = weights.to_state(ours, params)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, key)
    written = TINY.config(ours)
    assert TINY.module(written) == ours
    assert {k: original.config[k] for k in written} == written


def test_refuses_what_it_lacks():
    with pytest.raises(ValueError, match="AutoencoderTiny: upsample_fn is 'bilinear', expected 'nearest'"):
        TINY.module({"upsample_fn": "bilinear"})


def test_tiles_equal_theirs():
    original = Original(**CONFIGS["four_levels"]).eval()
    original.tile_sample_min_size, original.tile_latent_min_size, original.tile_overlap_factor = 64, 8, 0.25
    ours = TINY.module(original.config)
    params = weights.from_state(ours, {k: v.numpy() for k, v in original.state_dict().items()})
    x = np.random.default_rng(0).uniform(-1, 1, (1, 72, 128, 3)).astype(np.float32)
    with torch.no_grad():
        whole = original.encode(torch.tensor(x).permute(0, 3, 1, 2)).latents
        original.enable_tiling()
        z = original.encode(torch.tensor(x).permute(0, 3, 1, 2)).latents
        decoded = original.decode(z).sample
    assert (whole - z).abs().max() > 1e-2
    z = z.permute(0, 2, 3, 1).numpy()
    got = jax.jit(lambda x: tiled_encode(ours, params, x, tile=64, overlap=0.25))(x)
    np.testing.assert_allclose(got, z, atol=1e-5)
    got = jax.jit(lambda z: tiled_decode(ours, params, z, tile=64, overlap=0.25))(z)
    np.testing.assert_allclose(got, decoded.permute(0, 2, 3, 1), atol=1e-5)
