"""Stable Diffusion 1 and 2 (Rombach et al. 2022), their inpainting and depth models, and InstructPix2Pix (Brooks et al. 2023)."""

from ldm_jax.weights.single_file.family import Kind
from ldm_jax.weights.single_file.latent_diffusion import DDIM, EULER_ANCESTRAL, PNDM, family
from ldm_jax.weights.single_file.text_encoders import clip_part, open_clip_part

SCALING = 0.18215

SD1 = family(
    {
        "sd1": Kind("sd1", 768, 4, PNDM),
        "sd1_inpaint": Kind("sd1", 768, 9, DDIM),
        "sd1_pix2pix": Kind("sd1", 768, 8, EULER_ANCESTRAL),
    },
    {"text_encoder": clip_part("cond_stage_model.transformer.")},
    size=lambda kind, prediction: 512,
    scaling=SCALING,
    heads=8,
)
SD2 = family(
    {
        # The base model of 512 pixels predicts eps, the one of 768 v, and the files do not say: v is diffusers' choice too.
        "sd2": Kind("sd2", 1024, 4, DDIM, "v_prediction"),
        "sd2_inpaint": Kind("sd2", 1024, 9, DDIM),
        "sd2_depth": Kind("sd2", 1024, 5, DDIM),
    },
    {"text_encoder": open_clip_part("cond_stage_model.model.", projected=False)},
    size=lambda kind, prediction: 768 if (kind, prediction) == ("sd2", "v_prediction") else 512,
    scaling=SCALING,
)
