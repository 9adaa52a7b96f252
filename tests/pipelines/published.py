"""Tiny pipelines of diffusers with random weights and a real tokenizer, for tests: made in memory, saved as folders."""

import string

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LENGTH = 16
TABLE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What the published files hold.
DDIM = TABLE | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PNDM = TABLE | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
EULER = TABLE | {"steps_offset": 1, "timestep_spacing": "leading"}


def stir(model, seed=0):
    """Random weights everywhere: many begin as 0 or 1, which hides faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokenizer(length=LENGTH):
    letters = [c + end for c in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def text_encoder(width=8, projection=None, act="quick_gelu"):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=64,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_act=act,
        projection_dim=projection or width,
    )
    return stir((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def unet(**options):
    torch.manual_seed(0)
    return stir(
        UNet2DConditionModel(
            **{
                "block_out_channels": (4, 8),
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 8,
                "attention_head_dim": 2,
                "norm_num_groups": 2,
                "sample_size": 8,
                **options,
            }
        )
    )


def vae(levels=2, **options):
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        **options,
    )
    stir(model)
    with torch.no_grad():
        # A posterior of no width: diffusers draws from it, we take its mean.
        model.quant_conv.weight[4:] = 0
        model.quant_conv.bias[4:] = -30
    return model


def sd_parts():
    """The keywords that diffusers' Stable Diffusion pipelines take, but for the U-Net and the scheduler."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def xl_unet(width=80, **options):
    return unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width,
        **options,
    )


def noise(count, size=8, channels=4, seed=0):
    """Initial noise, NHWC; `.transpose(0, 3, 1, 2)` is torch's."""
    return np.random.default_rng(seed).standard_normal((count, size, size, channels)).astype(np.float32)


def picture(count=1, size=16, seed=1):
    """Smooth random pictures f32[count, size, size, 3] in [0, 1]."""
    coarse = np.random.default_rng(seed).random((count, 4, 4, 3)).astype(np.float32)
    return coarse.repeat(size // 4, 1).repeat(size // 4, 2)
