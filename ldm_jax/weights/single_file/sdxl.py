"""SDXL (Podell et al. 2023): the base model with its inpainting and InstructPix2Pix kin, and the refiner."""

from ldm_jax.weights.single_file.family import Kind
from ldm_jax.weights.single_file.latent_diffusion import EULER, family
from ldm_jax.weights.single_file.text_encoders import clip_part, open_clip_part

SCALING = 0.13025

BASE = family(
    {
        "sdxl": Kind("sdxl", 2048, 4, EULER),
        "sdxl_inpaint": Kind("sdxl", 2048, 9, EULER),
        "sdxl_pix2pix": Kind("sdxl", 2048, 8, EULER),
    },
    {
        "text_encoder": clip_part("conditioner.embedders.0.transformer."),
        "text_encoder_2": open_clip_part("conditioner.embedders.1.model."),
    },
    size=lambda kind, prediction: 1024,
    scaling=SCALING,
    sizes=True,
)
REFINER = family(
    {"sdxl_refiner": Kind("sdxl_refiner", 1280, 4, EULER)},
    {"text_encoder_2": open_clip_part("conditioner.embedders.0.model.")},
    size=lambda kind, prediction: 1024,
    scaling=SCALING,
    sizes=True,
)
