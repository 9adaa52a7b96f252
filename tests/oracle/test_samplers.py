"""Grids and trajectories against diffusers' schedulers: the same times, the same start, the exact eps of a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import grids
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.exact import GAUSSIAN
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.samplers.multistep import uni_pc, uni_pc_bh2

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

TABLE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VP, FLOW, EDM = P.discrete_vp("scaled_linear"), P.flow(), P.edm()
NOISE = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)


def compare(sampler, process, times, theirs, atol=1e-4, x_T=NOISE):
    """Our whole trajectory against a list of theirs, in the process's own scaling; sampler is one, or the name of one."""
    sampler = SAMPLERS[sampler]() if isinstance(sampler, str) else sampler
    run = jax.jit(lambda x, times: sample(sampler, GAUSSIAN.denoiser(process), process, x, times, trajectory=True))
    ours = np.asarray(run(jnp.asarray(x_T), jnp.asarray(times, jnp.float32)))
    assert len(theirs) == len(ours) - 1
    np.testing.assert_allclose(ours[1:], theirs, atol=atol, rtol=0)


def follow(scheduler, process, kind, per_step=1, times=None, in_ve=False, x_T=NOISE):
    """States of diffusers' loop, in the scaling x_t = alpha x + sigma eps; the exact model predicts `kind`.

    in_ve: the scheduler's state is x_t / alpha. times: where the model is asked, when the scheduler rounds its timesteps.
    """

    @jax.jit
    def model(x, t):
        clean = GAUSSIAN.denoiser(process)(x, t)
        return target(kind, process, clean.x, clean.eps, t)

    shrink = lambda i: 1 / np.sqrt(1 + float(scheduler.sigmas[i]) ** 2) if in_ve else 1.0  # noqa: E731
    x = torch.tensor(x_T) / shrink(0)
    states = []
    for i, index in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, index) if in_ve else x
        t = times[i] if times is not None else (float(index) + (process is VP)) / 1000
        x = scheduler.step(torch.tensor(np.array(model(scaled.numpy(), t))), index, x).prev_sample
        states.append(x.numpy() * shrink(i + 1))
    # A scheduler of two evaluations hands back its predictor first; its last step, into sigma = 0, has none.
    return states if per_step == 1 else [*states[1:-1:2], states[-1]]


def times_of(scheduler, process, per_step=1):
    """Our times of the scheduler's timesteps, ending in clean data; Heun's stand twice but for the first."""
    index = np.asarray(scheduler.timesteps, np.float64)
    index = index if per_step == 1 else index[[0, *range(1, len(index), 2)]]
    return np.append((index + (process is VP)) / 1000, 0.0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_table_grids_are_those_of_ddim(spacing, steps):
    scheduler = diffusers.DDIMScheduler(
        **TABLE, timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0
    )
    scheduler.set_timesteps(steps)
    times = grids.leading(VP, steps, offset=1) if spacing == "leading" else grids.GRIDS[spacing](VP, steps)
    np.testing.assert_array_equal(VP.time_input(times[:-1]), scheduler.timesteps.numpy())


@pytest.mark.parametrize("steps", [5, 20])
def test_karras_grid_is_that_of_euler_discrete(steps):
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    times = grids.karras(VP, steps - 1)
    np.testing.assert_allclose(np.exp(-0.5 * P.log_snr(VP, times)), scheduler.sigmas[:-1], rtol=1e-4)
    np.testing.assert_allclose(VP.time_input(times), scheduler.timesteps, atol=0.05)


@pytest.mark.parametrize("kind, name", [("eps", "epsilon"), ("v", "v_prediction"), ("x", "sample")])
def test_ddim(kind, name):
    scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing", prediction_type=name)
    scheduler.set_timesteps(20)
    compare("ddim", VP, times_of(scheduler, VP), follow(scheduler, VP, kind))


@pytest.mark.parametrize("karras", [False, True])
def test_euler_discrete(karras):
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, use_karras_sigmas=karras)
    scheduler.set_timesteps(20)
    compare("euler", VP, times_of(scheduler, VP), follow(scheduler, VP, "eps", in_ve=True))


@pytest.mark.parametrize("karras", [False, True])
def test_heun_discrete(karras):
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE, use_karras_sigmas=karras)
    scheduler.set_timesteps(20)
    compare("heun", VP, times_of(scheduler, VP, 2), follow(scheduler, VP, "eps", 2, in_ve=True))


@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m(karras):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=karras
    )
    scheduler.set_timesteps(20)
    # Its noise levels are Karras's but its timesteps are rounded: the model is asked at the levels' own times.
    times = np.append(P.inverse_log_snr(VP, -2 * np.log(scheduler.sigmas[:-1].numpy())), 0.0)
    compare("dpmpp_2m", VP, times, follow(scheduler, VP, "eps", times=times))


def levels_of(scheduler, process):
    """Our times of the scheduler's noise levels, sigma / alpha, or sigma for the flow; 0 is clean data."""
    sigmas = scheduler.sigmas.numpy().astype(np.float64)
    if process is FLOW:
        return sigmas
    with np.errstate(divide="ignore"), jax.enable_x64(True):
        return np.asarray(P.inverse_log_snr(process, jnp.asarray(-2 * np.log(sigmas))))


# res_multistep is what DPM-Solver's published code calls solver_type='heun'.
EXPONENTIAL = {
    "dpm_solver_2m": ("DPMSolverMultistep", dict(algorithm_type="dpmsolver", solver_order=2)),
    "dpm_solver_3m": ("DPMSolverMultistep", dict(algorithm_type="dpmsolver", solver_order=3)),
    "dpmpp_2m": ("DPMSolverMultistep", dict(algorithm_type="dpmsolver++", solver_order=2)),
    "dpmpp_3m": ("DPMSolverMultistep", dict(algorithm_type="dpmsolver++", solver_order=3)),
    "res_multistep": ("DPMSolverMultistep", dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="heun")),
    "deis_2": ("DEISMultistep", dict(solver_order=2)),
    "deis_3": ("DEISMultistep", dict(solver_order=3)),
    "uni_pc": ("UniPCMultistep", dict(solver_type="bh1", solver_order=3)),
    "uni_pc_bh2": ("UniPCMultistep", dict(solver_type="bh2", solver_order=3)),
    uni_pc(1): ("UniPCMultistep", dict(solver_type="bh1", solver_order=1)),
    uni_pc(2): ("UniPCMultistep", dict(solver_type="bh1", solver_order=2)),
    uni_pc_bh2(1): ("UniPCMultistep", dict(solver_type="bh2", solver_order=1)),
    uni_pc_bh2(2): ("UniPCMultistep", dict(solver_type="bh2", solver_order=2)),
}
SETTINGS = {
    "linspace": {},
    "karras": dict(use_karras_sigmas=True),
    "flow": dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
}


CASES = [(sampler, setting) for sampler in EXPONENTIAL for setting in SETTINGS]


# Its noise-predicting algorithm_type has no flow_prediction.
@pytest.mark.parametrize(
    "sampler, setting",
    [case for case in CASES if case not in [("dpm_solver_2m", "flow"), ("dpm_solver_3m", "flow")]],
    ids=lambda value: value if isinstance(value, str) else f"uni_pc_order_{value.order - 1}",
)
def test_multistep_exponential(sampler, setting):
    kind, options = EXPONENTIAL[sampler]
    options = options | SETTINGS[setting] | dict(lower_order_final=False)
    if kind != "DEISMultistep":
        options["final_sigmas_type"] = "sigma_min"
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**TABLE, **options)
    scheduler.set_timesteps(20)
    process, prediction = (FLOW, "flow") if setting == "flow" else (VP, "eps")
    times = levels_of(scheduler, process)
    if kind == "DEISMultistep":
        # In single precision its weights cancel; see the next test.
        scheduler.sigmas = scheduler.sigmas.double()
    theirs = follow(scheduler, process, prediction, times=times)
    if times[-1] == times[-2]:
        # The last level stands twice: a step of length 0, in which they divide by it or correct once more.
        times, theirs = times[:-1], theirs[:-1]
    compare(sampler, process, times, theirs, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("order", [2, 3])
def test_uni_pc_lowers_its_order_before_sigma_zero(order, setting):
    scheduler = diffusers.UniPCMultistepScheduler(**TABLE, **SETTINGS[setting], solver_order=order)
    scheduler.set_timesteps(8)
    process, prediction = (FLOW, "flow") if setting == "flow" else (VP, "eps")
    times = levels_of(scheduler, process)
    assert times[-1] == 0
    theirs = follow(scheduler, process, prediction, times=times)
    compare(uni_pc_bh2(order), process, times, theirs, atol=1e-5)


def test_deis_3_is_exact_where_the_closed_form_of_the_reference_cancels():
    """Distance to the exact solution at 50 and at 200 steps: ours falls; theirs, whose weights are differences of large
    numbers in single precision, rises."""
    run = jax.jit(lambda x, times: sample(SAMPLERS["deis_3"](), GAUSSIAN.denoiser(VP), VP, x, times))
    ours, theirs = [], []
    for steps in (50, 200):
        scheduler = diffusers.DEISMultistepScheduler(**TABLE, solver_order=3, lower_order_final=False)
        scheduler.set_timesteps(steps)
        times = np.asarray(grids.by_log_snr(VP, steps))
        scheduler.sigmas = torch.tensor(np.exp(-0.5 * np.asarray(P.log_snr(VP, times))))
        exact = GAUSSIAN.endpoint(VP, NOISE, times[0], times[-1])
        x = run(jnp.asarray(NOISE), grids.pad(jnp.asarray(times, jnp.float32), 200))
        ours.append(np.abs(x - exact).max())
        theirs.append(np.abs(follow(scheduler, VP, "eps", times=times)[-1] - exact).max())
    assert ours[1] < 0.5 * ours[0] and ours[1] < 1e-4
    assert theirs[1] > 10 * theirs[0] and theirs[1] > 50 * ours[1]


class SinglestepOfThePaper(diffusers.DPMSolverSinglestepScheduler):
    """Algorithm 2 of DPM-Solver weighs its inner difference by M_1, their 'heun', and the last by M_1 at one node, their
    'midpoint'; either of them alone is another method of the same order, 5e-3 away at 8 steps."""

    def singlestep_dpm_solver_update(self, *args, order=None, **kwargs):
        if self.config.solver_order == 3:
            self.register_to_config(solver_type="heun" if order == 2 else "midpoint")
        return super().singlestep_dpm_solver_update(*args, order=order, **kwargs)


@pytest.mark.parametrize("kind, name", [("dpmsolver", "dpm_solver"), ("dpmsolver++", "dpmpp")])
@pytest.mark.parametrize("order", [2, 3])
def test_singlestep(order, kind, name):
    name = f"{name}_{order}" + ("s" if kind == "dpmsolver++" else "")
    scheduler = SinglestepOfThePaper(
        **TABLE, algorithm_type=kind, solver_order=order, lower_order_final=False, final_sigmas_type="sigma_min"
    )
    # Its inner stages lie on the grid: at 1/2, or 1/3 and 2/3, of every `order` steps of a grid that is uniform in log-SNR.
    scheduler.set_timesteps(8 * order)
    times = np.asarray(grids.by_log_snr(VP, 8 * order))
    scheduler.sigmas = torch.tensor(np.exp(-0.5 * np.asarray(P.log_snr(VP, times))))
    theirs = follow(scheduler, VP, "eps", times=times)
    compare(name, VP, times[::order], theirs[order - 1 :: order], atol=1e-5)


@pytest.mark.parametrize("karras", [False, True])
def test_lms_discrete(karras):
    scheduler = diffusers.LMSDiscreteScheduler(**TABLE, use_karras_sigmas=karras, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    times = levels_of(scheduler, VP)
    compare("lms", VP, times, follow(scheduler, VP, "eps", times=times, in_ve=True), atol=1e-4)


@pytest.mark.parametrize("karras", [False, True])
def test_kdpm2_discrete(karras):
    scheduler = diffusers.KDPM2DiscreteScheduler(**TABLE, use_karras_sigmas=karras, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    times = levels_of(scheduler, VP)
    asked = np.empty(39)
    asked[::2] = times[[0, *range(1, 39, 2)]]
    with np.errstate(divide="ignore"):
        middles = scheduler.sigmas_interpol.numpy()[1:-2:2]
    asked[1::2] = P.inverse_log_snr(VP, -2 * np.log(middles[:19]))
    theirs = follow(scheduler, VP, "eps", 2, times=asked, in_ve=True)
    compare("dpm_2", VP, np.append(asked[::2], 0.0), theirs, atol=1e-5)


def test_pndm_with_its_runge_kutta_start():
    scheduler = diffusers.PNDMScheduler(**TABLE, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    states = follow(scheduler, VP, "eps")
    times = np.append((scheduler._timesteps[::-1] + 1) / 1000, 0.0)
    # Three steps of four evaluations, whose first three answers are stages.
    compare("pndm", VP, times, [*states[3:12:4], *states[12:]], atol=1e-5)


def test_plms():
    scheduler = diffusers.PNDMScheduler(
        **TABLE, timestep_spacing="trailing", set_alpha_to_one=True, skip_prk_steps=True
    )
    scheduler.set_timesteps(20)
    times = np.append((scheduler._timesteps[::-1] + 1) / 1000, 0.0)
    # The first step's first answer is Heun's predictor.
    compare("plms", VP, times, follow(scheduler, VP, "eps")[1:], atol=1e-5)


def test_ipndm():
    """Its schedule is a table of sigma with alpha = sqrt(1 - sigma^2); from sigma = 0.98, for it divides by alpha."""
    process = P.Process(
        alpha=lambda t: jnp.sqrt((1 - t) * (1 + t)), sigma=lambda t: t, time_input=lambda t: t, levels=None
    )
    times = np.linspace(0.98, 0.0, 21) ** 1.5
    scheduler = diffusers.IPNDMScheduler(trained_betas=times.tolist())
    scheduler.set_timesteps(20)
    compare("ipndm", process, times, follow(scheduler, process, "v", times=times), atol=1e-5)


@pytest.mark.parametrize("kind, name", [("eps", "epsilon"), ("v", "v_prediction")])
def test_ddim_inverse(kind, name):
    """Upwards from clean data. Each step is asked at the time it leaves, which is what the scheduler's algebra assumes."""
    scheduler = diffusers.DDIMInverseScheduler(
        **TABLE, clip_sample=False, timestep_spacing="trailing", prediction_type=name, set_alpha_to_one=True
    )
    scheduler.set_timesteps(20)
    times = np.append(0.0, (scheduler.timesteps.numpy() + 1) / 1000)
    compare("ddim", VP, times, follow(scheduler, VP, kind, times=times), atol=1e-5)


def test_dpmpp_2m_inverse():
    scheduler = diffusers.DPMSolverMultistepInverseScheduler(**TABLE, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(20)
    times = levels_of(scheduler, VP)
    compare("dpmpp_2m", VP, times, follow(scheduler, VP, "eps", times=times), atol=1e-5)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name, order", [("euler", 1), ("dpmpp_2m", 2), ("dpmpp_3m", 3)])
def test_edm(name, order, spacing):
    options = dict(sigma_schedule=spacing, final_sigmas_type="sigma_min", sigma_data=0.5)
    if name == "euler":
        scheduler = diffusers.EDMEulerScheduler(**options)
    else:
        scheduler = diffusers.EDMDPMSolverMultistepScheduler(**options, solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(20)
    times = levels_of(scheduler, EDM)
    theirs = follow(scheduler, EDM, "edm", times=times, x_T=80 * NOISE)
    compare(name, EDM, times[:-1], theirs[:-1], atol=1e-4, x_T=80 * NOISE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "heun", "ddim"])
def test_flow_match(name, shift):
    kind = "FlowMatchHeunDiscreteScheduler" if name == "heun" else "FlowMatchEulerDiscreteScheduler"
    scheduler, per_step = getattr(diffusers, kind)(shift=shift), 2 if name == "heun" else 1
    scheduler.set_timesteps(20)
    compare(name, FLOW, times_of(scheduler, FLOW, per_step), follow(scheduler, FLOW, "flow", per_step))
