"""Tables, training times, weights and learned variances against diffusers' schedulers and training_utils."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ldm_jax.diffusion import loss as L
from ldm_jax.diffusion import prediction as Q
from ldm_jax.diffusion import process as P

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
training = pytest.importorskip("diffusers.training_utils")

pytestmark = pytest.mark.oracle

KEY = jax.random.key(0)
N = 1000
ENTRIES = np.arange(N)
TABLES = {
    "linear": dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    "scaled_linear": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}


def times(entries=ENTRIES):
    return jnp.asarray((entries + 1) / N, jnp.float32)


def numbers(shape=(N, 3), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", sorted(TABLES))
def test_noised_data_and_velocity_are_those_of_ddpm_at_every_timestep(name, terminal):
    scheduler = diffusers.DDPMScheduler(**TABLES[name], rescale_betas_zero_snr=terminal)
    process = P.discrete_vp(name, zero_terminal_snr=terminal)
    np.testing.assert_array_equal(process.time_input(times()), ENTRIES)
    x, eps = numbers(seed=1), numbers(seed=2)
    both = torch.tensor(x), torch.tensor(eps), torch.tensor(ENTRIES)
    # diffusers keeps its running product in single precision.
    np.testing.assert_allclose(P.corrupt(process, x, eps, times()), scheduler.add_noise(*both), rtol=0, atol=3e-5)
    velocity = scheduler.get_velocity(*both)
    np.testing.assert_allclose(Q.target("v", process, x, eps, times()), velocity, rtol=0, atol=3e-5)


@pytest.mark.parametrize("levels", [10, 4000])
@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", (1e-3, 0.3)), ("scaled_linear", (0.001, 0.2)), ("linear", ()), ("scaled_linear", ()), ("cosine", ())],
)
def test_tables_of_any_length_and_range_are_those_of_diffusers(name, options, levels):
    theirs = TABLES[name] | dict(zip(("beta_start", "beta_end"), options))
    scheduler = diffusers.DDPMScheduler(**theirs, num_train_timesteps=levels)
    process = P.discrete_vp(name, levels=levels, **dict(zip(("beta_min", "beta_max"), options)))
    t = jnp.asarray((np.arange(levels) + 1) / levels, jnp.float32)
    np.testing.assert_allclose(process.alpha(t) ** 2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)
    betas = P.BETAS[name](levels, *options)
    np.testing.assert_allclose(betas, scheduler.betas, rtol=2e-5)


def test_the_clamped_cosine_table_is_that_of_betas_for_alpha_bar():
    from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

    theirs = betas_for_alpha_bar(300, max_beta=0.9).numpy()
    np.testing.assert_allclose(P.BETAS["cosine"](300, 0.0, 0.9), theirs, rtol=1e-6)
    # Lessons clamp from below as well.
    np.testing.assert_allclose(P.BETAS["cosine"](300, 1e-3, 0.9), np.maximum(theirs, 1e-3), rtol=1e-6)
    assert (theirs < 1e-3).sum() > 1


@pytest.mark.parametrize("name", sorted(TABLES))
def test_zero_terminal_snr_is_that_of_ddim(name):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    theirs = rescale_zero_terminal_snr(torch.tensor(P.BETAS[name](), dtype=torch.float64))
    np.testing.assert_allclose(P.rescale_zero_terminal_snr(name), theirs, rtol=1e-9)


def test_trigflow_is_that_of_the_scm_scheduler():
    scheduler = diffusers.SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(8, intermediate_timesteps=None)
    x_t, output = numbers((8, 3)), numbers((8, 3), 1)
    angle = scheduler.timesteps[:-1].numpy()
    theirs = [
        scheduler.step(torch.tensor(output[i]), scheduler.timesteps[i], torch.tensor(x_t[i]))[1] for i in range(8)
    ]
    # Its network's output is sigma_data F; the kind 'edm' is -F. Its first angle is rounded past pi / 2.
    t = jnp.minimum(angle / (np.pi / 2), 1.0)
    clean = Q.to_clean("edm", P.trig(), jnp.asarray(-output / 0.5), jnp.asarray(x_t), t)
    np.testing.assert_allclose(clean.x, np.stack([a.numpy() for a in theirs]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 20])
@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_step_of_learned_variance_is_that_of_ddpm(name, stride, monkeypatch):
    """Mean and standard deviation, with noise of ones; into clean data diffusers adds none."""
    from diffusers.schedulers import scheduling_ddpm

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **kwargs: torch.ones(shape))
    scheduler = diffusers.DDPMScheduler(**TABLES[name], variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(N // stride)
    entries = scheduler.timesteps.numpy()[:-1][:: max(1, 100 // stride)]
    process = P.discrete_vp(name)
    x_t, output = numbers((len(entries), 3)), numbers((len(entries), 3), 1)
    v = np.tanh(numbers(x_t.shape, 2))
    theirs = [
        scheduler.step(
            torch.tensor(np.concatenate([o, w])[None, :, None, None]), i, torch.tensor(x)[None, :, None, None]
        )
        for i, o, w, x in zip(entries, output, v, x_t)
    ]

    @jax.jit
    def step(x_t, output, t, s):
        clean = Q.to_clean("eps", process, output, x_t, t, learned_variance=True)
        return clean.x, Q.posterior_mean(process, clean, t, s) + jnp.exp(
            0.5 * Q.step_log_var(process, clean.log_var, t, s)
        )

    clean, x_s = step(x_t, np.concatenate([output, v], 1), times(entries), times(entries - stride))
    x_0 = np.stack([a.pred_original_sample.numpy().ravel() for a in theirs])
    wanted = np.stack([a.prev_sample.numpy().ravel() for a in theirs])
    # alpha at the last entry of the cosine table is 5e-5, where both clean estimates are 2e4 and single precision is short.
    worst = 3e-4 if name == "cosine" and entries[0] == N - 1 else 5e-6
    size = np.abs(x_0).max(1, keepdims=True)
    np.testing.assert_allclose(clean / size, x_0 / size, rtol=0, atol=2e-5)
    np.testing.assert_allclose(x_s, wanted, rtol=0, atol=worst)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_min_snr_for_every_kind_is_made_of_compute_snr(name):
    snr = training.compute_snr(diffusers.DDPMScheduler(**TABLES[name]), torch.tensor(ENTRIES)).numpy()
    clipped = np.minimum(snr, 5.0)
    with jax.enable_x64(True):
        t = jnp.asarray((ENTRIES + 1) / N)
        for kind, want in {"eps": clipped / snr, "x": clipped, "v": clipped / (snr + 1)}.items():
            ours = L.output_weight("min_snr", kind, P.discrete_vp(name), t)
            # 1 - alpha^2 of the first entry is 4e-5 in the cosine table and cancels in diffusers' single precision.
            np.testing.assert_allclose(ours, want, rtol=1e-3, err_msg=kind)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (dict(dist="uniform"), dict(weighting_scheme="none")),
        (dict(dist="logit_normal"), dict(weighting_scheme="logit_normal", logit_mean=0.0, logit_std=1.0)),
        (dict(dist="logit_normal", mean=0.5, std=0.7), dict(weighting_scheme="logit_normal", logit_mean=0.5, logit_std=0.7)),
        (dict(dist="mode"), dict(weighting_scheme="mode", mode_scale=1.29)),
        (dict(dist="mode", scale=-0.8), dict(weighting_scheme="mode", mode_scale=-0.8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stratified", [False, True])
def test_times_are_drawn_from_the_laws_of_sd3(ours, theirs, stratified):
    """Kolmogorov-Smirnov distance of two samples of 20000: 1.63 sqrt(2 / n) = 0.0163 is passed once in a hundred."""
    n = 20000
    draws = training.compute_density_for_timestep_sampling(
        batch_size=n, generator=torch.Generator().manual_seed(0), **theirs
    )
    t = np.asarray(L.sample_times(KEY, n, stratified=stratified, **ours))
    assert stats.ks_2samp(t, draws.numpy()).statistic < 0.0163


def test_weights_of_the_flow_are_those_of_sd3():
    t = np.linspace(0.05, 0.95, 19, dtype=np.float32)
    for ours, kind, theirs in (
        ("simple", "flow", "none"),
        ("flow", "flow", "none"),
        ("cosmap", "flow", "cosmap"),
        ("sigma_sqrt", "flow", "sigma_sqrt"),
        ("flow", "x", "sigma_sqrt"),  # with the script's preconditioned outputs, which are x
    ):
        want = training.compute_loss_weighting_for_sd3(theirs, torch.tensor(t))
        np.testing.assert_allclose(L.output_weight(ours, kind, P.flow(), jnp.asarray(t)), want, rtol=2e-5, err_msg=ours)


def test_times_cosmap_have_the_density_that_sd3_weighs_with():
    grid = np.linspace(0, 1, 4001)
    density = training.compute_loss_weighting_for_sd3("cosmap", torch.tensor(grid)).numpy()
    cdf = np.append(0, np.cumsum(0.5 * (density[1:] + density[:-1]) / 4000))
    assert cdf[-1] == pytest.approx(1, abs=1e-6)
    t = np.asarray(L.sample_times(KEY, 20000, "cosmap", stratified=True))
    assert stats.kstest(t, lambda t: np.interp(t, grid, cdf)).statistic < 1e-4
