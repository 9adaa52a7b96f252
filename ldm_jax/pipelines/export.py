"""A model trained here as a pipeline's folder that diffusers runs: the same picture from the same initial noise.

    what is trained          its process               pipeline                parts
    U-Net in pixels          discrete_vp, vp_linear    DDIMPipeline            unet, scheduler
     " that learns variance  discrete_vp               DDPMPipeline             "
     "                       flow                      DDPMPipeline             "
    U-Net in latents         discrete_vp, vp_linear    LDMPipeline             vqvae, unet, scheduler
    DiT in latents, labels   discrete_vp, vp_linear    DiTPipeline             vae, transformer, scheduler

All else is refused by the name of the option that nothing published has: `network` still writes one of its networks.

Latents here are whitened, z = (z_raw - mean) / std; published pipelines know one scaling_factor. As 1 x 1 convolutions W, b stand
next to the latents on both sides, the statistics become part of them and the factor is 1:

    post_quant_conv(std z + mean)                 W' = diag(std) W,              b' = b + mean W
    (quant_conv(h) - (mean, 0)) / (std, 1)        W' = W / std,                  b' = (b - mean) / std      of the mean
                                                                                 b' = b - 2 log std         of the log variance
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ldm_jax import weights
from ldm_jax.diffusion.betas import beta_table
from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.models.dit import DiT
from ldm_jax.models.unet import UNet
from ldm_jax.pipelines.latents import factor

Network = tuple[nn.Module, Any]

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x": "sample"}
# discrete_vp's names of tables.
BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
LEVELS = 1000
# The class that DiTPipeline takes for none, whatever the network's own.
NULL_CLASS = 1000
# A table holds no beta of 0: the least of which 1 - beta is not 1 in single precision.
SMALLEST = 2.0**-24


def whitened(module: AutoencoderKL, params: Any, mean: np.ndarray, std: np.ndarray) -> Network:
    """The autoencoder of whitened latents, z = (z_raw - mean) / std with f32[C] each: (module, params), its scaling_factor 1.

    `params` are those of an AutoencoderKL, with or without its 1 x 1 convolutions. The log variance is clipped where it was
    before, less 2 log std: outside of [-30, 20] the two differ.
    """
    channels = module.latent_channels
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    scale = np.concatenate([1 / std, np.ones(channels)])
    shift = np.concatenate([-mean / std, -2 * np.log(std)])

    def convolution(name: str, width: int) -> tuple[np.ndarray, np.ndarray, Any]:
        if name not in params:
            return np.eye(width)[None, None], np.zeros(width), np.float32
        kernel = params[name]["kernel"]
        return np.asarray(kernel, np.float64), np.asarray(params[name]["bias"], np.float64), kernel.dtype

    kernel, bias, dtype = convolution("quant_conv", 2 * channels)
    to_latent = {"kernel": kernel * scale, "bias": bias * scale + shift}
    kernel, bias, _ = convolution("post_quant_conv", channels)
    from_latent = {"kernel": std[:, None] * kernel, "bias": bias + mean @ kernel[0, 0]}
    made = jax.tree.map(lambda x: x.astype(dtype), {"quant_conv": to_latent, "post_quant_conv": from_latent})
    facts = {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0, "shift_factor": None}
    return module.copy(**facts), {**params, **made}


def _betas(beta_min: float = 0.1, beta_max: float = 20.0) -> list[float]:
    """vp_linear as a table. It feeds 999 t, so entry i is t = i / 999 and beta_i = 1 - exp(B(t_{i-1}) - B(t_i)), 0 at i = 0."""
    PROCESSES["vp_linear"](beta_min, beta_max)  # says what is wrong with them
    t = np.arange(LEVELS) / (LEVELS - 1)
    integral = t * (beta_min + 0.5 * (beta_max - beta_min) * t)
    return [SMALLEST, *(-np.expm1(-np.diff(integral))).tolist()]


def _table(name: str, betas: Any = "linear", zero_terminal_snr: bool = False, **rest: Any) -> dict[str, Any]:
    if name == "vp_linear":
        return {"trained_betas": _betas(**rest)}
    PROCESSES[name](betas, zero_terminal_snr, **rest)  # says what is wrong with them
    if isinstance(betas, str) and not rest:
        table = BETAS[betas]
    else:
        values = beta_table(betas, **rest)
        table = {"trained_betas": values.tolist(), "num_train_timesteps": len(values)}
    return table | {"rescale_betas_zero_snr": zero_terminal_snr}


def scheduler(process: Mapping[str, Any], prediction: str, learned_variance: bool = False) -> dict[str, Any]:
    """scheduler_config.json for a process (`name` in PROCESSES, and its options), and what the network predicts.

    DDIM's, DDPM's where the variance is learned, FlowMatchEuler's for flow. The spacing is `trailing`, which begins at pure noise
    (Lin et al. 2024, arXiv:2305.08891); nothing is clipped. Raises ValueError for a process or prediction that has none.
    """
    name = process["name"]
    version = {"_diffusers_version": weights.VERSION["diffusers"]}
    if name == "flow":
        if prediction != "flow":
            raise ValueError(
                f"prediction is {prediction!r}, expected 'flow': FlowMatchEulerDiscreteScheduler has no other"
            )
        shift = {"shift": float(process.get("shift", 1.0)), "num_train_timesteps": LEVELS}
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **version, **shift}
    if name not in ("discrete_vp", "vp_linear"):
        raise ValueError(f"process is {name!r}: diffusers has schedulers for discrete_vp, vp_linear and flow alone")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}, expected {', '.join(PREDICTIONS)} with the process {name!r}")
    more = {"set_alpha_to_one": True} if not learned_variance else {"variance_type": "learned_range"}
    return {
        "_class_name": "DDPMScheduler" if learned_variance else "DDIMScheduler",
        **version,
        "num_train_timesteps": LEVELS,
        **_table(**process),
        "prediction_type": PREDICTIONS[prediction],
        "timestep_spacing": "trailing",
        "clip_sample": False,
        **more,
    }


def of_side(module: nn.Module, side: int) -> tuple[nn.Module, dict[str, Any]]:
    """(the denoiser, its facts) for an input of `side` pixels or latents a side, which published configs state."""
    if isinstance(module, DiT):
        # Positions that are not stretched are those of a network trained at this side.
        return (module if module.pos_base else module.copy(pos_base=float(side // module.patch_size))), {}
    return module, {"sample_size": side} if isinstance(module, UNet) else {}


def network(
    path: str | pathlib.Path, module: nn.Module, params: Any, side: int, facts: Mapping[str, Any] | None = None
) -> None:
    """One network as a folder that its class in diffusers loads; `facts` as in weights.save, of one that was published.

    Raises ValueError as weights.save: no class computes it.
    """
    module, sizes = of_side(module, side)
    sizes |= {"sample_size": side} if isinstance(module, AutoencoderKL) else {}
    weights.save(path, module, params, facts=sizes | dict(facts or {}))


def _with_its_null_class(module: DiT, params: Any) -> Network:
    """The DiT of 1000 classes: classes it was not trained on are the null class, as is the last, which DiTPipeline takes for none."""
    missing = NULL_CLASS - module.num_classes
    if missing < 0:
        raise ValueError(f"DiT: num_classes is {module.num_classes}; DiTPipeline guides away from class {NULL_CLASS}")
    table = np.asarray(params["label"])
    label = np.concatenate([table, np.repeat(table[-1:], missing, 0)])
    return module.copy(num_classes=NULL_CLASS), {**params, "label": label}


def _pipeline(module: nn.Module, latent: bool, schedule: str) -> tuple[str, str, str]:
    """(class of pipeline, its name for the denoiser, for the autoencoder); ValueError where there is none."""
    where = "latents" if latent else "pixels"
    flow = schedule == "FlowMatchEulerDiscreteScheduler"
    if isinstance(module, DiT):
        if not latent:
            raise ValueError(
                "DiT in pixels: DiTPipeline decodes latents, and no pipeline of diffusers draws pixels with one"
            )
        if module.text_dim or not module.num_classes:
            raise ValueError(
                f"DiT: text_dim is {module.text_dim} and num_classes {module.num_classes}; DiTPipeline tells a class, and no more"
            )
        names = "DiTPipeline", "transformer", "vae"
    elif isinstance(module, UNet):
        if module.num_class_embeds is not None:
            raise ValueError(
                f"UNet: num_class_embeds is {module.num_class_embeds}; no pipeline of diffusers tells a U-Net its class"
            )
        if (name := weights.class_of(module)) != "UNet2DModel":
            raise ValueError(
                f"UNet: its options are those of {name}; no pipeline of diffusers runs one that is conditioned on nothing"
            )
        pixels = "DDIMPipeline" if schedule == "DDIMScheduler" else "DDPMPipeline"
        names = ("LDMPipeline", "unet", "vqvae") if latent else (pixels, "unet", "")
    else:
        raise ValueError(f"{type(module).__name__}: expected a UNet or a DiT")
    if flow and latent:
        raise ValueError(f"process is 'flow': {names[0]} ({where}) takes no flow scheduler of diffusers")
    return names


def pipeline(
    path: str | pathlib.Path,
    denoiser: Network,
    side: int,
    process: Mapping[str, Any],
    prediction: str,
    learned_variance: bool = False,
    first_stage: Network | None = None,
    class_names: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """A pipeline's folder: model_index.json, and a folder for each part.

    denoiser      (module, params) of a UNet, or of a DiT of classes; a DiT of less than 1000 gets the null class in all other rows
    side          pixels or latents a side of what it denoises
    process, prediction, learned_variance: as in `scheduler`; DiTPipeline leaves the variance to its scheduler
    first_stage   (module, params) of `whitened`, or of a published autoencoder whose latents are scaled by its scaling_factor alone;
                  None: pixels
    class_names   DiT's, which become the pipeline's id2label
    facts         of a published first stage, its config.json

    Raises ValueError naming the option that no pipeline of diffusers has, before anything is written.
    """
    path = pathlib.Path(path)
    module, params = denoiser
    schedule = scheduler(process, prediction, learned_variance and not isinstance(module, DiT))
    name, part, autoencoder = _pipeline(module, first_stage is not None, schedule["_class_name"])
    # Refuses the network's own options before its parts are written.
    weights.FORMATS[weights.class_of(module)].config(of_side(module, side)[0])
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": weights.VERSION["diffusers"]}
    if isinstance(module, DiT):
        module, params = _with_its_null_class(module, params)
        if class_names:
            index["id2label"] = {str(i): label for i, label in enumerate(class_names)}
    network(path / part, module, params, side)
    index[part] = ["diffusers", weights.class_of(module)]
    if first_stage is not None:
        network(path / autoencoder, *first_stage, side * factor(first_stage[0]), facts)
        index[autoencoder] = ["diffusers", weights.class_of(first_stage[0])]
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=2) + "\n")
    index["scheduler"] = ["diffusers", schedule["_class_name"]]
    (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
