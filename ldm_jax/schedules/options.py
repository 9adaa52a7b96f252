"""Options that several scheduler classes share: their defaults in diffusers, and how each is read.

A value that is not supported raises a ValueError that names the class, the option and the value.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from ldm_jax.schedules.family import Clip, Config

# ---- defaults ----

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
# The ends of Stable Diffusion's table.
LATENT = BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
ZERO_SNR = {"rescale_betas_zero_snr": False}
TO_ONE = {"set_alpha_to_one": True}

PREDICTIONS = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x",
    "original_sample": "x",
    "flow_prediction": "flow",
}

# ---- reading ----


def one_of(name: str, config: Config, key: str, *values: Any) -> None:
    """ValueError that names the class, the option and its value, unless the value is one of `values`."""
    if config[key] not in values:
        raise ValueError(f"{name}: {key} is {config[key]!r}, expected {' or '.join(map(repr, values))}")


def chosen(name: str, config: Config, key: str, table: Mapping[Any, Any]) -> Any:
    """table[config[key]]; ValueError for a value that the table does not have."""
    one_of(name, config, key, *table)
    return table[config[key]]


def refuse(name: str, config: Config, key: str, instead: str) -> NoReturn:
    """Raises the ValueError of an option that does not go with the others."""
    raise ValueError(f"{name}: {key} is {config[key]!r}, expected {instead}")


def is_on(config: Config, key: str) -> bool:
    """Whether the class has the option `key`, and it is on."""
    return key in config and bool(config[key])


def prediction(name: str, config: Config, *supported: str) -> str:
    """The kind of prediction in diffusion.prediction, for a prediction_type out of `supported`."""
    return chosen(name, config, "prediction_type", {key: PREDICTIONS[key] for key in supported})


def clip(config: Config) -> Clip | None:
    """The clipping of `thresholding` or `clip_sample`; None where a class has neither, or both are off."""
    if is_on(config, "thresholding"):
        return Clip(config["sample_max_value"], config["dynamic_thresholding_ratio"])
    return Clip(config["clip_sample_range"]) if is_on(config, "clip_sample") else None


def modern(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a file that any version of diffusers wrote, under their names of today.

    tensor_format, timestep_values (0.1 to 0.3)   say nothing about the numbers and are left out; timestep_values must be None
    predict_epsilon (0.7 and 0.8)                 becomes prediction_type 'epsilon' or 'sample', unless the file also has that
    set_alpha_to_zero (0.15, DDIMInverse)         becomes set_alpha_to_one, as diffusers reads it; other classes do not read it

    Raises ValueError for a value that is neither True nor False, for timestep_values, and for options that contradict each other.
    """
    config = dict(config)
    config.pop("tensor_format", None)
    timestep_values = config.pop("timestep_values", None)
    if timestep_values is not None:
        refuse(name, {"timestep_values": timestep_values}, "timestep_values", "None")
    for key in ("predict_epsilon", "set_alpha_to_zero"):
        if key in config and config[key] is not None:
            one_of(name, config, key, True, False)
    if (epsilon := config.pop("predict_epsilon", None)) is not None:
        meant = "epsilon" if epsilon else "sample"
        if config.setdefault("prediction_type", meant) != meant and not epsilon:
            refuse(name, config, "prediction_type", f"{meant!r} beside predict_epsilon False")
    if (to_zero := config.pop("set_alpha_to_zero", None)) is not None and name == "DDIMInverseScheduler":
        config["set_alpha_to_one"] = to_zero
    return config
