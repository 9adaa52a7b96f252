"""diffusers' scheduler classes: the options that each reads, and what they say in terms of ldm_jax.diffusion.

    facts   (name, config) -> process, prediction, scale of the initial noise, what is done to the clean estimate
    grid    (config, steps, ...) -> times and time inputs, published_grids.py
    rule    (config, steps) -> the name of the update rule in SAMPLERS and its options

A value that is not honoured is a ValueError that names the class, the option and the value; so are combinations that diffusers makes
NaN of, or a sampler that has no order.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.process import Process
from ldm_jax.pipelines import published_grids as G
from ldm_jax.pipelines.published_grids import Config, Grid, Size

PREDICTIONS = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x",
    "original_sample": "x",
    "flow_prediction": "flow",
}
# Below this number of steps DPM-Solver and DEIS lower the order of the last two.
FEW_STEPS = 15


class Clip(NamedTuple):
    """The clean estimate x is clipped to [-bound, bound]; with a percentile to [-s, s] and divided by s, that percentile of |x| over
    a row, 1 <= s <= bound (Saharia et al. 2022, Imagen, arXiv:2205.11487, section 2.3). keep_eps: eps stays the network's,
    as in diffusers' DDIM, else it is what explains x_t with the new x."""

    bound: float = 1.0
    percentile: float | None = None
    keep_eps: bool = False


class Boundary(NamedTuple):
    """c_skip x_t + c_out F, a consistency function. With a `scaling` F is the clean estimate, and with u = scaling times the time input

        c_skip = d^2 / (u^2 + d^2),  c_out = u / sqrt(u^2 + d^2),          d = 1/2

    (Luo et al. 2023, LCM, arXiv:2310.04378); else F is the network's output, and with s = sigma - sigma_min, d = sigma_data

        c_skip = d^2 / (s^2 + d^2),  c_out = d s / sqrt(sigma^2 + d^2)

    (Song et al. 2023, arXiv:2303.01469, appendix C)."""

    scaling: float | None = None
    sigma_min: float = 0.0


def chosen(name: str, config: Config, key: str, known: Mapping[Any, Any]) -> Any:
    """known[config[key]]; ValueError for any other."""
    one_of(name, config, key, *known)
    return known[config[key]]


def one_of(name: str, config: Config, key: str, *values: Any) -> None:
    """ValueError naming the class, the option and its value unless that is among `values`."""
    if config[key] not in values:
        raise ValueError(f"{name}: {key} is {config[key]!r}, expected {' or '.join(map(repr, values))}")


def refuse(name: str, config: Config, key: str, instead: str) -> None:
    """The ValueError of a combination."""
    raise ValueError(f"{name}: {key} is {config[key]!r}, expected {instead}")


# ---- facts: (name, config) -> fields of Schedule ----


def _table(name: str, config: Config, divides: bool = False) -> Process:
    if config["trained_betas"] is None:
        one_of(name, config, "beta_schedule", *G.BETA_SCHEDULES)
    process = P.discrete_vp(G.betas(config, divides))
    # Below the first entry there is none.
    return process._replace(time_input=lambda t: jnp.maximum(process.time_input(t), 0))


def _flow(n: int) -> Process:
    return P.flow()._replace(time_input=lambda t: n * t)


def _power(top: float, preserving: bool) -> Process:
    """sigma / alpha = top t^7: t = 0 is clean data, and Karras's levels are nearly uniform in t. Variance preserving and told
    log(sigma / alpha) / 4, or exploding and told sigma."""

    def level(t: Array) -> Array:
        return top * P.as_time(t) ** 7

    def alpha(t: Array) -> Array:
        return jax.lax.rsqrt(1 + level(t) ** 2) if preserving else jnp.ones_like(P.as_time(t))

    return Process(
        alpha=alpha,
        sigma=lambda t: alpha(t) * level(t),
        time_input=lambda t: 0.25 * jnp.log(level(t)) if preserving else level(t),
        t_of_log_snr=lambda value: (jnp.exp(-0.5 * value) / top) ** (1 / 7),
    )


def _kind(name: str, config: Config, *known: str) -> str:
    return chosen(name, config, "prediction_type", {key: PREDICTIONS[key] for key in known})


def _clip(config: Config) -> Clip | None:
    if config.get("thresholding"):
        return Clip(config["sample_max_value"], config["dynamic_thresholding_ratio"])
    return Clip(config["clip_sample_range"]) if config.get("clip_sample") else None


def _alpha_facts(name: str, config: Config) -> dict[str, Any]:
    one_of(name, config, "timestep_spacing", *G.SPACINGS)
    kinds = ("epsilon", "v_prediction") + (() if name == "PNDMScheduler" else ("sample",))
    clip, from_first = _clip(config), config["timestep_spacing"] == "linspace" or not config["steps_offset"]
    if clip and not config.get("set_alpha_to_one", True) and config["timestep_spacing"] != "trailing" and from_first:
        refuse(name, config, "set_alpha_to_one", "True: its last step, from the first entry to itself, would only clip")
    return {
        "process": _table(name, config),
        "prediction": _kind(name, config, *kinds),
        "clip": clip,
        "learned_variance": config.get("variance_type") == "learned_range",
    }


def _sigma_facts(name: str, config: Config) -> dict[str, Any]:
    one_of(name, config, "timestep_spacing", *G.SPACINGS)
    if name == "KDPM2AncestralDiscreteScheduler" and config["use_karras_sigmas"]:
        # Its stage lies at the next time of the grid, where the network is told a rounded entry, and is told one not rounded.
        refuse(name, config, "use_karras_sigmas", "False")
    kinds = ("epsilon", "v_prediction") + (() if "KDPM2" in name or "Ancestral" in name else ("sample",))
    kinds += ("original_sample",) if name == "EulerDiscreteScheduler" else ()
    return {
        "process": _table(name, config, divides=True),
        "prediction": _kind(name, config, *kinds),
        "prior": 1.0 if config["timestep_spacing"] == "leading" else None,
        "clip": _clip(config),
    }


def _euler_facts(name: str, config: Config) -> dict[str, Any]:
    one_of(name, config, "interpolation_type", "linear", "log_linear")
    one_of(name, config, "timestep_type", "discrete", "continuous")
    one_of(name, config, "final_sigmas_type", "zero", "sigma_min")
    facts = _sigma_facts(name, config)
    return facts | ({"process": _power(G.noisiest(config), True)} if G.continuous(config) else {})


def _inner_facts(name: str, config: Config) -> dict[str, Any]:
    one_of(name, config, "timestep_spacing", *G.SPACINGS)
    one_of(name, config, "solver_order", 1, 2, 3)
    process, kinds = _table(name, config, divides=True), ("epsilon", "v_prediction", "sample")
    if config["use_flow_sigmas"]:
        process, kinds = _flow(config["num_train_timesteps"]), ("epsilon", "sample", "flow_prediction")
        spacing = G.level_spacing(config)
        if spacing is not None and (name, spacing) != ("UniPCMultistepScheduler", "use_karras_sigmas"):
            refuse(name, config, spacing, "False beside use_flow_sigmas")
        if config.get("final_sigmas_type", "zero") != "zero":
            refuse(name, config, "final_sigmas_type", "'zero' beside use_flow_sigmas")
    return {
        "process": process,
        "prediction": _kind(name, config, *kinds),
        "clip": _clip(config),
        "learned_variance": config.get("variance_type") is not None,
    }


def _dpm_facts(name: str, config: Config) -> dict[str, Any]:
    algorithm = chosen(name, config, "algorithm_type", ALGORITHMS)
    chosen(name, config, "solver_type", SOLVERS)
    one_of(name, config, "final_sigmas_type", "zero", "sigma_min")
    one_of(name, config, "variance_type", None, "learned", "learned_range")
    if algorithm == "dpmsolver" and (config["final_sigmas_type"] == "zero" or config["use_flow_sigmas"]):
        refuse(name, config, "algorithm_type", "one with ++ beside final_sigmas_type 'zero' or use_flow_sigmas")
    if algorithm == "sde-dpmsolver++" and config["solver_order"] == 3:
        # In diffusers its second difference has a weight that tends to -1 as steps shrink: weak order 1.
        refuse(name, config, "solver_order", "1 or 2 beside algorithm_type 'sde-dpmsolver++'")
    return _inner_facts(name, config)


def _unipc_facts(name: str, config: Config) -> dict[str, Any]:
    chosen(name, config, "solver_type", UNIPC)
    one_of(name, config, "final_sigmas_type", "zero", "sigma_min")
    final, spacing = config["final_sigmas_type"], G.level_spacing(config)
    if final == "sigma_min" and spacing is not None:
        refuse(
            name, config, "final_sigmas_type", f"'zero' beside {spacing}: its last level, met twice, is corrected twice"
        )
    if final == "zero" and not config["lower_order_final"] and config["solver_order"] > 1:
        refuse(name, config, "lower_order_final", "True beside final_sigmas_type 'zero'")
    if config["shift_terminal"] is not None and not config["use_flow_sigmas"]:
        refuse(name, config, "shift_terminal", "None without use_flow_sigmas")
    return _inner_facts(name, config)


def _deis_facts(name: str, config: Config) -> dict[str, Any]:
    one_of(name, config, "algorithm_type", "deis", "dpmsolver", "dpmsolver++")
    one_of(name, config, "solver_type", "logrho", "midpoint", "heun", "bh1", "bh2")
    return _inner_facts(name, config)


def _distilled_facts(name: str, config: Config) -> dict[str, Any]:
    original, n = config["original_inference_steps"], config["num_train_timesteps"]
    if not 1 <= original <= n:
        refuse(name, config, "original_inference_steps", f"1 to {n}")
    return {
        "process": _table(name, config),
        "prediction": _kind(name, config, "epsilon", "v_prediction", "sample"),
        # TCD's file has the options of a clipping, its step does none.
        "clip": _clip(config) if name == "LCMScheduler" else None,
        "boundary": Boundary(scaling=config["timestep_scaling"]) if name == "LCMScheduler" else None,
    }


def _flow_facts(name: str, config: Config) -> dict[str, Any]:
    one_of(name, config, "time_shift_type", "exponential", "linear")
    return {"process": _flow(config["num_train_timesteps"]), "prediction": "flow"}


def _ve_facts(name: str, config: Config) -> dict[str, Any]:
    return {"process": _power(config["sigma_max"], False), "prediction": "score", "prior": config["sigma_max"]}


def _consistency_facts(name: str, config: Config) -> dict[str, Any]:
    edm = P.edm(*(config[key] for key in ("sigma_min", "sigma_max", "rho", "sigma_data")))
    return {
        "process": edm._replace(time_input=lambda t: 1000 * edm.time_input(t)),
        "prediction": "edm",
        "prior": config["sigma_max"],
        "clip": Clip(1.0) if config["clip_denoised"] else None,
        "boundary": Boundary(sigma_min=config["sigma_min"]),
    }


# ---- update rules: (config, steps) -> (name in SAMPLERS, its options) ----

Rule = Callable[[Config, int], tuple[str, dict[str, Any]]]

VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned",
}
# Values of another class's files are read as this class's default, as published.
ALGORITHMS = {
    "dpmsolver++": "dpmsolver++",
    "deis": "dpmsolver++",
    "dpmsolver": "dpmsolver",
    "sde-dpmsolver++": "sde-dpmsolver++",
}
SOLVERS = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
UNIPC = {
    "bh1": "uni_pc",
    "bh2": "uni_pc_bh2",
    "midpoint": "uni_pc_bh2",
    "heun": "uni_pc_bh2",
    "logrho": "uni_pc_bh2",
}
DPM = {
    ("dpmsolver++", 2, "midpoint"): "dpmpp_2m",
    ("dpmsolver++", 2, "heun"): "res_multistep",
    ("dpmsolver++", 3, "midpoint"): "dpmpp_3m",
    ("dpmsolver++", 3, "heun"): "dpmpp_3m",
    ("dpmsolver", 2, "midpoint"): "dpm_solver_2m",
    ("dpmsolver", 2, "heun"): "deis_2",
    ("dpmsolver", 3, "midpoint"): "dpm_solver_3m",
    ("dpmsolver", 3, "heun"): "dpm_solver_3m",
    ("sde-dpmsolver++", 2, "midpoint"): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 2, "heun"): "dpmpp_2m_sde_heun",
}


def _always(name: str, **options: Any) -> Rule:
    return lambda config, steps: (name, options)


def _ddpm_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    variance = chosen("DDPMScheduler", config, "variance_type", VARIANCES)
    noisy = variance != "small" and G.entries(config, steps)[-1] > 0
    return "ddpm", {"variance": variance} | ({"last_noise": True} if noisy else {})


def _pndm_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return ("plms" if config["skip_prk_steps"] else "pndm"), {}


def _dpm_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    algorithm, solver = ALGORITHMS[config["algorithm_type"]], SOLVERS[config["solver_type"]]
    order, few = config["solver_order"], config["lower_order_final"] and steps < FEW_STEPS
    if order == 1:
        return ("euler_ancestral" if algorithm == "sde-dpmsolver++" else "euler"), {}
    final = (2, 1) if few else (1,) if config["euler_at_final"] else ()
    if config["final_sigmas_type"] == "sigma_min" and G.level_spacing(config) is not None:
        final = final[:-1]  # the last level stands twice: the last step is none
    elif config["final_sigmas_type"] == "zero" and order == 2:
        final = ()  # a step into sigma = 0 is of order 1 anyway
    options = {"final": final} if final else {}
    return DPM[algorithm, order, solver], options | ({"solver": solver} if order == 3 and solver == "heun" else {})


def _deis_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    order, few = config["solver_order"], config["lower_order_final"] and steps < FEW_STEPS
    twice = G.level_spacing(config) is not None or config["use_flow_sigmas"]
    options = {"final": (2,) if twice else (2, 1)} if few and order > 1 else {}
    return ("euler", "deis_2", "deis_3")[order - 1], options


def _unipc_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    final = (2, 1) if config["lower_order_final"] else ()
    return UNIPC[config["solver_type"]], {"order": config["solver_order"], "final": final}


def _flow_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return ("lcm" if config["stochastic_sampling"] else "euler"), {}


def _ve_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return "predictor_corrector", {"snr": config["snr"], "corrections": config["correct_steps"]}


def _consistency_rule(config: Config, steps: int) -> tuple[str, dict[str, Any]]:
    return "lcm", {"sigma_min": config["sigma_min"]}


# ---- the classes ----


class Kind(NamedTuple):
    """known: options and their defaults as published; the functions above; fixed: options that must have one of these values."""

    known: dict[str, Any]
    facts: Callable[[str, Config], dict[str, Any]]
    grid: Callable[[Config, int, Size, Any], Grid]
    rule: Rule
    fixed: dict[str, tuple] = {}  # noqa: RUF012 (never written to)


BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
LATENT = BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
SPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
ZERO_SNR = {"rescale_betas_zero_snr": False}
TO_ONE = {"set_alpha_to_one": True}
INNER = (
    BETAS
    | LINSPACE
    | THRESHOLD
    | SPACED
    | {"solver_order": 2, "lower_order_final": True, "use_flow_sigmas": False, "flow_shift": 1.0}
)
# Their use_dynamic_shifting takes a number that no file holds.
STATIC = {"use_dynamic_shifting": (False,), "time_shift_type": ("exponential",)}
DISTILLED = (
    LATENT
    | THRESHOLD
    | CLIP
    | LEADING
    | ZERO_SNR
    | TO_ONE
    | {"beta_schedule": "scaled_linear", "clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0}
)


def modern(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A file of any version, with the options of early ones in today's words.

    tensor_format, timestep_values (0.1 to 0.3)        of the library's arrays and of its last call, None: left out
    predict_epsilon (0.7, 0.8: DDPM, DPM-Solver)       prediction_type 'epsilon' or 'sample', where the file does not say that too
    set_alpha_to_zero (0.15: DDIMInverse)              set_alpha_to_one, as diffusers reads it; of no meaning to other classes

    Raises ValueError for values that are neither True nor False, for entries in timestep_values, and for a contradiction.
    """
    config = dict(config)
    config.pop("tensor_format", None)
    if config.get("timestep_values") is not None:
        refuse(name, config, "timestep_values", "None")
    config.pop("timestep_values", None)
    for key in ("predict_epsilon", "set_alpha_to_zero"):
        if config.get(key) is not None:
            one_of(name, config, key, True, False)
    if (epsilon := config.pop("predict_epsilon", None)) is not None:
        meant = "epsilon" if epsilon else "sample"
        if config.setdefault("prediction_type", meant) != meant and not epsilon:
            refuse(name, config, "prediction_type", f"{meant!r} beside predict_epsilon False")
    if (to_zero := config.pop("set_alpha_to_zero", None)) is not None and name == "DDIMInverseScheduler":
        config["set_alpha_to_one"] = to_zero
    return config


CLASSES: dict[str, Kind] = {
    "DDIMScheduler": Kind(
        BETAS | CLIP | THRESHOLD | LEADING | ZERO_SNR | TO_ONE, _alpha_facts, G.alpha_grid, _always("ddim")
    ),
    "DDIMInverseScheduler": Kind(
        BETAS | CLIP | LEADING | ZERO_SNR | TO_ONE, _alpha_facts, G.inverse_grid, _always("ddim")
    ),
    "DDPMScheduler": Kind(
        BETAS | CLIP | THRESHOLD | LEADING | ZERO_SNR | {"variance_type": "fixed_small"},
        _alpha_facts,
        G.alpha_grid,
        _ddpm_rule,
    ),
    "PNDMScheduler": Kind(
        BETAS | LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False}, _alpha_facts, G.alpha_grid, _pndm_rule
    ),
    "EulerDiscreteScheduler": Kind(
        BETAS
        | LINSPACE
        | SPACED
        | ZERO_SNR
        | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"}
        | {"sigma_min": None, "sigma_max": None},
        _euler_facts,
        G.euler_grid,
        _always("euler"),
    ),
    "EulerAncestralDiscreteScheduler": Kind(
        BETAS | LINSPACE | ZERO_SNR, _sigma_facts, G.sigma_grid, _always("euler_ancestral")
    ),
    "LMSDiscreteScheduler": Kind(BETAS | LINSPACE | SPACED, _sigma_facts, G.sigma_grid, _always("lms")),
    "HeunDiscreteScheduler": Kind(
        LATENT | LINSPACE | SPACED | CLIP | {"clip_sample": False}, _sigma_facts, G.sigma_grid, _always("heun")
    ),
    "KDPM2DiscreteScheduler": Kind(
        LATENT | LINSPACE | SPACED, _sigma_facts, functools.partial(G.sigma_grid, rounded=True), _always("dpm_2")
    ),
    "KDPM2AncestralDiscreteScheduler": Kind(
        LATENT | LINSPACE | SPACED,
        _sigma_facts,
        G.sigma_grid,
        _always("dpm_2_ancestral"),
    ),
    "DPMSolverMultistepScheduler": Kind(
        INNER
        | ZERO_SNR
        | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False}
        | {"final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None},
        _dpm_facts,
        G.dpm_grid,
        _dpm_rule,
        STATIC,
    ),
    "UniPCMultistepScheduler": Kind(
        INNER
        | ZERO_SNR
        | {"solver_type": "bh2", "final_sigmas_type": "zero", "sigma_min": None, "sigma_max": None}
        | {"shift_terminal": None},
        _unipc_facts,
        G.unipc_grid,
        _unipc_rule,
        STATIC | {"predict_x0": (True,), "disable_corrector": ((),), "solver_p": (None,)},
    ),
    "DEISMultistepScheduler": Kind(
        INNER | {"algorithm_type": "deis", "solver_type": "logrho"}, _deis_facts, G.deis_grid, _deis_rule, STATIC
    ),
    "LCMScheduler": Kind(DISTILLED, _distilled_facts, G.distilled_grid, _always("lcm")),
    "TCDScheduler": Kind(
        DISTILLED, _distilled_facts, functools.partial(G.distilled_grid, end=1.0), _always("tcd", gamma=0.3)
    ),
    "FlowMatchEulerDiscreteScheduler": Kind(
        SPACED
        | {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5}
        | {"max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "shift_terminal": None}
        | {"time_shift_type": "exponential", "stochastic_sampling": False},
        _flow_facts,
        G.flow_grid,
        _flow_rule,
        {"invert_sigmas": (False,)},
    ),
    "ScoreSdeVeScheduler": Kind(
        {"num_train_timesteps": 2000, "snr": 0.15, "sigma_min": 0.01, "sigma_max": 1348.0, "sampling_eps": 1e-5}
        | {"correct_steps": 1},
        _ve_facts,
        G.ve_grid,
        _ve_rule,
    ),
    "CMStochasticIterativeScheduler": Kind(
        {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
        | {"clip_denoised": True},
        _consistency_facts,
        G.consistency_grid,
        _consistency_rule,
        {"s_noise": (1.0,)},
    ),
}
# What a file may carry for a class that does not read it.
OPTIONS = {key for kind in CLASSES.values() for key in (*kind.known, *kind.fixed)}
