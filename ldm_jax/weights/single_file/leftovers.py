"""What single files hold besides the networks that are read from them.

What a training program or another tool left there (LEFT_OUT) is left out, and one line says so. Any other tensor that no network has is
refused by name: a network that ignores one may compute something else.
"""

import re
from collections.abc import Iterable

# SD 2 conditions on the states before the last of 24 layers. Its published folder does not hold the last layer.
SD2_LAYERS = 23
ENCODER = r"(cond_stage_model|conditioner\.embedders\.\d)"
LEFT_OUT = {
    "moving averages": r"(first_stage_model\.)?model_ema\..*",  # a second U-Net, names without dots
    "the noise schedule": r"(.*_)?alphas_cumprod(_.*)?|betas|sqrt_recipm1_.*|posterior_.*|logvar|lvlb_weights|scale_factor|"
    r"denoiser\.sigmas",
    "counters": r"(global_)?step|epoch|num_updates|iteration",
    "the autoencoder's loss": r"(first_stage_model\.)?loss\..*",  # its discriminator and LPIPS
    "embedding_manager": r"embedding_manager\..*",  # of textual inversion
    "LoRA": r"lora_(te\d?|unet|prior)_.*",
    "control_model": r"control_model\..*",
    "the safety checker": r"safety_checker\..*",
    # SD 2 conditions on the states before the last layer, which no projection follows; CLIP-L has no projection in SD.
    "unread parts of the text encoder": rf"{ENCODER}(\.model|\.transformer)?\.(logit_scale|attn_mask|visual\..*|vision_model\..*)|"
    rf"{ENCODER}\.transformer\.(text_projection(\.weight)?|visual_projection\.weight)|"
    rf"cond_stage_model\.model\.(text_projection|transformer\.resblocks\.{SD2_LAYERS}\..*)",
    "MiDaS": r"depth_model\..*",  # makes the fifth channel of sd2_depth from an image
}
# Left out without a word: constants, and the empty marks of SDXL models, which single_file.configs reads.
SILENT = r".*embeddings\.position_ids|v_pred|ztsnr"
UNUSED = re.compile("|".join((*LEFT_OUT.values(), SILENT)))


def left_out(names: Iterable[str]) -> str:
    """Their groups in LEFT_OUT, with the number of each: 'moving averages (688 tensors), counters (global_step)'."""
    groups: dict[str, list[str]] = {}
    for name in names:
        for what, pattern in LEFT_OUT.items():
            if re.fullmatch(pattern, name):
                groups.setdefault(what, []).append(name)
                break
    counted = {what: group[0] if len(group) == 1 else f"{len(group)} tensors" for what, group in groups.items()}
    return ", ".join(f"{what} ({count})" for what, count in counted.items())
