"""Published pipelines by the name of their class in model_index.json: one row each.

A new published pipeline is one row here, and one file where it is a new way of drawing. A class that has no row is refused by name.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# Tokenizers and text encoders, by the names of their folders.
TEXT = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
NONE: Mapping[str, Any] = MappingProxyType({})


class Kind(NamedTuple):
    """What is said of a class of pipelines beside its files.

    text         whether it is conditioned on text: its text encoders are those of TEXT that model_index.json lists. Others are
                 conditioned on classes, or on nothing
    steps        of the sampler, and the scale of guidance, where nobody gives them
    corrections  options that diffusers puts right in the scheduler's file of this class, whatever the file says: Stable Diffusion was
                 trained on table entries from 1 on and on latents that nothing bounds, and early files did not say so
    instructs    whether a picture is an instruction's object (InstructPix2Pix), and not what noise is added to
    distilled    whether image to image takes all steps of what strength leaves of the grid (latent consistency models)
    darkest      the value of black: 0 where the network was trained on pixels in [0, 1], -1 everywhere else
    """

    text: bool = False
    steps: int = 50
    guidance: float = 1.0
    corrections: Mapping[str, Any] = NONE
    instructs: bool = False
    distilled: bool = False
    darkest: float = -1.0


STABLE_DIFFUSION = Kind(text=True, guidance=7.5)
CORRECTED = STABLE_DIFFUSION._replace(corrections={"steps_offset": 1, "clip_sample": False})
CONSISTENT = STABLE_DIFFUSION._replace(steps=4, distilled=True)

PIPELINES: dict[str, Kind] = {
    "StableDiffusionPipeline": CORRECTED,
    "StableDiffusionImg2ImgPipeline": CORRECTED,
    "StableDiffusionInpaintPipeline": STABLE_DIFFUSION._replace(
        corrections={"steps_offset": 1, "skip_prk_steps": True}
    ),
    "StableDiffusionDepth2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionInstructPix2PixPipeline": STABLE_DIFFUSION._replace(steps=100, instructs=True),
    "StableDiffusionXLPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLInpaintPipeline": STABLE_DIFFUSION,
    "LatentConsistencyModelPipeline": CONSISTENT,
    "LatentConsistencyModelImg2ImgPipeline": CONSISTENT,
    "DDPMPipeline": Kind(steps=1000),
    "DDIMPipeline": Kind(),
    "PNDMPipeline": Kind(),
    "ScoreSdeVePipeline": Kind(steps=2000, darkest=0.0),
    "ConsistencyModelPipeline": Kind(steps=1),
    "DiTPipeline": Kind(),
    "LDMPipeline": Kind(),
}

# The classes of single files: the purpose is what follows the family in the name of the file's kind (weights.single_file).
BY_FILE = {
    "inpaint": "StableDiffusion{}InpaintPipeline",
    "pix2pix": "StableDiffusion{}InstructPix2PixPipeline",
    "depth": "StableDiffusion{}Depth2ImgPipeline",
    "refiner": "StableDiffusion{}Img2ImgPipeline",
}


def name_of(kind: str) -> str:
    """The pipeline's class of a single file of this kind."""
    family, _, purpose = kind.partition("_")
    return BY_FILE.get(purpose, "StableDiffusion{}Pipeline").format("XL" if family == "sdxl" else "")
