"""VQModel in diffusers' files <-> models/vq.py."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.models.vq import VQModel
from ldm_jax.weights.autoencoder_kl import half, written
from ldm_jax.weights.format import Format, options
from ldm_jax.weights.kinds import CONV2D, EMBEDDING
from ldm_jax.weights.layout import Row

OPTIONS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
}
# The decoder with 'spatial' norms (MoVQ), which are conditioned on the quantized latent, is another network.
FIXED = {"norm_type": ("group",)}
# Facts for pipelines: the size of an image, whether to avoid float16.
UNUSED = ("sample_size", "force_upcast")


def table(module: VQModel) -> tuple[Row, ...]:
    """The rows of any VQModel."""
    return (
        *half("encoder"),
        *half("decoder"),
        Row("quant_conv", "quant_conv", CONV2D),
        Row("quantize", "quantize.embedding", EMBEDDING),
        Row("post_quant_conv", "post_quant_conv", CONV2D),
    )


def module(config: Mapping[str, Any]) -> VQModel:
    """The config.json of a VQModel -> our module."""
    return VQModel(**options("VQModel", config, OPTIONS, fixed=FIXED, unused=UNUSED))


def config(module: VQModel) -> dict[str, Any]:
    """Our module -> the options of a VQModel."""
    return written(module, OPTIONS)


VQ = Format("VQModel", "diffusers", VQModel, module, config, table)
