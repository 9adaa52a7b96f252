"""What AutoencoderTiny refuses. Its numbers are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.models.autoencoder_tiny import AutoencoderTiny


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 8, 12, 3), "AutoencoderTiny.encode: x is .* H and W multiples of 8"),
        ({}, (1, 8, 8, 4), r"expected \[B, H, W, 3\]"),
        ({"num_encoder_blocks": (1, 1)}, (1, 8, 8, 3), "num_encoder_blocks has 2 entries: expected 4"),
        ({"decoder_block_out_channels": (8, 8, 8, 4)}, (1, 8, 8, 3), "expected one width at all levels"),
    ],
)
def test_errors(options, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(AutoencoderTiny(**options).init, jax.random.key(0), jnp.zeros(shape))
