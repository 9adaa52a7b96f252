"""What the families of latent-diffusion files have in common: a U-Net, an autoencoder, text encoders, and a DDPM schedule.

model.diffusion_model.*      unet.py
first_stage_model.*          autoencoder.py
cond_stage_model.*, or conditioner.embedders.N.*      text_encoders.py
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ldm_jax import weights
from ldm_jax.weights.single_file import autoencoder, unet
from ldm_jax.weights.single_file.family import Family, Kind, Part
from ldm_jax.weights.single_file.measure import Shapes, size

MARK = unet.PREFIXES[0] + unet.MARK
PNDM = {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
DDIM = {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
EULER_ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "linspace"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def has_unet(shapes: Shapes) -> bool:
    """Whether the file holds a U-Net in the names of latent diffusion."""
    return unet.part().prefix(shapes) is not None


def measured(shapes: Shapes) -> tuple[int | None, int] | None:
    """(channels of text that the file's U-Net attends to, channels that it reads); None: the file has no such U-Net."""
    prefix = unet.part().prefix(shapes)
    if prefix is None:
        return None
    context = next((size(shapes, name, 1) for name in shapes if name.endswith("attn2.to_k.weight")), None)
    return context, size(shapes, prefix + unet.MARK, 1)


def _kind(kinds: Mapping[str, Kind], context: int | None, channels: int) -> str | None:
    return next((name for name, kind in kinds.items() if (kind.context, kind.channels) == (context, channels)), None)


def scheduler(shapes: Shapes, kind: Kind, prediction: str) -> dict[str, Any] | None:
    """scheduler_config.json; None for a file without a U-Net. Some SDXL models have the mark ztsnr: their last level has no signal."""
    if not has_unet(shapes):
        return None
    options = {**kind.scheduler, **BETAS, "steps_offset": 1, "prediction_type": prediction}
    return options | ({"rescale_betas_zero_snr": True} if "ztsnr" in shapes else {})


def family(
    kinds: Mapping[str, Kind],
    encoders: Mapping[str, Part],
    size: Callable[[str, str], int],
    scaling: float,
    heads: int | None = None,
    sizes: bool = False,
) -> Family:
    """A family of such files. `heads` and `sizes` are those of unet.config, `scaling` is that of autoencoder.config."""

    def recognises(shapes: Shapes) -> str | None:
        of_unet = measured(shapes)
        return None if of_unet is None else _kind(kinds, *of_unet)

    def suits(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        if weights.class_named(configs.get("unet", {})) != "UNet2DConditionModel":
            return None
        module = weights.module_of(configs["unet"])[1]
        return _kind(kinds, module.cross_attention_dim, module.in_channels)

    parts = {"unet": unet.part(heads, sizes), "vae": autoencoder.part(scaling), **encoders}
    return Family(MARK, kinds, parts, recognises, size, scheduler, suits)


def misfit(shapes: Shapes, families: Iterable[Family]) -> str | None:
    """Why none of the families has the U-Net of these shapes; None: there is no such U-Net."""
    of_unet = measured(shapes)
    if of_unet is None:
        return None
    kinds = [item for family in families if family.mark == MARK for item in family.kinds.items()]
    expected = ", ".join(f"{kind.context} and {kind.channels} ({name})" for name, kind in kinds)
    context, channels = of_unet
    return f"the U-Net attends to {context} channels of text and reads {channels} of the latent, expected one of {expected}"
