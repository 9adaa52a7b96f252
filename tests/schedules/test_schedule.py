"""Schedules without an oracle: what is read and refused, what another update rule keeps, what is done to the clean estimate."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.exact import GAUSSIAN
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.schedules import CLASSES, load, respaced

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# Stable Diffusion 1's and XL's files, their foreign options included.
SD1 = SD | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
    "clip_sample": False,
}
XL = SD | {
    "_class_name": "EulerDiscreteScheduler",
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
ZERO_SNR = SD | {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
ZERO_SNR |= {"clip_sample": False}
DPM = SD | {"_class_name": "DPMSolverMultistepScheduler"}


def test_a_file_a_folder_a_pipeline_and_a_dict_are_read_alike(tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(SD1))
    expected = load(SD1)._replace(process=None)
    for source in (file, str(file), tmp_path / "scheduler", tmp_path):
        assert load(source)._replace(process=None) == expected
    assert (expected.name, expected.sampler, expected.prediction) == ("PNDMScheduler", "plms", "eps")
    assert expected.clip is None


EARLY = {"tensor_format": "pt", "timestep_values": None}
INVERSE = SD | {"_class_name": "DDIMInverseScheduler", "clip_sample": False}


@pytest.mark.parametrize(
    ("early", "today"),
    [
        # 0.1 to 0.3: google/ddpm-*, CompVis's first Stable Diffusion and latent diffusion.
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"} | EARLY, {"variance_type": "fixed_large"}),
        (SD | {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 0} | EARLY, {}),
        ({key: value for key, value in SD1.items() if key != "steps_offset"} | EARLY, {"steps_offset": 0}),
        (SD | {"_class_name": "LMSDiscreteScheduler"} | EARLY, {}),
        ({"_class_name": "ScoreSdeVeScheduler", "snr": 0.075} | EARLY, {}),
        # 0.7 and 0.8.
        (DPM | {"predict_epsilon": True}, {"prediction_type": "epsilon"}),
        (DPM | {"predict_epsilon": False}, {"prediction_type": "sample"}),
        ({"_class_name": "DDPMScheduler", "predict_epsilon": None}, {}),
        ({"_class_name": "DDPMScheduler", "predict_epsilon": False}, {"prediction_type": "sample"}),
        # A file of 0.9 that still carries the default of 0.8.
        (DPM | {"predict_epsilon": True, "prediction_type": "v_prediction"}, {}),
        # 0.15.
        (INVERSE | {"set_alpha_to_zero": False}, {"set_alpha_to_one": False}),
        (INVERSE | {"set_alpha_to_zero": True, "set_alpha_to_one": False}, {"set_alpha_to_one": True}),
        (SD | {"_class_name": "DDIMScheduler", "set_alpha_to_zero": True, "set_alpha_to_one": False}, {}),
    ],
)
def test_options_of_early_versions(early, today):
    plain = {key: value for key, value in early.items() if key not in (*EARLY, "predict_epsilon", "set_alpha_to_zero")}
    ours, theirs = load(early), load(plain | today)
    assert ours._replace(process=None, stated=()) == theirs._replace(process=None, stated=())
    for steps in (4, 20):
        np.testing.assert_array_equal(ours.at(steps)[0], theirs.at(steps)[0])


def test_another_update_rule_takes_the_file_s_grid_and_ends_at_its_final_alpha():
    """The rule of XL's file ends at clean data, whatever its set_alpha_to_one says; another rule reads that."""
    published, _ = load(XL).at(20)
    times, run = load(XL).at(20, sampler="dpmpp_2m")
    np.testing.assert_array_equal(times[:-1], published[:-1])
    np.testing.assert_array_equal(run.process.time_input(jnp.asarray(times[:-1])), np.arange(19, -1, -1) * 50 + 1)
    assert published[-1] == 0 and times[-1] == np.float32(1e-3)
    assert (run.sampler, run.choices, run.prediction) == ("dpmpp_2m", (), "eps")
    without = {key: value for key, value in XL.items() if key != "set_alpha_to_one"}
    assert load(without).at(20, sampler="ddim")[0][-1] == 0
    assert load(without | {"set_alpha_to_one": True}).at(20, sampler="ddim")[0][-1] == 0


# Some of every family: those that ask between the grid's times, remember, and draw noise.
FAMILIES = ("midpoint", "dpm_2", "dpm_solver_3", "dpmpp_2m", "uni_pc", "plms", "euler_ancestral", "dpmpp_sde")


@pytest.mark.parametrize("name", FAMILIES)
def test_samplers_run_on_a_published_grid(name):
    """From the noise of the file to near the data of a Gaussian, in 20 steps of XL's file."""
    times, run = load(XL).at(20, sampler=name)
    method, noise = run.method(), np.random.default_rng(0).standard_normal((256, 2)).astype(np.float32)
    x_T = jnp.asarray(run.noise_scale(times[0]) * noise)
    denoise = run.clipped(GAUSSIAN.denoiser(run.process))
    key = jax.random.key(0) if method.stochastic else None
    x = jax.jit(lambda x: sample(method, denoise, run.process, x, jnp.asarray(times), key))(x_T)
    np.testing.assert_allclose(np.mean(x, 0), GAUSSIAN.mean, atol=0.25)
    np.testing.assert_allclose(np.std(x @ GAUSSIAN.rotation, 0), GAUSSIAN.std, rtol=0.3)


def test_one_schedule_serves_every_number_of_steps_where_nothing_depends_on_it():
    for config in (
        SD1,
        XL,
        DPM,
        SD | {"_class_name": "DDIMScheduler"},
        SD | {"_class_name": "UniPCMultistepScheduler"},
    ):
        schedule = load(config)
        runs = {schedule.at(steps)[1] for steps in (5, 20, 50)} | {schedule.at(20, strength=0.5)[1]}
        assert len(runs) == 1, config["_class_name"]
    # Below 15 steps DPM-Solver lowers orders, and the network takes Karras's levels as whole entries.
    schedule = load(DPM | {"solver_order": 3, "final_sigmas_type": "sigma_min"})
    assert schedule.at(5)[1].choices == (("final", (2, 1)),) and schedule.at(20)[1].choices == ()
    schedule = load(DPM | {"use_karras_sigmas": True})
    assert schedule.at(20)[1] == schedule.at(20)[1] != schedule.at(5)[1]


def test_noise_scale():
    sigma = lambda schedule, t: float(schedule.process.sigma(jnp.float32(t)))  # noqa: E731
    for spacing, unit in (("leading", True), ("trailing", False), ("linspace", False)):
        times, schedule = load(XL | {"timestep_spacing": spacing}).at(20)
        assert schedule.noise_scale(times[0]) == (1 if unit else sigma(schedule, times[0]))
    times, schedule = load({"_class_name": "CMStochasticIterativeScheduler"}).at(2)
    assert schedule.noise_scale(times[0]) == 80
    # v-prediction from pure noise: the table's last entry.
    times, schedule = load(XL | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}).at(20)
    assert times[0] == 1 and schedule.noise_scale(1.0) == pytest.approx(1, abs=1e-6)


def constant(value):
    def denoise(x_t, t):
        x = jnp.broadcast_to(jnp.asarray(value, x_t.dtype), x_t.shape)
        return Clean(x, (x_t - x) / 2)

    return denoise


def test_clipping():
    """eps stays the network's in DDIM; elsewhere it explains x_t again. The dynamic threshold lies between 1 and sample_max_value."""
    x_t, t = jnp.asarray([[0.5, -3.0, 0.25, 0.0]]), jnp.float32(0.5)
    x = jnp.asarray([[2.0, -1.0, 0.25, 0.0]])
    config = SD | {"_class_name": "DDIMScheduler", "clip_sample_range": 0.8}
    for sampler, keeps in (("ddim", True), ("euler", False)):
        _, run = load(config).at(10, sampler=sampler)
        clean = run.clipped(constant(x))(x_t, t)
        np.testing.assert_allclose(clean.x, [[0.8, -0.8, 0.25, 0.0]])
        eps, alpha, sigma = constant(x)(x_t, t).eps, run.process.alpha(t), run.process.sigma(t)
        np.testing.assert_allclose(
            clean.eps, eps if keeps else jnp.where(clean.x == x, eps, (x_t - alpha * clean.x) / sigma)
        )
    for most, s in ((1.0, 1.0), (1.3, 1.3), (9.0, 1.5)):
        dynamic = {"thresholding": True, "sample_max_value": most, "dynamic_thresholding_ratio": 5 / 6}
        clean = load(DPM | dynamic).at(10)[1].clipped(constant(x))(x_t, t)
        np.testing.assert_allclose(clean.x, np.clip(x, -s, s) / s, rtol=1e-6)


def test_consistency_functions_are_the_identity_at_their_first_level():
    x_t = jnp.asarray([[0.3, -0.7]])
    _, run = load({"_class_name": "CMStochasticIterativeScheduler", "clip_denoised": False}).at(2)
    np.testing.assert_allclose(run.clipped(constant(5.0))(x_t, jnp.float32(0)).x, x_t, atol=1e-5)
    lcm = load(SD | {"_class_name": "LCMScheduler"})
    np.testing.assert_allclose(lcm.at(4)[1].clipped(constant(5.0))(x_t, jnp.float32(1e-3)).x, x_t, atol=1e-6)
    assert lcm.at(4, sampler="ddim")[1].boundary is None


def test_ddim_inverts_its_own_file_where_its_steps_leave_the_grid():
    """13 steps of `trailing` are no whole number of entries: downwards as published, upwards along the grid."""
    schedule = load(SD | {"_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "trailing"})
    times, run = schedule.at(13)
    assert run.loop == (76 / 1000, 0.0)
    assert times[-1] == np.float32(
        1e-3
    )  # where 13 steps of 76 entries end, noise left, though set_alpha_to_one is True
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2)), jnp.float32)
    denoise = GAUSSIAN.denoiser(run.process)
    up = sample(run.method(), denoise, run.process, x, jnp.asarray(times[::-1].copy()))
    plain = sample(SAMPLERS["ddim"](), denoise, run.process, x, jnp.asarray(times[::-1].copy()))
    np.testing.assert_array_equal(up, plain)


def refused(config, match, **at):
    with pytest.raises(ValueError, match=match):
        load(config).at(**({"steps": 10} | at))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_values": [1, 2]}, "timestep_values is .1, 2., expected None"),
        ({"predict_epsilon": "no"}, "predict_epsilon is 'no', expected True or False"),
        ({"predict_epsilon": False, "prediction_type": "epsilon"}, "prediction_type is 'epsilon', expected 'sample'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000, expected a whole number from 1 to"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, expected a whole number"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000', expected a whole number"),
        ({"beta_end": math.nan}, "beta_end is nan, expected a finite number"),
        ({"beta_start": "a"}, "beta_start is 'a', expected a number"),
        ({"clip_sample": "no"}, "clip_sample is 'no', expected true or false"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name is .'DDIMScheduler'., expected one of"),
    ],
)
def test_values_that_are_none_are_refused(options, message):
    refused(SD | {"_class_name": "DDIMScheduler"} | options, message)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_unknown_options_are_refused_by_every_class(name):
    refused({"_class_name": name, "use_magic": 3}, rf"{name}: option use_magic \(here 3\) is unknown")
    load({"_class_name": name, "skip_prk_steps": True, "sampling_eps": 1e-5})


@pytest.mark.parametrize(
    "config, match",
    [
        ({"_class_name": "SASolverScheduler"}, "_class_name is 'SASolverScheduler', expected one of DDIMScheduler"),
        ({}, "_class_name is None"),
        (SD1 | {"beta_schedule": "sigmoid"}, "PNDMScheduler: beta_schedule is 'sigmoid', expected 'linear' or"),
        (SD1 | {"prediction_type": "sample"}, "PNDMScheduler: prediction_type is 'sample'"),
        (SD1 | {"timestep_spacing": "even"}, "PNDMScheduler: timestep_spacing is 'even'"),
        (SD1 | {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 entries, expected num_train_timesteps, 1000"),
        (XL | {"interpolation_type": "cubic"}, "interpolation_type is 'cubic'"),
        (
            XL | {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas are both True",
        ),
        (
            XL | {"use_karras_sigmas": True, "sigma_max": 700.0},
            "noisiest level is 700, expected at most the table's, 14.6",
        ),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "DDPMScheduler: variance_type is 'learned'"),
        (DPM | {"solver_order": 4}, "DPMSolverMultistepScheduler: solver_order is 4, expected 1 or 2 or 3"),
        (DPM | {"algorithm_type": "sde-dpmsolver"}, "algorithm_type is 'sde-dpmsolver'"),
        (DPM | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order is 3, expected 1 or 2 beside"),
        (DPM | {"algorithm_type": "dpmsolver"}, "algorithm_type is 'dpmsolver', expected one with"),
        (DPM | {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        (
            DPM | {"use_flow_sigmas": True, "use_karras_sigmas": True},
            "use_karras_sigmas is True, expected False beside",
        ),
        (DPM | {"use_dynamic_shifting": True}, "use_dynamic_shifting is True, expected False"),
        (DPM | {"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0 is False, expected True"),
        (DPM | {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, r"disable_corrector is \[0\]"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
            "final_sigmas_type is 'sigma_min', expected 'zero' beside use_karras_sigmas",
        ),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, "set_alpha_to_one is False, expected True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas is True"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "expected the size of the image",
        ),
        ({"_class_name": "CMStochasticIterativeScheduler", "s_noise": 1.5}, "s_noise is 1.5, expected 1.0"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 5000}, "original_inference_steps is 5000"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(config, match):
    refused(config, match)


@pytest.mark.parametrize(
    "config, at, match",
    [
        (SD1, {"steps": 0}, "steps is 0, expected at least 1"),
        (SD1, {"steps": 1001}, "steps is 1001, expected at most 1000"),
        (SD1, {"steps": 1000}, "steps is 1000, which needs entries 1 to 1000"),
        (DPM, {"steps": 1000}, "steps is 1000, expected fewer than"),
        (SD1, {"sampler": "magic"}, "sampler 'magic' is unknown; there are annealed_langevin"),
        (SD1, {"strength": 0.05}, "strength 0.05 of 10 steps runs none"),
        (SD1, {"strength": 1.5}, "strength 1.5 of 10 steps"),
        (SD1 | {"skip_prk_steps": False}, {"steps": 3}, "PNDMScheduler: skip_prk_steps is False"),
        (SD1 | {"skip_prk_steps": False, "timestep_spacing": "linspace"}, {}, "PNDMScheduler: skip_prk_steps is False"),
        (
            SD | {"_class_name": "DDIMInverseScheduler", "timestep_spacing": "trailing"},
            {"steps": 13},
            "that divides 1000",
        ),
        ({"_class_name": "LCMScheduler"}, {"steps": 51}, "steps is 51, expected at most original_inference_steps, 50"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, {"steps": 41}, "steps is 41, expected at most"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"sigmas": (0.5, 1.0)}, "expected 10 falling numbers"),
        (ZERO_SNR, {}, "prediction is eps, and there is nothing but noise at t = 1"),
        (ZERO_SNR | {"timestep_spacing": "linspace"}, {"sampler": "dpmpp_2m"}, "nothing but noise at t = 1"),
    ],
)
def test_runs_that_cannot_be_are_refused(config, at, match):
    refused(config, match, **at)


@pytest.mark.parametrize(
    "options, at",
    [({"prediction_type": "v_prediction"}, {}), ({"timestep_spacing": "leading"}, {}), ({}, {"strength": 0.5})],
)
def test_zero_terminal_snr_is_drawn_from_where_the_network_says_something(options, at):
    times, run = load(ZERO_SNR | options).at(10, **at)
    assert (run.process.alpha(jnp.asarray(times[0])) == 0) == ("prediction_type" in options)


@pytest.mark.parametrize(
    "config, grid, sampler, match",
    [
        (SD1, "karas", None, "grid 'karas' is unknown for published pipelines; there are leading"),
        (SD1, "karras", None, "sampler 'plms' takes equal steps, not the grid 'karras'; another --sampler does"),
        (XL, "lu", None, "sampler 'euler' has no grid 'lu'; dpmpp_2m has it"),
        ({"_class_name": "LCMScheduler"}, "trailing", None, "LCMScheduler has no grid 'trailing'"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "karras", "euler", "has no grid 'karras'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "leading", None, "has no grid 'leading'"),
    ],
)
def test_grids_that_make_no_sense_are_refused(config, grid, sampler, match):
    with pytest.raises(ValueError, match=match):
        respaced(load(config), grid, sampler)


def test_a_rule_without_the_grid_in_its_class_takes_eulers_levels():
    for sampler in ("euler_ancestral", "dpmpp_2s", "seeds_2"):
        times, run = respaced(load(SD1), "karras", sampler).at(9, sampler=sampler)
        reference, _ = respaced(load(SD1), "karras", "euler").at(9)
        np.testing.assert_array_equal(times, reference)
        assert run.sampler == sampler


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file, expected a scheduler_config"):
        load(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"scheduler_config.json: not JSON"):
        load(tmp_path)
    with pytest.raises(ValueError, match="sampler 'ddim' has no option 'gamma'"):
        load(SD1).at(5, sampler="ddim")[1].method(gamma=1)
    assert math.isinf(dict(load(DPM | {"lambda_min_clipped": json.loads("-Infinity")}).config)["lambda_min_clipped"])
