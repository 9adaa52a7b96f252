"""Schedules read from a scheduler's config against diffusers' own loop of that scheduler: the same noise, and an exact Gaussian model
that both evaluate at the number which the scheduler feeds it, as a network would be."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import schedules
from ldm_jax.diffusion import editing, grids
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.denoiser import make_denoiser
from ldm_jax.diffusion.exact import GAUSSIAN
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.samplers import sample
from ldm_jax.diffusion.samplers.brownian import draws, fold
from ldm_jax.diffusion.samplers.sampler import noise, row_keys

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

NOISE = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
KEY = jax.random.key(5)
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEADING, TRAILING = dict(timestep_spacing="leading", steps_offset=1), dict(timestep_spacing="trailing")
LINSPACE = dict(timestep_spacing="linspace")
V, SAMPLE = dict(prediction_type="v_prediction"), dict(prediction_type="sample")
FLOW = dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
THRESHOLD = dict(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9)
# Classes whose state is x_t / alpha.
BY_LEVEL = (
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
)


@functools.cache
def model_of(process, prediction):
    """model(x, input) -> output: exact for a Gaussian at the time that the input stands for in this process."""

    @jax.jit
    def model(x, told):
        if process.levels is not None:
            t = jnp.minimum((told + 1) / process.levels, 1)  # a compiled quotient may exceed 1
        elif process.affine == 1:
            t = told / 1000
        elif prediction == "score":
            t = P.inverse_log_snr(process, -2 * jnp.log(told))
        elif prediction == "edm":
            t = P.inverse_log_snr(process, -2 * told / 250)
            x = x * P.per_row(P.prior_std(process, t), x)
        else:
            t = P.inverse_log_snr(process, -8 * told)
        clean = GAUSSIAN.denoiser(process)(x, t)
        return target(prediction, process, clean.x, clean.eps, t)

    return model


# Processes by what they are: every load makes its own, and a program is compiled for one.
PROCESSES = {}


def make(name, carried=None, **options):
    """diffusers' scheduler, and our schedule of the config that it writes, with more that a file may carry."""
    theirs = getattr(diffusers, f"{name}Scheduler")(**options)
    return theirs, shared(schedules.load(dict(theirs.config) | {"_class_name": f"{name}Scheduler"} | (carried or {})))


def shared(schedule):
    """The schedule with the process that is already there, if it is the same."""
    process, t = schedule.process, jnp.asarray([1e-4, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0])
    key = tuple(np.concatenate([f(t) for f in (process.alpha, process.sigma, process.time_input)]).tolist())
    return schedule._replace(process=PROCESSES.setdefault(key, process))


def follow(scheduler, schedule, steps, extra=None, **options):
    """The last state of diffusers' generic loop, in the scaling x_t = alpha x + sigma eps; its arrays have an axis of length 1 more."""
    model = model_of(schedule.process, schedule.prediction)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # of timesteps that occur twice the first would be left out
    x = torch.tensor(NOISE)[..., None] * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        scaled = scaled.float().numpy()[..., 0]
        output = np.asarray(model(scaled, np.float32(t)))
        output = output if extra is None else np.concatenate([output, extra(scaled)], 1)
        x = scheduler.step(torch.tensor(output)[..., None], t, x, **options).prev_sample
    x = x.float().numpy()[..., 0]
    if type(scheduler).__name__.removesuffix("Scheduler") not in BY_LEVEL:
        return x
    return x / np.sqrt(1 + float(scheduler.sigmas[len(scheduler.timesteps)]) ** 2)


@functools.cache
def program(run, model, extra, options):
    """(x_T, times f[25]) -> x, compiled once for all runs of one rule: shorter grids are padded."""

    def apply(params, x, t, cond):
        output = model(x, t)
        return output if extra is None else jnp.concatenate([output, extra(x)], 1)

    denoise = run.clipped(
        make_denoiser(apply, None, run.process, run.prediction, learned_variance=run.learned_variance)
    )
    method = run.method(**dict(options))
    return jax.jit(lambda x, times: sample(method, denoise, run.process, x, times, KEY if method.stochastic else None))


def ours(schedule, steps, sampler=None, extra=None, strength=1.0, x=NOISE, **options):
    times, run = schedule.at(steps, sampler=sampler, strength=strength)
    bare = run._replace(name="", config=(), prior=0.0, alpha_to_one=None)
    x_T = np.float32(run.noise_scale(times[0])) * x
    go = program(bare, model_of(schedule.process, schedule.prediction), extra, tuple(options.items()))
    return np.asarray(go(x_T, grids.pad(jnp.asarray(times), 24)))


def same(x, y, tolerance=1e-5):
    assert np.isfinite(y).all()
    np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max(), rtol=0)


def levels(name):
    return {f"use_{name}_sigmas": True}


def case(name, *steps, tolerance=1e-5, **options):
    return pytest.param(
        name,
        steps,
        options,
        tolerance,
        id="-".join([name, *(f"{k}={v}" for k, v in options.items() if SD.get(k) != v and k != "trained_betas")]),
    )


FEW, MANY = (5, 13, 20), (20,)
SIGMA_MIN = dict(final_sigmas_type="sigma_min")
DETERMINISTIC = [
    case("DDIM", *FEW, **SD, **LEADING, clip_sample=False, set_alpha_to_one=False),
    case("DDIM", *FEW, **SD, **TRAILING, **V, clip_sample=False),
    case("DDIM", 13, **SD, **LINSPACE, **SAMPLE, clip_sample=False, set_alpha_to_one=False),
    case("DDIM", 5, 20, clip_sample_range=0.8),
    case("DDIM", 13, **SD, **TRAILING, **THRESHOLD),
    case("DDIM", 5, 20, **SD, **TRAILING, **V, clip_sample=False, rescale_betas_zero_snr=True),
    case("DDIM", 5, trained_betas=np.linspace(1e-3, 0.05, 100).tolist(), num_train_timesteps=100, clip_sample=False),
    case("PNDM", *FEW, **SD, **LEADING, skip_prk_steps=True),
    case("PNDM", 1, 20, **SD, **LEADING, **V, skip_prk_steps=True),
    case("PNDM", 13, **SD, **TRAILING, skip_prk_steps=True, set_alpha_to_one=True),
    case("PNDM", 13, **SD, **LINSPACE, **V, skip_prk_steps=True),
    case("PNDM", *FEW, **SD, **LEADING),
    case("EulerDiscrete", *FEW, **SD, **LEADING),
    case("EulerDiscrete", *FEW, **SD, **LINSPACE),
    case("EulerDiscrete", *FEW, **SD, **TRAILING, **levels("karras")),
    case("EulerDiscrete", *FEW, **SD, **LEADING, **levels("exponential")),
    case("EulerDiscrete", *FEW, **SD, **LINSPACE, **levels("beta")),
    case("EulerDiscrete", *FEW, **SD, **LINSPACE, **SIGMA_MIN),
    case("EulerDiscrete", 13, **SD, **LEADING, interpolation_type="log_linear"),
    case("EulerDiscrete", 20, **SD, **LEADING, **SAMPLE, **levels("karras"), sigma_min=0.05, sigma_max=10.0),
    # Noise of 4096 at first, in single precision.
    case("EulerDiscrete", 5, 20, **SD, **TRAILING, **V, rescale_betas_zero_snr=True, tolerance=5e-5),
    case(
        "EulerDiscrete",
        5,
        20,
        **SD,
        **LEADING,
        **V,
        **levels("karras"),
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
    ),
    case("EulerDiscrete", 20, beta_schedule="squaredcos_cap_v2", **LEADING),
    case("HeunDiscrete", *FEW, **SD, **LINSPACE),
    case("HeunDiscrete", *FEW, **SD, **TRAILING, **levels("karras")),
    case("HeunDiscrete", 13, **SD, **LEADING, clip_sample=True, clip_sample_range=0.8),
    case("LMSDiscrete", *FEW, **SD, **TRAILING),
    case("LMSDiscrete", *FEW, **SD, **LINSPACE, **levels("karras")),
    case("KDPM2Discrete", *FEW, **SD, **LINSPACE),
    case("KDPM2Discrete", 13, **SD, **LEADING, **levels("karras")),
    case("DPMSolverMultistep", *FEW, **SD, **LEADING),
    case("DPMSolverMultistep", *FEW, **SD, **LINSPACE),
    case("DPMSolverMultistep", 20, **SD, **TRAILING, **V, rescale_betas_zero_snr=True),
    case("DPMSolverMultistep", 13, 20, **SD, solver_order=3),
    case("DPMSolverMultistep", 13, 20, **SD, **LEADING, **SIGMA_MIN, solver_order=3, solver_type="heun"),
    case("DPMSolverMultistep", 20, **SD, **LEADING, **SIGMA_MIN, solver_type="heun", euler_at_final=True),
    case("DPMSolverMultistep", 20, **SD, solver_order=1),
    case("DPMSolverMultistep", 5, **SD, **LEADING, **SIGMA_MIN, algorithm_type="dpmsolver"),
    case("DPMSolverMultistep", 13, **SD, **LEADING, **SIGMA_MIN, algorithm_type="dpmsolver", solver_order=3),
    case("DPMSolverMultistep", 13, **SD, **LEADING, **SIGMA_MIN, algorithm_type="dpmsolver", solver_type="heun"),
    case("DPMSolverMultistep", 13, **SD, **levels("karras"), **SIGMA_MIN, solver_order=3),
    case("DPMSolverMultistep", 20, **SD, **levels("exponential")),
    case("DPMSolverMultistep", 5, **SD, **levels("beta"), **THRESHOLD),
    case("DPMSolverMultistep", 13, **SD, use_lu_lambdas=True),
    case("DPMSolverMultistep", 20, **TRAILING, beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1),
    case("DPMSolverMultistep", 13, beta_schedule="squaredcos_cap_v2", **levels("karras")),
    case("DPMSolverMultistep", 13, **FLOW),
    case("UniPCMultistep", *FEW, **SD),
    case("UniPCMultistep", 5, 20, **SD, **TRAILING, **V, solver_order=3),
    case("UniPCMultistep", 13, **SD, **LEADING, **SIGMA_MIN, solver_order=3, solver_type="bh1"),
    case("UniPCMultistep", 13, **SD, **LEADING, **SIGMA_MIN, solver_order=3, lower_order_final=False),
    case("UniPCMultistep", 20, **SD, **levels("karras"), **SAMPLE),
    case("UniPCMultistep", 20, **FLOW, shift_terminal=0.1),
    case("UniPCMultistep", 5, **(FLOW | levels("karras")), sigma_min=0.01, sigma_max=200.0),
    case("DEISMultistep", *FEW, **SD, **LEADING),
    case("DEISMultistep", 13, **SD, **LEADING, **V, solver_order=3),
    case("DEISMultistep", 13, **SD, **levels("karras"), solver_order=3),
    # Weights that cancel, in single precision.
    case("DEISMultistep", 5, **FLOW, tolerance=1e-4),
    case("FlowMatchEulerDiscrete", *FEW, shift=3.0),
    case("FlowMatchEulerDiscrete", *FEW, shift=3.0, shift_terminal=0.1),
    case("FlowMatchEulerDiscrete", 13, shift=3.0, **levels("karras")),
    case("FlowMatchEulerDiscrete", 13, shift=3.0, **levels("exponential")),
    case("FlowMatchEulerDiscrete", 13, shift=3.0, **levels("beta")),
    case("DDIMInverse", 5, 20, **SD, **LEADING, clip_sample=False, set_alpha_to_one=False),
    case("DDIMInverse", 20, **SD, **TRAILING, **V, clip_sample_range=0.8),
]


KARRAS, BETA = levels("karras"), levels("beta")
RESPACED = [
    ("PNDM", "euler", "karras", "EulerDiscrete", KARRAS),
    ("DDIM", "euler", "trailing", "EulerDiscrete", TRAILING),
    ("EulerDiscrete", None, "exponential", "EulerDiscrete", levels("exponential")),
    ("EulerDiscrete", None, "linspace", "EulerDiscrete", LINSPACE),
    ("PNDM", None, "trailing", "PNDM", TRAILING),
    ("PNDM", "ddim", "trailing", "DDIM", TRAILING | {"clip_sample": False}),
    ("PNDM", "dpmpp_2m", "karras", "DPMSolverMultistep", KARRAS),
    ("EulerDiscrete", "dpmpp_3m", "lu", "DPMSolverMultistep", {"use_lu_lambdas": True, "solver_order": 3}),
    ("DPMSolverMultistep", "heun", "beta", "HeunDiscrete", BETA),
    ("DPMSolverMultistep", "uni_pc_bh2", "trailing", "UniPCMultistep", TRAILING),
    ("FlowMatchEulerDiscrete", None, "karras", "FlowMatchEulerDiscrete", KARRAS),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, sampler, grid, other, options", RESPACED)
def test_another_spacing_is_that_of_the_rules_class(name, sampler, grid, other, options):
    """from_config of the file with the one option, as a user of diffusers asks for Karras's levels."""
    own = {"shift": 3.0} if name.startswith("Flow") else SD | {"steps_offset": 1}
    own |= {"skip_prk_steps": True} if name == "PNDM" else {}
    theirs = getattr(diffusers, f"{other}Scheduler").from_config(make(name, **own)[0].config, **options)
    schedule = schedules.load(own | {"_class_name": f"{name}Scheduler", "clip_sample": False})
    run = shared(schedules.respaced(schedule, grid, sampler))
    for n in (5, 13):
        same(ours(run, n, sampler), follow(theirs, run, n))


@pytest.mark.parametrize("original", [50, 40, 999])
def test_latent_consistency_steps_of_a_picture(original):
    """diffusers' timesteps for every (steps, strength), refusals included."""
    theirs, schedule = make("LCM", **SD, original_inference_steps=original)
    ran = 0
    for steps in (1, 2, 4, 7, 8):
        for strength in (0.02, 0.1, 0.2, 0.3, 0.5, 0.77, 1.0):
            try:
                theirs.set_timesteps(steps, strength=strength)
            except ValueError:
                with pytest.raises(ValueError, match="expected at most"):
                    schedule.at(steps, strength=strength, distilled=True)
                continue
            times, run = schedule.at(steps, strength=strength, distilled=True)
            np.testing.assert_array_equal(run.process.time_input(jnp.asarray(times[:-1])), theirs.timesteps.numpy())
            assert times[-1] == 0
            ran += 1
    assert ran >= 25


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, steps, options, tolerance", DETERMINISTIC)
def test_deterministic(name, steps, options, tolerance):
    theirs, schedule = make(name, **options)
    for n in steps:
        same(ours(schedule, n), follow(theirs, schedule, n), tolerance)


def drawn(steps, like=NOISE):
    """The unit noises of our first steps."""
    keys = row_keys(KEY, len(like))
    return [np.asarray(draws(fold(keys, i), jnp.asarray(like), 1)[0]) for i in range(steps)]


def hand(monkeypatch, scheduler, noises):
    """Make the scheduler take these, in order, for its noise."""
    given = iter(noises)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(next(given))[..., None])


def learned(x):
    """What a network says of its variance."""
    return np.tanh(x) if isinstance(x, np.ndarray) else jnp.tanh(x)


DDPM = SD | dict(clip_sample=False)
STOCHASTIC = [
    case("DDPM", *FEW, **DDPM),
    case("DDPM", 13, **SD, variance_type="fixed_large", clip_sample_range=0.8),
    # Noise in its last step too.
    case("DDPM", 13, **DDPM, **TRAILING, variance_type="fixed_large"),
    case("DDPM", 13, **DDPM, variance_type="learned_range", **V),
    case("DDPM", 13, **DDPM, **TRAILING, variance_type="learned_range"),
    case("DDPM", 13, **DDPM, **LINSPACE, variance_type="fixed_small_log", rescale_betas_zero_snr=True, **SAMPLE),
    case("EulerAncestralDiscrete", *FEW, **SD, **LEADING),
    case("EulerAncestralDiscrete", 5, 20, **SD, **LINSPACE, **V),
    case("KDPM2AncestralDiscrete", *FEW, **SD, **LEADING),
    case("KDPM2AncestralDiscrete", 13, **SD, **LINSPACE, **levels("exponential")),
    case("DPMSolverMultistep", *FEW, **SD, algorithm_type="sde-dpmsolver++"),
    case("DPMSolverMultistep", 13, **SD, algorithm_type="sde-dpmsolver++", solver_type="heun", **levels("karras")),
    case("DPMSolverMultistep", 13, **SD, **LEADING, **SIGMA_MIN, algorithm_type="sde-dpmsolver++"),
    case("DPMSolverMultistep", 13, **SD, algorithm_type="sde-dpmsolver++", solver_order=1, **THRESHOLD),
    case("LCM", 1, 4, 20),
    case("LCM", 4, **V, clip_sample=True, clip_sample_range=0.8, original_inference_steps=25),
    case("TCD", 1, 4, 20),
    case("FlowMatchEulerDiscrete", 5, 20, shift=3.0, stochastic_sampling=True),
    # A state of 80 at first, in single precision.
    case("CMStochasticIterative", 1, 2, 20, tolerance=3e-5),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, steps, options, tolerance", STOCHASTIC)
def test_stochastic(monkeypatch, name, steps, options, tolerance):
    theirs, schedule = make(name, **options)
    extra = learned if schedule.learned_variance else None
    for n in steps:
        hand(monkeypatch, theirs, drawn(n))
        same(ours(schedule, n, extra=extra), follow(theirs, schedule, n, extra=extra), tolerance)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, option", [("DDIM", dict(eta=0.6)), ("TCD", dict(eta=0.5))])
def test_eta(monkeypatch, name, option):
    theirs, schedule = make(name, **SD, **(dict(clip_sample=False) | LEADING if name == "DDIM" else {}))
    hand(monkeypatch, theirs, drawn(13))
    mine = {"gamma": option["eta"]} if name == "TCD" else option
    same(ours(schedule, 13, **mine), follow(theirs, schedule, 13, **option))


def test_score_sde_ve(monkeypatch):
    """diffusers' pipeline: corrections, then a prediction; its norms are means over the batch, here one row of many entries."""
    theirs, schedule = make("ScoreSdeVe", sigma_min=0.05, sigma_max=30.0, snr=0.15, correct_steps=2)
    model, steps = model_of(schedule.process, "score"), 20
    x_T = np.random.default_rng(3).standard_normal((1, 16, 2)).astype(np.float32)
    keys = row_keys(KEY, 1)
    order = [np.asarray(noise(fold(fold(keys, i), j), jnp.asarray(x_T))) for i in range(steps) for j in (1, 2, 0)]
    given = iter(order)
    module = sys.modules[type(theirs).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(next(given)))
    theirs.set_timesteps(steps)
    theirs.set_sigmas(steps)
    x = torch.tensor(x_T) * theirs.init_noise_sigma
    for i, t in enumerate(theirs.timesteps):
        told = np.float32(theirs.sigmas[i])
        for _ in range(2):
            x = theirs.step_correct(torch.tensor(np.array(model(x.numpy(), told))), x).prev_sample
        output = theirs.step_pred(torch.tensor(np.array(model(x.numpy(), told))), t, x)
        x = output.prev_sample
    same(ours(schedule, steps, x=x_T), output.prev_sample_mean.numpy(), 1e-4)


FILES = [
    ("PNDM", SD | LEADING | dict(skip_prk_steps=True), {}),
    ("PNDM", SD | TRAILING | V | dict(set_alpha_to_one=True, skip_prk_steps=True), {}),
    ("EulerDiscrete", SD | LEADING, {}),
    ("EulerDiscrete", SD | LEADING | V, dict(set_alpha_to_one=False, skip_prk_steps=True)),
    ("EulerAncestralDiscrete", SD | LEADING, {}),
    ("HeunDiscrete", SD | LEADING, {}),
    ("LMSDiscrete", SD | LEADING, {}),
    ("KDPM2Discrete", SD | LEADING, {}),
    ("DDPM", SD | LEADING | dict(clip_sample_range=0.8), {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, options, carried", FILES)
def test_ddim_on_another_class_s_file_is_from_config(name, options, carried):
    """carried: options of other classes, as Stable Diffusion XL's file has DDIM's set_alpha_to_one. A clipping is what the file's own
    class has, else none."""
    theirs, schedule = make(name, carried, **options)
    # As a file has it: in memory diffusers also notes which options were left at their defaults, and drops them.
    config = {key: value for key, value in theirs.config.items() if not key.startswith("_")} | carried
    theirs = diffusers.DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    for n in (5, 20):
        same(ours(schedule, n, sampler="ddim"), follow(theirs, schedule, n))


class Pipeline:
    """What diffusers' get_timesteps asks of a pipeline."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


CUTS = [(5, 0.8), (5, 0.5), (2, 0.8), (20, 0.6)]
CUT = [
    ("PNDM", SD | LEADING | dict(skip_prk_steps=True), CUTS),
    ("PNDM", SD | LEADING | V | dict(skip_prk_steps=True), [(5, 0.8)]),
    ("DDIM", SD | TRAILING | dict(clip_sample=False), [(5, 0.8), (13, 0.5)]),
    ("EulerDiscrete", SD | LINSPACE, CUTS[:2]),
    ("HeunDiscrete", SD | LINSPACE, CUTS[:2]),
    ("DPMSolverMultistep", SD | dict(solver_order=3), [(13, 0.8)]),
    ("UniPCMultistep", SD, [(5, 0.8)]),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, options, cuts", CUT, ids=lambda value: value if isinstance(value, str) else "")
def test_image_to_image(name, options, cuts):
    """diffusers cuts its list of timesteps, of which PNDM's has one twice and second-order schedulers' most of them twice."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline

    theirs, schedule = make(name, **options)
    model = model_of(schedule.process, schedule.prediction)
    x_0, z = (np.random.default_rng(i).standard_normal((8, 2)).astype(np.float32) for i in (1, 2))
    for steps, strength in cuts:
        theirs.set_timesteps(steps)
        wanted, _ = StableDiffusionImg2ImgPipeline.get_timesteps(Pipeline(theirs), steps, strength, "cpu")
        x = theirs.add_noise(*(torch.tensor(a)[..., None] for a in (x_0, z)), wanted[:1].repeat(8))
        for t in wanted:
            scaled = theirs.scale_model_input(x, t).float().numpy()[..., 0]
            x = theirs.step(torch.tensor(np.array(model(scaled, np.float32(t))))[..., None], t, x).prev_sample
        times, run = schedule.at(steps, strength=strength)
        start = np.asarray(P.corrupt(run.process, jnp.asarray(x_0), jnp.asarray(z), times[0]))
        x_T = start / np.float32(run.noise_scale(times[0]))
        same(ours(schedule, steps, strength=strength, x=x_T), x.float().numpy()[..., 0])


def test_an_image_held_beside_the_mask_meets_every_evaluation_of_pndm():
    """diffusers' inpainting replaces the kept region after each evaluation, the repeated one among them."""
    theirs, schedule = make("PNDM", **SD, **LEADING, skip_prk_steps=True)
    model, keep = model_of(schedule.process, "eps"), np.array([1.0, 0.0], np.float32)
    x_0, z = (np.random.default_rng(i).standard_normal((8, 2)).astype(np.float32) for i in (1, 2))
    theirs.set_timesteps(5)
    known = theirs.add_noise(torch.tensor(x_0), torch.tensor(z), theirs.timesteps[:1].repeat(8))
    x = torch.tensor(keep) * known + (1 - torch.tensor(keep)) * torch.tensor(z)
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(torch.tensor(np.array(model(x.numpy(), np.float32(t)))), t, x).prev_sample
        if i + 1 < len(theirs.timesteps):
            known = theirs.add_noise(torch.tensor(x_0), torch.tensor(z), theirs.timesteps[i + 1].repeat(8))
            x = torch.tensor(keep) * known + (1 - torch.tensor(keep)) * x
    times, run = schedule.at(5)
    denoise = make_denoiser(lambda params, x, t, cond: model(x, t), None, run.process, "eps")
    held = editing.preserve(run.method(), jnp.asarray(x_0), jnp.asarray(keep), jnp.asarray(z))
    mine = np.asarray(jax.jit(lambda x: sample(held, denoise, run.process, x, jnp.asarray(times)))(jnp.asarray(z)))
    same(mine[:, 1], x.numpy()[:, 1])


TOLD = [
    ("EulerDiscrete", SD | LINSPACE),
    ("EulerDiscrete", SD | LEADING | levels("karras")),
    ("KDPM2Discrete", SD | LINSPACE | levels("karras")),
    ("DPMSolverMultistep", SD | levels("karras")),
    ("DPMSolverMultistep", SD | levels("beta")),
    ("DPMSolverMultistep", levels("exponential")),
    ("UniPCMultistep", FLOW | dict(shift_terminal=0.1)),
    ("DEISMultistep", SD | levels("karras")),
    ("LCM", {}),
    ("DDIMInverse", SD | LEADING | dict(clip_sample=False)),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, options", TOLD)
def test_the_network_is_fed_their_timesteps(name, options):
    theirs, schedule = make(name, **options)
    for n in (4, 10, 20, 50) if name in ("DDIMInverse", "LCM") else (18, 43):
        theirs.set_timesteps(n)
        wanted = theirs.timesteps.numpy()
        wanted = wanted[[0, *range(2, len(wanted), 2)]] if name.startswith("KDPM2") else wanted
        times, run = schedule.at(n)
        told = np.asarray(run.process.time_input(jnp.asarray(times[:-1])))
        np.testing.assert_allclose(told, wanted, atol=3e-3, rtol=0)
        if name == "EulerDiscrete":
            met = np.exp(-0.5 * np.asarray(P.log_snr(run.process, jnp.asarray(times[:-1]))))
            np.testing.assert_allclose(met, theirs.sigmas[:-1], rtol=1e-5)
        if not np.issubdtype(wanted.dtype, np.floating):
            np.testing.assert_array_equal(told, wanted)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 1344)])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_is_flux_s(size, kind):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs, schedule = make("FlowMatchEulerDiscrete", use_dynamic_shifting=True, time_shift_type=kind, shift=3.0)
    sigmas = np.linspace(1, 1 / 8, 8)
    theirs.set_timesteps(sigmas=sigmas, mu=calculate_shift(size[0] // 16 * (size[1] // 16)))
    times, run = schedule.at(8, size, sigmas=tuple(sigmas))
    np.testing.assert_allclose(times, theirs.sigmas, atol=1e-6)
    np.testing.assert_allclose(run.process.time_input(jnp.asarray(times[:-1])), theirs.timesteps, rtol=1e-6)
