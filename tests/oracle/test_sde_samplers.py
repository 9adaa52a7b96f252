"""Stochastic trajectories against diffusers' schedulers: the same times, start, exact eps of a Gaussian, and noise.

Where a scheduler calls randn_tensor, or its Brownian tree, it is handed the noise that our sampler draws from its keys.
"""

import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.exact import GAUSSIAN
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.samplers.brownian import draws, fold
from ldm_jax.diffusion.samplers.multistep_sde import _dpmpp
from ldm_jax.diffusion.samplers.sampler import noise, row_keys
from ldm_jax.diffusion.samplers.sde import inner_time
from tests.diffusion.test_sde_samplers import orders_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

TABLE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VP, FLOW = P.discrete_vp("scaled_linear"), P.flow()
NOISE = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
KEY = jax.random.key(5)


def drawn(steps, n=1, like=NOISE):
    """The unit noises of our first steps: a list of lists of n arrays."""
    keys = row_keys(KEY, len(like))
    return [[np.asarray(z) for z in draws(fold(keys, i), jnp.asarray(like), n)] for i in range(steps)]


def hand(monkeypatch, scheduler, zs):
    """Make the scheduler take zs, in order, for its noise."""
    given = iter(zs)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(next(given)))


def model_of(process, kind):
    @jax.jit
    def model(x, t):
        clean = GAUSSIAN.denoiser(process)(x, t)
        return target(kind, process, clean.x, clean.eps, t)

    return lambda x, t: torch.tensor(np.array(model(x.numpy(), t)))


def follow(scheduler, process, times, kind="eps", in_ve=False, extra=None, **options):
    """States of diffusers' loop of one evaluation a step, the model asked at `times`; in_ve: its state is x_t / alpha."""
    model, states = model_of(process, kind), []
    shrink = lambda i: 1 / np.sqrt(1 + float(scheduler.sigmas[i]) ** 2) if in_ve else 1.0  # noqa: E731
    x = torch.tensor(NOISE) / shrink(0)
    for i, index in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, index) if in_ve else x
        output = model(scaled, times[i])
        output = output if extra is None else torch.cat([output, extra(scaled)], 1)
        x = scheduler.step(output, index, x, **options).prev_sample
        states.append(x.numpy() * shrink(i + 1))
    return states


def times_of(scheduler, process=VP, end=0.0):
    return np.append((np.asarray(scheduler.timesteps, np.float64) + (process is VP)) / 1000, end)


def trajectory(sampler, process, times, x_T=NOISE, denoise=None):
    denoise = GAUSSIAN.denoiser(process) if denoise is None else denoise
    run = jax.jit(lambda x, times: sample(sampler, denoise, process, x, times, KEY, trajectory=True))
    return np.asarray(run(jnp.asarray(x_T), jnp.asarray(times, jnp.float32)))[1:]


def compare(ours, theirs, atol=1e-4):
    assert len(ours) == len(theirs)
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm(monkeypatch, variance, spacing):
    scheduler = diffusers.DDPMScheduler(
        **TABLE, clip_sample=False, variance_type=f"fixed_{variance}", timestep_spacing=spacing
    )
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    times = times_of(scheduler)
    # With trailing spacing diffusers still adds noise to its last step, which ends in clean data.
    last = None if spacing == "leading" else -1
    compare(trajectory(SAMPLERS["ddpm"](variance), VP, times)[:last], follow(scheduler, VP, times)[:last])


def test_ddpm_with_learned_variance(monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        **TABLE, clip_sample=False, variance_type="learned_range", timestep_spacing="leading"
    )
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    times = times_of(scheduler)
    theirs = follow(scheduler, VP, times, extra=lambda x: torch.tanh(x))

    def denoise(x, t):
        return GAUSSIAN.denoiser(VP)(x, t)._replace(log_var=jnp.tanh(x))

    compare(trajectory(SAMPLERS["ddpm"]("learned"), VP, times, denoise=denoise), theirs)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_eta(monkeypatch, eta):
    scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    times = times_of(scheduler)
    compare(trajectory(SAMPLERS["ddim"](eta), VP, times), follow(scheduler, VP, times, eta=eta))


def test_euler_ancestral_discrete(monkeypatch):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**TABLE, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    times = times_of(scheduler)
    compare(trajectory(SAMPLERS["euler_ancestral"](), VP, times), follow(scheduler, VP, times, in_ve=True))


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_euler_ancestral_on_rectified_flow(monkeypatch, eta):
    scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=eta)
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    times = np.append(np.asarray(scheduler.sigmas)[:20], 0.0)
    model, x, states = model_of(FLOW, "flow"), torch.tensor(NOISE), []
    for i, index in enumerate(scheduler.timesteps[:20]):
        x = scheduler.step(model(x, times[i]), index, x).prev_sample
        states.append(x.numpy())
    compare(trajectory(SAMPLERS["euler_ancestral"](eta), FLOW, times), states)


def two_stages(scheduler, process):
    """States of a scheduler that asks twice a step and once in its last, in the scaling x_t = alpha x + sigma eps."""
    model, states = model_of(process, "eps"), []
    sigmas = np.asarray(scheduler.sigmas, np.float64)
    sigmas = sigmas[np.append(True, np.diff(sigmas) != 0)]
    x = torch.tensor(NOISE) * np.sqrt(1 + sigmas[0] ** 2)
    for index in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, index)
        x = scheduler.step(model(scaled, (float(index) + 1) / 1000), index, x).prev_sample
        states.append(x.numpy())
    states = [*states[1:-1:2], states[-1]]
    return [x / np.sqrt(1 + sigma**2) for x, sigma in zip(states, sigmas[1:], strict=True)]


def test_kdpm2_ancestral_discrete(monkeypatch):
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler(**TABLE, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    times = np.append((np.asarray(scheduler.timesteps)[[0, *range(2, 39, 2)]] + 1) / 1000, 0.0)
    compare(trajectory(SAMPLERS["dpm_2_ancestral"](), VP, times), two_stages(scheduler, VP))


def needing_torchsde(monkeypatch, module, name):
    """A scheduler class of diffusers that wants torchsde for the Brownian tree, which the tests replace."""
    if "torchsde" not in sys.modules and importlib.util.find_spec("torchsde") is None:
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    return getattr(importlib.import_module(f"diffusers.schedulers.{module}"), name)


def test_dpmsolver_sde(monkeypatch):
    scheduler = needing_torchsde(monkeypatch, "scheduling_dpmsolver_sde", "DPMSolverSDEScheduler")(
        **TABLE, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    times = np.append((np.asarray(scheduler.timesteps)[[0, *range(2, 39, 2)]] + 1) / 1000, 0.0)
    given = []
    for (first, second), t, s in zip(drawn(19, 2), times[:-2], times[1:-1], strict=True):
        # Its tree is asked over both intervals: the first, and the whole step.
        share = (t - float(inner_time(VP, jnp.float32(t), jnp.float32(s), 0.5)[0])) / (t - s)
        given += [first, (np.sqrt(share) * first + np.sqrt(1 - share) * second).astype(np.float32)]
    given = iter(given)
    scheduler.noise_sampler = lambda *levels: torch.tensor(next(given))
    compare(trajectory(SAMPLERS["dpmpp_sde"](), VP, times), two_stages(scheduler, VP))


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpmpp_2m_sde(monkeypatch, solver, karras):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, algorithm_type="sde-dpmsolver++", solver_order=2, solver_type=solver, use_karras_sigmas=karras
    )
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    times = np.append(P.inverse_log_snr(VP, -2 * np.log(scheduler.sigmas[:-1].numpy())), 0.0)
    name = "dpmpp_2m_sde" if solver == "midpoint" else "dpmpp_2m_sde_heun"
    compare(trajectory(SAMPLERS[name](), VP, times), follow(scheduler, VP, times))


def in_edm(scheduler, process, sigma_data=0.5):
    """States of an EDM-preconditioned scheduler, sigma = t's own, and the times of its noise levels."""
    sigmas, states = np.asarray(scheduler.sigmas, np.float64), []
    times = np.asarray(P.inverse_log_snr(process, jnp.asarray(-2 * np.log(sigmas[:-1]))))
    model, x = model_of(process, "x"), torch.tensor(NOISE) * float(sigmas[0])
    for i, index in enumerate(scheduler.timesteps):
        sigma = sigmas[i]
        scheduler.scale_model_input(x, index)
        skip, out = sigma_data**2 / (sigma**2 + sigma_data**2), sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
        sign = -1 if scheduler.config.prediction_type == "v_prediction" else 1
        output = (model(x, times[i]) - skip * x) / (sign * out)
        x = scheduler.step(output.float(), index, x).prev_sample
        states.append(x.numpy())
    return states, times, sigmas[0] * NOISE


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_edm_dpmsolver_multistep_sde(monkeypatch, solver):
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_type=solver, sigma_data=0.5
    )
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    process = P.edm()
    states, times, x_T = in_edm(scheduler, process)
    name = "dpmpp_2m_sde" if solver == "midpoint" else "dpmpp_2m_sde_heun"
    # Its last step, into sigma = 0, has no time on this process. x is 80 at first: single precision.
    np.testing.assert_allclose(trajectory(SAMPLERS[name](), process, times, x_T), states[:-1], atol=1e-4, rtol=2e-5)


def test_cosine_dpmsolver_multistep(monkeypatch):
    module = "scheduling_cosine_dpmsolver_multistep"
    scheduler = needing_torchsde(monkeypatch, module, "CosineDPMSolverMultistepScheduler")(
        sigma_min=0.3, sigma_max=50, sigma_data=0.5
    )
    scheduler.set_timesteps(20)
    given = iter([z for (z,) in drawn(20)])
    scheduler.noise_sampler = lambda *levels: torch.tensor(next(given))
    process = P.ve(0.2, 60.0)
    states, times, x_T = in_edm(scheduler, process)
    compare(trajectory(SAMPLERS["dpmpp_2m_sde"](), process, times, x_T), states[:-1])


def test_diffusers_third_order_sde_has_a_wrong_weight(monkeypatch):
    """Its second difference has the weight -(1/2 + M_1 / H), H = 2 h, which tends to -1 as h does to 0, for k-diffusion's
    M_2 / 2 = 1/2 - M_1 / H, which tends to 0. With that weight our sampler is diffusers', and of weak order 1."""

    def as_diffusers(m, usable):
        # M_1 = 1 - M_0 / H.
        return m[0], jnp.where(usable[1], m[1], m[0] / 2), -(0.5 + m[1] * (1 - m[1]) / m[0])

    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, algorithm_type="sde-dpmsolver++", solver_order=3)
    scheduler.set_timesteps(20)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(20)])
    times = np.append(P.inverse_log_snr(VP, -2 * np.log(scheduler.sigmas[:-1].numpy())), 0.0)
    wrong = _dpmpp(2, as_diffusers, 1.0, 1.0, 0)
    compare(trajectory(wrong, VP, times), follow(scheduler, VP, times))
    monkeypatch.undo()
    [(order, errors, _)] = orders_of(wrong, ["vp_linear"], (64, 128, 256), 1)
    [(_, ours, _)] = orders_of(SAMPLERS["dpmpp_3m_sde"](), ["vp_linear"], (64, 128, 256), 1)
    assert order < 1.15 and errors[-1] > 20 * ours[-1], (order, errors, ours)


@pytest.mark.parametrize("predictor, corrector", [(2, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("tau", [0.0, 1.0, None])
def test_sa_solver(monkeypatch, predictor, corrector, tau):
    scheduler = diffusers.SASolverScheduler(
        **TABLE,
        predictor_order=predictor,
        corrector_order=corrector,
        lower_order_final=False,
        timestep_spacing="trailing",
        tau_func=None if tau is None else lambda t: torch.tensor(tau),
    )
    if tau is None:
        default = scheduler.tau_func
        scheduler.tau_func = lambda t: torch.tensor(float(default(t)))
    scheduler.set_timesteps(13)  # none of which lies at an end of the default tau's interval
    hand(monkeypatch, scheduler, [z for (z,) in drawn(13)])
    times = times_of(scheduler, end=1e-3)
    options = {} if tau is None else {"tau": tau}
    ours = trajectory(SAMPLERS["sa_solver"](predictor=predictor, corrector=corrector, **options), VP, times)
    compare(ours, follow(scheduler, VP, times))


def test_lcm(monkeypatch):
    scheduler = diffusers.LCMScheduler(**TABLE, clip_sample=False)
    scheduler.set_timesteps(4)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(4)])
    times = times_of(scheduler)
    compare(trajectory(SAMPLERS["lcm"](), VP, times), follow(scheduler, VP, times))


def test_tcd(monkeypatch):
    """gamma = 1/2 and steps to odd entries, for diffusers rounds (1 - gamma) times an entry down to the table's; its last
    step is to the table's first entry, not to clean data, and is left out."""
    scheduler = diffusers.TCDScheduler(**TABLE, clip_sample=False)
    scheduler.set_timesteps(4)
    hand(monkeypatch, scheduler, [z for (z,) in drawn(4)])
    times = times_of(scheduler)
    assert (np.asarray(scheduler.timesteps[1:]) % 2 == 1).all()
    compare(trajectory(SAMPLERS["tcd"](0.5), VP, times)[:-1], follow(scheduler, VP, times, eta=0.5)[:-1])


def test_karras_ve_is_edm_algorithm_2(monkeypatch):
    from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler

    process, steps = P.ve(0.02, 100.0), 12
    scheduler = KarrasVeScheduler(sigma_min=0.05, sigma_max=60, s_churn=6.0, s_min=0.1, s_max=40.0, s_noise=1.007)
    scheduler.set_timesteps(steps + 1)
    sigmas = np.sqrt(np.asarray(scheduler.schedule, np.float64)[::-1])
    scheduler.num_inference_steps = steps
    model = model_of(process, "eps")
    at = lambda sigma: float(P.inverse_log_snr(process, jnp.float32(-2 * np.log(sigma))))  # noqa: E731
    x, states = torch.tensor(NOISE) * float(sigmas[0]), []
    for (z,), sigma, following in zip(drawn(steps), sigmas[:-1], sigmas[1:], strict=True):
        hand(monkeypatch, scheduler, [z])
        x_hat, sigma_hat = scheduler.add_noise_to_input(x, float(sigma))
        step = scheduler.step(-model(x_hat, at(sigma_hat)), sigma_hat, float(following), x_hat)
        output = -model(step.prev_sample, at(following))
        x = scheduler.step_correct(
            output, sigma_hat, float(following), x_hat, step.prev_sample, step.derivative
        ).prev_sample
        states.append(x.numpy())
    sampler = SAMPLERS["edm_stochastic"](s_churn=6.0, s_tmin=0.1, s_tmax=40.0, s_noise=1.007)
    ours = trajectory(sampler, process, [at(sigma) for sigma in sigmas], NOISE * sigmas[0])
    # x is 60 at first: single precision.
    np.testing.assert_allclose(ours, states, atol=1e-4, rtol=2e-5)


def test_score_sde_ve_is_the_predictor_corrector(monkeypatch):
    """One row of 32 entries, for diffusers' norms are means over the batch; its last step, into sigma = 0, is left out."""
    steps, process = 20, P.ve(0.05, 30.0)
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.05, sigma_max=30.0, snr=0.15, correct_steps=2)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    x_T = 30 * np.random.default_rng(3).standard_normal((1, 16, 2)).astype(np.float32)
    keys, model = row_keys(KEY, 1), model_of(process, "score")
    x, states, times = torch.tensor(x_T), [], np.linspace(1, 0, steps)
    for i, (index, t) in enumerate(zip(scheduler.timesteps[:-1], times[:-1], strict=True)):
        here = fold(keys, i)
        hand(monkeypatch, scheduler, [np.asarray(noise(fold(here, j), jnp.asarray(x_T))) for j in (1, 2, 0)])
        for _ in range(2):
            x = scheduler.step_correct(model(x, t), x).prev_sample
        x = scheduler.step_pred(model(x, t), index, x).prev_sample
        states.append(x.numpy())
    ours = trajectory(SAMPLERS["predictor_corrector"](snr=0.15, corrections=2), process, times, x_T)
    np.testing.assert_allclose(ours, states, atol=1e-4, rtol=1e-4)


def test_score_sde_vp_is_euler_maruyama(monkeypatch):
    """Step by step: diffusers' dt is 1 / n on a grid whose steps are (1 - eps) / (n - 1)."""
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    process, steps = P.vp_linear(), 50
    scheduler = ScoreSdeVpScheduler()
    scheduler.set_timesteps(steps)
    model, (z,) = model_of(process, "eps"), drawn(1)[0]
    for t in (0.97, 0.5, 0.1):
        hand(monkeypatch, scheduler, [z])
        x, _ = scheduler.step_pred(model(torch.tensor(NOISE), t), torch.tensor(NOISE), torch.tensor(t))
        ours = trajectory(SAMPLERS["euler_maruyama"](), process, [t, t - 1 / steps])
        compare(ours, [x.numpy()])
