"""Processes: coefficients against their closed forms, derivatives, inverses and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import process as P

NAMES = sorted(P.PROCESSES)
OTHERS = {
    "flow, shifted": P.flow(shift=3.0),
    "vp_linear, shifted": P.shift(P.vp_linear(), 2.0),
    "trig of unit data": P.trig(sigma_data=1.0),
    "zero terminal SNR": P.discrete_vp("scaled_linear", zero_terminal_snr=True),
}
ALL = [pytest.param(p, id=name) for name, p in ({name: P.PROCESSES[name]() for name in NAMES} | OTHERS).items()]


def times(process, n=33):
    """Double-precision times away from the singular ends."""
    return np.linspace(max(process.t_min, 0.01), min(process.t_max, 0.99), n)


@pytest.mark.parametrize("process", ALL)
def test_log_snr_falls_and_is_inverted_in_closed_form_and_by_bisection(process):
    with jax.enable_x64(True):
        t = jnp.asarray(times(process))

        @jax.jit
        def there_and_back(t):
            value = P.log_snr(process, t)
            closed, bisected = (P.inverse_log_snr(p, value) for p in (process, process._replace(t_of_log_snr=None)))
            return value, closed, bisected

        value, closed, bisected = there_and_back(t)
        assert (np.diff(value) < 0).all()
        np.testing.assert_allclose(closed, t, atol=1e-12)
        np.testing.assert_allclose(bisected, t, atol=1e-12)


@pytest.mark.parametrize("process", ALL)
def test_derivatives_equal_finite_differences(process):
    with jax.enable_x64(True):
        t, h = jnp.asarray(times(process, 32) + 1e-4), 1e-6  # between the knots of a table
        alpha, sigma, dalpha, dsigma = jax.jit(lambda t: P.coefficients(process, t))(t)
        both = jax.jit(lambda t: (process.alpha(t), process.sigma(t)))
        (alpha_up, sigma_up), (alpha_down, sigma_down) = both(t + h), both(t - h)
        np.testing.assert_allclose(both(t), (alpha, sigma))
        np.testing.assert_allclose(dalpha, (alpha_up - alpha_down) / (2 * h), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(dsigma, (sigma_up - sigma_down) / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("process", ALL)
def test_drift_and_diffusion_move_the_moments_of_the_process(process):
    """The mean and the variance of the forward SDE: d alpha / dt = f alpha, d sigma^2 / dt = 2 f sigma^2 + g^2."""
    with jax.enable_x64(True):
        t, h = jnp.asarray(times(process, 32) + 1e-4), 1e-6
        f, g2 = P.drift_diffusion(process, t)
        alpha, variance = process.alpha, lambda t: process.sigma(t) ** 2
        slope_alpha, slope = ((moment(t + h) - moment(t - h)) / (2 * h) for moment in (alpha, variance))
        np.testing.assert_allclose(slope_alpha, f * alpha(t), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(slope, 2 * f * variance(t) + g2, rtol=1e-5, atol=1e-8)
        assert (np.asarray(g2) > 0).all()
        x = jnp.ones((32, 3))
        drift, diffusion = P.forward_sde(process, x, t)
        np.testing.assert_allclose(drift, f[:, None] * x)
        np.testing.assert_allclose(diffusion**2, g2)


@pytest.mark.parametrize("make", [P.vp_linear, P.sub_vp])
def test_the_least_time_of_a_vp_process_is_an_option(make):
    process = make(t_min=1e-5)
    assert process._replace(t_min=1e-3).t_min == make().t_min and process.t_min == 1e-5
    assert process.sigma(jnp.asarray(process.t_min)) == pytest.approx(
        1e-6 ** (0.5 if make is P.vp_linear else 1), rel=2e-3
    )
    for t_min in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"t_min is {t_min}, expected a time in"):
            make(t_min=t_min)


@pytest.mark.parametrize("process", ALL)
def test_single_precision_keeps_five_digits_down_to_the_end(process):
    t = np.float32([max(process.t_min, 1e-3), 0.3, 0.9, 0.998])
    with jax.enable_x64(True):
        exact = [np.asarray(f(jnp.asarray(t, jnp.float64))) for f in (process.alpha, process.sigma)]
    for f, want in zip((process.alpha, process.sigma), exact):
        np.testing.assert_allclose(f(jnp.asarray(t)), want, rtol=2e-5)


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "discrete_vp"])
def test_variance_is_preserved(name):
    process = P.PROCESSES[name]()
    t = jnp.linspace(process.t_min, 1.0, 50)
    np.testing.assert_allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, 1.0, rtol=1e-6)


def test_drift_and_diffusion_of_vp_are_those_of_song():
    t = jnp.linspace(0.01, 1.0, 20)
    beta = 0.1 + t * 19.9
    f, g2 = P.drift_diffusion(P.vp_linear(), t)
    np.testing.assert_allclose(f, -0.5 * beta, rtol=1e-4)
    np.testing.assert_allclose(g2, beta, rtol=1e-3)


def test_sub_vp_is_song_equation_36():
    t = jnp.linspace(0.01, 1.0, 20)
    vp, sub = P.vp_linear(), P.sub_vp()
    np.testing.assert_allclose(sub.alpha(t), vp.alpha(t))
    np.testing.assert_allclose(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-5)


def test_ends_of_ve_edm_flow_and_cosine():
    for process, ends in [(P.ve(), (0.01, 50.0)), (P.edm(), (0.002, 80.0)), (P.flow(), (0.0, 1.0))]:
        np.testing.assert_allclose([process.sigma(jnp.float32(0)), process.sigma(jnp.float32(1))], ends, rtol=1e-5)
    for process in (P.flow(), P.flow(shift=3.0), P.vp_cosine(), P.trig()):
        assert float(process.alpha(jnp.float32(1))) == 0.0


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_trig_turns_by_an_angle_and_keeps_the_deviation_of_the_data(sigma_data):
    process, t = P.trig(sigma_data), jnp.linspace(0.0, 1.0, 21)
    angle = np.linspace(0.0, np.pi / 2, 21)
    np.testing.assert_allclose(process.alpha(t), np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(process.sigma(t), sigma_data * np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(process.time_input(t), angle, rtol=1e-6)
    np.testing.assert_allclose(P.prior_std(process, t), sigma_data, rtol=1e-6)
    # Pure noise and clean data are met at the ends of the inverse.
    np.testing.assert_array_equal(P.inverse_log_snr(process, jnp.asarray([np.inf, -np.inf])), [0.0, 1.0])


def test_edm_grid_is_karras_equation_5():
    i, n, rho = np.arange(18), 18, 7.0
    want = (80.0 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho
    np.testing.assert_allclose(P.edm().sigma(jnp.asarray(1 - i / (n - 1))), want, rtol=1e-4)
    np.testing.assert_allclose(
        P.edm().time_input(jnp.float32(0.4)), np.log(P.edm().sigma(jnp.float32(0.4))) / 4, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("n", [10, 1000, 4000])
def test_a_table_of_any_size_tells_the_network_its_index_exactly(n, dtype):
    with jax.enable_x64(True):
        process, i = P.discrete_vp(np.full(n, 1e-3)), np.arange(n)
        for t in (jnp.asarray((i + 1) / n, dtype), jnp.asarray(i + 1, dtype) / n):
            np.testing.assert_array_equal(process.time_input(t), i)
        between = process.time_input(jnp.asarray((i[:-1] + 1.25) / n, dtype))
        np.testing.assert_allclose(between, i[:-1] + 0.25, atol=1e-3)


@pytest.mark.parametrize("name", sorted(P.BETAS))
def test_table_is_met_at_its_entries_and_the_network_sees_integers(name):
    betas = P.BETAS[name]()
    process = P.discrete_vp(name)
    i = np.arange(len(betas))
    bar = np.cumprod(1 - betas)
    t = jnp.asarray((i + 1) / len(betas), jnp.float32)
    np.testing.assert_allclose(process.alpha(t), np.sqrt(bar), rtol=1e-5)
    np.testing.assert_allclose(process.sigma(t), np.sqrt(1 - bar), rtol=1e-5)
    np.testing.assert_array_equal(process.time_input(t), i)
    assert float(process.alpha(jnp.float32(0))) == 1.0 and float(process.sigma(jnp.float32(0))) == 0.0


def test_the_cosine_table_is_equation_17():
    n, s = 200, 0.02
    t = np.arange(n + 1) / n
    bar = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2 / np.cos(s / (1 + s) * np.pi / 2) ** 2
    process = P.discrete_vp("cosine", levels=n, s=s, beta_max=1.0)
    assert process.levels == n
    np.testing.assert_allclose(process.alpha(jnp.asarray(t[1:-1])), np.sqrt(bar[1:-1]), rtol=1e-5)
    assert float(process.alpha(jnp.float32(1))) < 1e-6
    np.testing.assert_array_equal(process.time_input(jnp.asarray(t[1:])), np.arange(n))


def test_zero_terminal_snr_table_ends_in_pure_noise():
    process = P.discrete_vp(np.append(P.BETAS["linear"]()[:-1], 1.0))
    assert float(process.alpha(jnp.float32(1))) == 0.0 and float(process.sigma(jnp.float32(1))) == 1.0
    t = jnp.asarray([0.999, 0.9993, 0.9999])
    assert (np.diff(process.alpha(t)) < 0).all()
    np.testing.assert_allclose(P.inverse_log_snr(process, P.log_snr(process, t)), t, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(P.BETAS))
def test_a_compiled_table_never_reads_the_entry_beside(name):
    """An optimising compiler may round n t - 1 in two ways; an index and a fraction that differ so are an entry off."""
    process = P.discrete_vp(name)
    log_bar = np.cumsum(np.log1p(-P.BETAS[name]()))
    want = np.diff(log_bar - np.log(-np.expm1(log_bar)))
    t = jnp.asarray(np.arange(1, 1001) / 1000, jnp.float32)
    # The tests' own compiler flags turn the optimisation off that users have.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    rise = jax.jit(lambda t, s: P.log_snr(process, t) - P.log_snr(process, s), compiler_options=options)
    np.testing.assert_allclose(rise(t[1:], t[:-1]), want, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(P.BETAS))
def test_rescaling_keeps_the_first_alpha_and_ends_in_pure_noise(name):
    before, betas = (np.sqrt(np.cumprod(1 - b)) for b in (P.BETAS[name](), P.rescale_zero_terminal_snr(name)))
    assert betas[-1] == 0.0 and betas[0] == pytest.approx(before[0], rel=1e-12)
    # Linear in the old alphas, as algorithm 1 says.
    np.testing.assert_allclose(betas, np.polyval(np.polyfit(before[[0, -1]], betas[[0, -1]], 1), before), atol=1e-12)
    process = P.discrete_vp(name, zero_terminal_snr=True)
    t = jnp.asarray((np.arange(1000) + 1) / 1000, jnp.float32)
    np.testing.assert_allclose(process.alpha(t), betas, rtol=2e-5)
    np.testing.assert_allclose(process.alpha(t), P.discrete_vp(P.rescale_zero_terminal_snr(name)).alpha(t))
    assert float(process.sigma(jnp.float32(1))) == 1.0


def test_shift_of_the_flow_multiplies_the_noise_to_signal_ratio():
    t = jnp.linspace(0.05, 0.95, 19)
    shifted = P.log_snr(P.flow(shift=3.0), t)
    np.testing.assert_allclose(shifted, P.log_snr(P.flow(), t) - 2 * np.log(3.0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(P.log_snr(P.shift(P.flow(), 3.0), t), shifted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(P.flow(shift=3.0).time_input(t), P.shift(P.flow(), 3.0).time_input(t), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_shifts_follow_one_another_and_undo_one_another(name):
    process = P.PROCESSES[name]()
    with jax.enable_x64(True):
        t = jnp.asarray(times(process))
        twice, once = P.shift(P.shift(process, 2.0), 1.5), P.shift(process, 3.0)
        back = P.shift(P.shift(process, 2.0), 0.5)
        for other, same in ((twice, once), (back, process)):
            for f, g in zip((other.alpha, other.sigma, other.time_input), (same.alpha, same.sigma, same.time_input)):
                np.testing.assert_allclose(f(t), g(t), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose([other.t_min, other.t_max], [same.t_min, same.t_max], rtol=1e-12)


def test_a_shift_keeps_the_end_of_time_whatever_its_factor():
    """A clock that rounds past 1 gives a negative alpha, and a log-SNR that is no number."""
    one = jnp.float32(1)
    for factor in np.random.default_rng(0).uniform(0.2, 8.0, 100):
        for process in (P.trig(), P.flow()):
            shifted = P.shift(process, float(factor))
            assert float(shifted.alpha(one)) == 0.0 and float(P.log_snr(shifted, one)) == -np.inf, factor


def test_corrupt_broadcasts_a_time_for_each_row_and_keeps_precision():
    x, eps = jnp.ones((2, 3, 4, 1)), jnp.full((2, 3, 4, 1), 2.0)
    out = P.corrupt(P.flow(), x, eps, jnp.asarray([0.25, 0.5]))
    np.testing.assert_allclose(out[:, 0, 0, 0], [1.25, 1.5])
    with jax.enable_x64(True):
        assert (
            P.corrupt(P.discrete_vp(), jnp.ones((2, 3), jnp.float32), jnp.ones((2, 3), jnp.float32), 0.5).dtype
            == jnp.float32
        )


def test_prior_std_is_the_standard_deviation_of_the_noised_data():
    assert float(P.prior_std(P.vp_linear())) == pytest.approx(1.0)
    assert float(P.prior_std(P.edm())) == pytest.approx(np.hypot(0.5, 80.0), rel=1e-6)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: P.vp_linear(beta_min=-1.0), "beta_min is -1.0"),
        (lambda: P.ve(sigma_min=2.0, sigma_max=1.0), "sigma_max is -1.0"),
        (lambda: P.flow(shift=0.0), "shift is 0.0"),
        (lambda: P.discrete_vp("sqrt"), "betas is 'sqrt'"),
        (lambda: P.discrete_vp([0.1, 1.5]), "betas"),
        (lambda: P.discrete_vp([0.1, 0.2], levels=2), "levels goes with betas by name"),
        (lambda: P.discrete_vp("linear", s=0.1), "s is no option of the betas 'linear'"),
        (lambda: P.discrete_vp("cosine", levels=1), "levels is 1"),
        (lambda: P.discrete_vp("cosine", levels=10.0), "levels is 10.0"),
        (lambda: P.discrete_vp("cosine", levels=10**9), "levels is 1000000000"),
        (lambda: P.discrete_vp("cosine", s=-0.1), "s is -0.1"),
        (lambda: P.discrete_vp("cosine", s=float("nan")), "s is nan"),
        (lambda: P.discrete_vp("cosine", beta_min=0.5, beta_max=0.4), "beta_max is 0.4, .* beta_min is 0.5"),
        (lambda: P.discrete_vp("cosine", beta_max=1.1), "beta_max is 1.1"),
        (lambda: P.discrete_vp("linear", beta_min=0), "beta_min is 0"),
        (lambda: P.trig(sigma_data=0.0), "sigma_data is 0.0"),
        (lambda: P.rescale_zero_terminal_snr("sqrt"), "betas is 'sqrt'"),
        (lambda: P.shift(P.flow(), -1.0), "factor is -1.0"),
    ],
)
def test_bad_numbers_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
