"""Training times, weights and the loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ldm_jax.diffusion import loss as L
from ldm_jax.diffusion import prediction as Q
from ldm_jax.diffusion import process as P

KEY = jax.random.key(0)
N = 4096


def distance(t, cdf) -> float:
    """Kolmogorov-Smirnov distance; 1.63 / sqrt(N) = 0.025 is passed once in a hundred."""
    return stats.kstest(np.asarray(t), cdf).statistic


def test_times_follow_their_laws():
    assert distance(L.sample_times(KEY, N, "uniform"), "uniform") < 0.025
    assert distance(L.sample_times(KEY, N, "logit_normal", mean=0.5, std=0.8), lambda t: stats.norm.cdf(
        np.log(t / (1 - t)), 0.5, 0.8)) < 0.025  # fmt: skip
    assert (
        distance(L.sample_times(KEY, N, "cosmap"), lambda t: 2 / np.pi * np.arctan(1 / (1 / (1 - t) - 1)) * -1 + 1)
        < 0.025
    )
    u = np.linspace(0, 1, 2001)
    mode = 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    assert distance(L.sample_times(KEY, N, "mode"), lambda t: 1 - np.interp(t, mode[::-1], u[::-1])) < 0.025
    for name in ("edm", "flow", "vp_linear"):
        process = P.PROCESSES[name]()
        t = L.sample_times(KEY, N, "edm", process=process)
        assert distance(-0.5 * P.log_snr(process, t), stats.norm(-1.2, 1.2).cdf) < 0.025


@pytest.mark.parametrize("dist", sorted(L.TIMES))
def test_times_lie_in_the_open_interval(dist):
    t = np.asarray(L.sample_times(KEY, N, dist, process=P.flow()))
    assert t.shape == (N,) and 0 < t.min() and t.max() < 1


def test_stratified_times_fall_one_in_each_stratum():
    for t in (L.sample_times(KEY, 64, "stratified"), L.sample_times(KEY, 64, "uniform", stratified=True)):
        np.testing.assert_array_equal(np.sort(np.floor(np.asarray(t) * 64 + 1e-4)), np.arange(64))


def test_times_of_a_table_are_its_entries_equally_often():
    process = P.discrete_vp(np.linspace(1e-3, 0.2, 10))
    t = np.asarray(L.sample_times(KEY, 1000, "stratified", process=process))
    entries, counts = np.unique(np.round(t * 10).astype(int), return_counts=True)
    np.testing.assert_array_equal(entries, np.arange(1, 11))
    assert counts.min() >= 99 and counts.max() <= 101
    np.testing.assert_allclose(t * 10, np.round(t * 10), atol=1e-5)


def test_min_snr_is_right_for_eps_x_and_v():
    process, t = P.vp_linear(), jnp.asarray([0.05, 0.2, 0.5, 0.9])
    snr = np.exp(P.log_snr(process, t))
    clipped = np.minimum(snr, 5.0)
    for kind, want in {"x": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}.items():
        np.testing.assert_allclose(L.output_weight("min_snr", kind, process, t), want, rtol=1e-4, err_msg=kind)
    np.testing.assert_allclose(
        L.output_weight(partial(L.min_snr, gamma=1.0), "eps", process, t), np.minimum(snr, 1.0) / snr, rtol=1e-4
    )


@pytest.mark.parametrize("kind, weight", [("eps", "snr"), ("v", "snr_plus_one"), ("edm", "edm")])
def test_the_weight_that_a_kind_implies_is_one(kind, weight):
    process = P.edm() if kind == "edm" else P.vp_linear()
    np.testing.assert_allclose(L.output_weight(weight, kind, process, jnp.asarray([0.1, 0.5, 0.9])), 1.0, rtol=1e-4)


@pytest.mark.parametrize("name", ["vp_linear", "sub_vp", "flow", "edm"])
@pytest.mark.parametrize("weight", sorted(set(L.WEIGHTS) - {"simple"}))
def test_a_weighted_loss_does_not_depend_on_the_kind(weight, name):
    process = P.PROCESSES[name]()
    t = jnp.asarray([0.2, 0.6, 0.9])
    x, eps, wrong = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 5)), jnp.float32)
    x_t = P.corrupt(process, x, eps, t)
    alpha, sigma = P.per_row(process.alpha(t), x), P.per_row(process.sigma(t), x)
    reference = L.WEIGHTS[weight](process, t) * jnp.mean((x - wrong) ** 2, 1)
    for kind in Q.PREDICTIONS:

        def apply(params, x_in, time, cond, kind=kind):
            return Q.target(kind, process, wrong, (x_t - alpha * wrong) / sigma, t)

        out, aux = L.diffusion_loss(apply, None, process, kind, x, None, KEY, weight=weight, t=t, eps=eps)
        np.testing.assert_allclose(out, reference, rtol=2e-3, err_msg=kind)
        np.testing.assert_array_equal(aux["t"], t)


@pytest.mark.parametrize("name", ["vp_linear", "ve", "flow"])
def test_vlb_weight_integrates_to_the_mutual_information(name):
    """I-MMSE: int 1/2 mmse dSNR = 1/2 log(1 + SNR var) for Gaussian data, between the ends of the process."""
    process, var = P.PROCESSES[name](), 0.7
    with jax.enable_x64(True):
        t = jnp.linspace(0.02, 0.98, 20001)
        snr = jnp.exp(P.log_snr(process, t))
        integrand = L.vlb(process, t) * var / (1 + snr * var)
        want = 0.5 * jnp.log((1 + snr[0] * var) / (1 + snr[-1] * var))
        np.testing.assert_allclose(jnp.trapezoid(integrand, t), want, rtol=1e-5)


def test_loss_is_zero_for_the_truth_and_differentiable():
    process, kind = P.flow(), "flow"
    x = jax.random.normal(jax.random.key(1), (4, 3, 3, 2))
    eps = jax.random.normal(jax.random.key(2), x.shape)

    def apply(scale, x_in, time, cond):
        assert time.shape == (4,) and "label" in cond
        return scale * (eps - x)

    run = jax.jit(
        lambda scale: L.diffusion_loss(apply, scale, process, kind, x, {"label": jnp.arange(4)}, KEY, eps=eps)
    )
    value, aux = run(1.0)
    assert value.shape == (4,) and aux["error"].shape == (4,)
    np.testing.assert_allclose(value, 0.0, atol=1e-12)
    slope = jax.grad(lambda scale: run(scale)[0].sum())(2.0)
    np.testing.assert_allclose(slope, 2 * jnp.mean((eps - x) ** 2, (1, 2, 3)).sum(), rtol=1e-5)


def test_the_network_sees_the_scaled_input_and_the_time_of_the_process():
    process = P.edm()
    x, t = jnp.ones((2, 3)), jnp.asarray([0.3, 0.8])
    seen = {}

    def apply(params, x_in, time, cond):
        seen.update(x=x_in, time=time)
        return x_in

    L.diffusion_loss(apply, None, process, "edm", x, None, KEY, t=t, eps=jnp.zeros_like(x))
    np.testing.assert_allclose(seen["x"][:, 0], 1 / np.hypot(process.sigma(t), 0.5), rtol=1e-5)
    np.testing.assert_allclose(seen["time"], np.log(process.sigma(t)) / 4, rtol=1e-5)


def test_noise_and_times_come_from_the_key():
    def errors(key):
        return L.diffusion_loss(lambda p, x, t, c: x, None, P.flow(), "x", jnp.zeros((8, 2)), None, key)

    first, again, other = errors(KEY), errors(KEY), errors(jax.random.key(5))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.allclose(first[1]["t"], other[1]["t"])


def test_unknown_names_and_shapes_are_named():
    with pytest.raises(ValueError, match="time distribution is 'lognormal'"):
        L.sample_times(KEY, 2, "lognormal")
    with pytest.raises(ValueError, match="expected process="):
        L.sample_times(KEY, 2, "edm")
    with pytest.raises(ValueError, match="loss weight is 'none'"):
        L.output_weight("none", "eps", P.flow(), 0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 6\), expected that of x, \(2, 3\)"):
        L.diffusion_loss(lambda p, x, t, c: jnp.zeros((2, 6)), None, P.flow(), "x", jnp.zeros((2, 3)), None, KEY)
