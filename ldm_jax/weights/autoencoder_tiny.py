"""AutoencoderTiny in diffusers' files <-> models/autoencoder_tiny.py."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.weights.format import Format, options
from ldm_jax.weights.kinds import CONV2D
from ldm_jax.weights.layout import Row, under

OPTIONS = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "act_fn": "relu",
    "latent_channels": 4,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
FIXED = {"upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}
# block_out_channels is the same as the decoder's; diffusers writes it and does not read it.
UNUSED = ("block_out_channels", "force_upcast")
# A layer is a convolution or a block of three convolutions.
LAYERS = (
    Row("layers_{i}", "layers.{i}", CONV2D),
    Row("layers_{i}/conv_{j}", "layers.{i}.conv.{j}", CONV2D),
)


def table(module: AutoencoderTiny) -> tuple[Row, ...]:
    """The rows of any AutoencoderTiny."""
    return (*under("encoder", "encoder", LAYERS), *under("decoder", "decoder", LAYERS))


def module(config: Mapping[str, Any]) -> AutoencoderTiny:
    """The config.json of an AutoencoderTiny -> our module."""
    return AutoencoderTiny(**options("AutoencoderTiny", config, OPTIONS, fixed=FIXED, unused=UNUSED))


def config(module: AutoencoderTiny) -> dict[str, Any]:
    """Our module -> the options of an AutoencoderTiny."""
    return {option: getattr(module, option) for option in OPTIONS}


TINY = Format("AutoencoderTiny", "diffusers", AutoencoderTiny, module, config, table)
