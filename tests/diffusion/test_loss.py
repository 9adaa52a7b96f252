"""Training times, weights and the loss."""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ldm_jax.diffusion import loss as L
from ldm_jax.diffusion import prediction as Q
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.prediction import Clean

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


def fill(history, t, losses):
    return jax.jit(L.record_losses)(history, jnp.asarray(t, jnp.float32), jnp.asarray(losses, jnp.float32))


@pytest.mark.parametrize("bins", [10, 1000])
def test_a_history_keeps_the_last_losses_of_each_entry_in_whatever_batches_they_come(bins):
    """Against the paper's words with a queue for each entry; some batches hold an entry more often than it is long."""
    rng, length = np.random.default_rng(0), 4
    queues = [deque(maxlen=length) for _ in range(bins)]
    history = L.loss_history(bins, length)
    for _ in range(6):
        entries, losses = np.minimum(rng.geometric(0.15, 40) - 1, bins - 1), rng.uniform(0.1, 9.0, 40)
        history = fill(history, (entries + 1) / bins, losses)
        for i, loss in zip(entries, losses):
            queues[i].append(loss)
    met = np.minimum(np.asarray(history.count), length)
    np.testing.assert_array_equal(met, [len(q) for q in queues])
    assert history.count.sum() == 240
    want = [sorted([0.0] * (length - len(q)) + [np.float32(x) for x in q]) for q in queues]
    np.testing.assert_array_equal(np.sort(history.losses, 1), want)


def test_times_by_loss_follow_the_root_of_the_second_moment_and_their_weights_undo_it():
    rng, bins, n = np.random.default_rng(0), 8, 20000
    process, losses = P.discrete_vp(np.linspace(1e-3, 0.2, bins)), rng.uniform(0.1, 4.0, (10, bins))
    history = L.loss_history(bins)
    t = np.tile((np.arange(bins) + 1) / bins, (10, 1))
    draw = jax.jit(lambda history: L.sample_by_loss(KEY, n, history, process=process))
    history = fill(history, t[:9].ravel(), losses[:9].ravel())
    np.testing.assert_allclose(draw(history)[1], 1.0, rtol=1e-6)  # no bin has met its ten
    history = fill(history, t[9], losses[9])
    times, weight = (np.asarray(a) for a in draw(history))
    p = np.sqrt(np.mean(losses**2, 0))
    p = 0.999 * p / p.sum() + 0.001 / bins
    entry = np.round(times * bins).astype(int) - 1
    np.testing.assert_allclose(times * bins, entry + 1, rtol=1e-6)
    np.testing.assert_allclose(weight, 1 / (bins * p[entry]), rtol=1e-5)
    counts = np.bincount(entry, minlength=bins)
    assert stats.chisquare(counts, n * p).pvalue > 0.01
    # E[weight loss] is the mean over uniform times: at most four standard errors away.
    value = np.mean(losses, 0)
    estimate = weight * value[entry]
    assert abs(estimate.mean() - value.mean()) < 4 * estimate.std() / np.sqrt(n)
    assert estimate.std() < np.std(value)  # what the method is for


def test_continuous_times_by_loss_are_uniform_within_their_bins_and_are_met_again_there():
    history = L.loss_history(5, 1)
    history = fill(history, [0.1, 0.3, 0.5, 0.7, 0.9], [1.0, 2.0, 3.0, 4.0, 5.0])
    t, weight = L.sample_by_loss(KEY, N, history, process=P.flow(), uniform=0.1)
    p = 0.9 * np.arange(1, 6) / 15 + 0.02
    edges = np.append(0, np.cumsum(p))
    assert distance(t, lambda t: np.interp(t, np.linspace(0, 1, 6), edges)) < 0.025
    np.testing.assert_allclose(weight, 0.2 / p[np.asarray(t * 5, int)], rtol=1e-5)
    again = fill(L.loss_history(5, N), t, weight)
    np.testing.assert_allclose(again.losses.max(1), 0.2 / p, rtol=1e-5)
    np.testing.assert_allclose(again.losses.sum(1) / again.count, 0.2 / p, rtol=1e-4)


def test_losses_that_vanish_are_met_equally_often():
    history = L.loss_history(4, 1)
    t, weight = L.sample_by_loss(KEY, 64, fill(history, [0.2, 0.4, 0.7, 0.9], np.zeros(4)))
    np.testing.assert_array_equal(weight, 1.0)
    assert set(np.ceil(np.asarray(t) * 4)) == {1, 2, 3, 4}


def test_min_snr_is_right_for_eps_x_and_v():
    process, t = P.vp_linear(), jnp.asarray([0.05, 0.2, 0.5, 0.9])
    snr = np.exp(P.log_snr(process, t))
    clipped = np.minimum(snr, 5.0)
    for kind, want in {"x": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}.items():
        np.testing.assert_allclose(L.output_weight("min_snr", kind, process, t), want, rtol=1e-4, err_msg=kind)
    np.testing.assert_allclose(
        L.output_weight(partial(L.min_snr, gamma=1.0), "eps", process, t), np.minimum(snr, 1.0) / snr, rtol=1e-4
    )


@pytest.mark.parametrize(
    "kind, weight, name",
    [("eps", "snr", "vp_linear"), ("v", "snr_plus_one", "vp_linear"), ("edm", "edm", "edm"), ("edm", "edm", "trig")]
    + [("flow", "flow", name) for name in ("flow", "vp_linear", "edm")],
)
def test_the_weight_that_a_kind_implies_is_one(kind, weight, name):
    process = P.PROCESSES[name]()
    np.testing.assert_allclose(L.output_weight(weight, kind, process, jnp.asarray([0.1, 0.5, 0.9])), 1.0, rtol=1e-4)


@pytest.mark.parametrize("name", ["vp_linear", "flow", "ve"])
def test_sigmoid_and_p2_are_the_stated_functions_on_the_error_of_eps(name):
    process = P.PROCESSES[name]()
    with jax.enable_x64(True):
        t, h = jnp.asarray([0.1, 0.4, 0.8]), 1e-6
        value = np.asarray(P.log_snr(process, t))
        speed = (P.log_snr(process, t - h) - P.log_snr(process, t + h)) / (2 * h)
        for bias in (-3.0, 1.0):
            out = L.output_weight(partial(L.sigmoid, bias=bias), "eps", process, t)
            np.testing.assert_allclose(out, speed / (1 + np.exp(value - bias)), rtol=1e-6)
        for k, gamma in ((1.0, 1.0), (2.0, 0.5)):
            out = L.output_weight(partial(L.p2, k=k, gamma=gamma), "eps", process, t)
            np.testing.assert_allclose(out, 1 / (k + np.exp(value)) ** gamma, rtol=1e-9)


def test_a_weight_for_uniform_times_is_worth_the_times_that_it_is_the_density_of():
    """cosmap: E over its own times of the flow's plain error = E over uniform times of the weighted error."""
    with jax.enable_x64(True):
        u = (jnp.arange(200000) + 0.5) / 200000
        error = lambda t: 1 + t**3 + jnp.sin(5 * t)  # noqa: E731
        drawn = jnp.mean(error(1 - 1 / (jnp.tan(0.5 * np.pi * u) + 1)))
        weighted = jnp.mean(L.output_weight("cosmap", "flow", P.flow(), u) * error(u))
        np.testing.assert_allclose(weighted, drawn, rtol=1e-9)


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


@pytest.mark.parametrize("name", ["ve", "vp_linear", "sub_vp"])
def test_score_matching_of_a_gaussian_ends_at_its_score(name):
    """The best c in score = c x_t is -1 / var(x_t), where sigma^2 |error|^2 is alpha^2 v / var(x_t): that of eps.

    The four corners (+-sqrt(v), +-1) have the second moments of x ~ N(0, v) and eps, and a loss of c x_t sees no others.
    """
    process, v = P.PROCESSES[name](), 0.3
    with jax.enable_x64(True):
        x, eps = (jnp.asarray(corners) for corners in np.array([[1, 1, -1, -1], [1, -1, 1, -1]])[:, :, None] * 1.0)
        for t in (0.2, 0.5, 0.9):
            alpha, sigma = (float(f(jnp.asarray(t))) for f in (process.alpha, process.sigma))
            var = alpha**2 * v + sigma**2

            def loss(c, kind, weight, t=t):
                apply = lambda c, x_t, time, cond: c * x_t  # noqa: E731
                rows = (process, kind, v**0.5 * x, None, KEY)
                return jnp.mean(L.diffusion_loss(apply, c, *rows, weight=weight, t=t, eps=eps)[0])

            for kind, weight, best in (("score", "snr", -1 / var), ("eps", "simple", sigma / var)):
                value, slope = jax.value_and_grad(loss)(jnp.asarray(best), kind, weight)
                np.testing.assert_allclose([value, slope], [alpha**2 * v / var, 0], atol=1e-12)


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


@pytest.mark.parametrize(
    "name, kind", [("vp_linear", "eps"), ("flow", "flow"), ("ve", "x"), ("trig", "v"), ("edm", "edm")]
)
def test_the_vlb_weighted_loss_is_the_exact_log_likelihood_of_a_gaussian_model(name, kind):
    """The reverse process of a model N(m, c), run from time b to a, is the forward one backwards, so the bound has no gap:

        -log p(x) = KL(q(x_b | x) || p(x_b)) + E int_a^b vlb |x - x_hat|^2 dt + E[-log p(x | x_a)]

    for every single x. Gauss-Hermite nodes are exact for the square in eps, Gauss-Legendre nodes carry the time.
    """
    process, m, c = P.PROCESSES[name](), 0.3, 0.64
    a, b = max(process.t_min, 0.02), min(process.t_max, 0.98)
    with jax.enable_x64(True):
        eps, w_eps = np.polynomial.hermite_e.hermegauss(3)
        t, w_t = np.polynomial.legendre.leggauss(120)
        t, w_t = 0.5 * (a + b) + 0.5 * (b - a) * t, 0.5 * (b - a) * w_t
        w = np.multiply.outer(w_t, w_eps / w_eps.sum()).ravel()
        t, eps = (jnp.asarray(np.broadcast_to(v, (120, 3)).ravel()) for v in (t[:, None], eps))

        def model(x_t, t):
            alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
            residual = (x_t - alpha * m) / (alpha**2 * c + sigma**2)
            return Clean(m + alpha * c * residual, sigma * residual)

        @jax.jit
        def rows(x):
            def apply(params, x_in, time, cond):
                clean = model(x_in / P.per_row(Q.input_scale(kind, process, t), x_in), t)
                return Q.target(kind, process, clean.x, clean.eps, t)

            x = jnp.broadcast_to(x, (len(t), 1))
            return L.diffusion_loss(apply, None, process, kind, x, None, KEY, weight="vlb", t=t, eps=eps[:, None])[0]

        (alpha_a, sigma_a), (alpha_b, sigma_b) = (
            (float(process.alpha(jnp.asarray(u))), float(process.sigma(jnp.asarray(u)))) for u in (a, b)
        )
        for x in (-1.5, 0.2, 2.0):
            middle = np.sum(w * np.asarray(rows(x)))
            v = alpha_b**2 * c + sigma_b**2
            prior = 0.5 * (np.log(v / sigma_b**2) - 1 + (sigma_b**2 + alpha_b**2 * (x - m) ** 2) / v)
            # p(x | x_a) = N(mean, left), E over x_a of (x - mean)^2.
            left = c * sigma_a**2 / (alpha_a**2 * c + sigma_a**2)
            pull = alpha_a * c / (alpha_a**2 * c + sigma_a**2)
            square = ((1 - pull * alpha_a) * (x - m)) ** 2 + (pull * sigma_a) ** 2
            decoder = 0.5 * (np.log(2 * np.pi * left) + square / left)
            want = 0.5 * (np.log(2 * np.pi * c) + (x - m) ** 2 / c)
            np.testing.assert_allclose(prior + middle + decoder, want, rtol=1e-7, atol=1e-7)


TABLE = np.linspace(1e-2, 0.3, 12)


def reference_bits(x, x_hat, eps, v, entry):
    """Nichol & Dhariwal's term of the bound from the table alone, with their clipping and their tanh, in bits a dim."""
    bar = np.cumprod(1 - TABLE)
    before = np.append(1.0, bar[:-1])
    small = TABLE * (1 - before) / (1 - bar)
    small, large = np.log(np.append(small[1], small[1:]))[entry][:, None], np.log(TABLE)[entry][:, None]
    log_var = large * (v + 1) / 2 + small * (1 - (v + 1) / 2)
    bar, before, beta = (a[entry][:, None] for a in (bar, before, TABLE))
    x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * eps

    def mean(x):
        return np.sqrt(before) * beta / (1 - bar) * x + np.sqrt(1 - beta) * (1 - before) / (1 - bar) * x_t

    kl = 0.5 * (log_var - small - 1 + np.exp(small - log_var) + (mean(x) - mean(x_hat)) ** 2 / np.exp(log_var))

    def cdf(y):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    up, down = (cdf((x - mean(x_hat) + h) / np.exp(0.5 * log_var)) for h in (1 / 255, -1 / 255))
    p = np.where(x < -0.999, up, np.where(x > 0.999, 1 - down, up - down))
    nll = -np.log(np.maximum(p, 1e-12))
    return np.where(entry == 0, nll.mean(1), kl.mean(1)) / np.log(2)


@pytest.mark.parametrize("kind", ["eps", "x", "v"])
@pytest.mark.parametrize("weight", ["simple", "min_snr"])
def test_the_hybrid_loss_is_that_of_nichol_and_dhariwal(kind, weight):
    process, rng = P.discrete_vp(TABLE), np.random.default_rng(0)
    entry = np.arange(12).repeat(3)
    x = (
        np.clip(np.round(rng.uniform(-160, 160, (36, 8)) + 127.5), 0, 255) / 127.5 - 1
    )  # levels, both extremes among them
    eps, v = rng.standard_normal(x.shape), rng.uniform(-1, 1, x.shape)
    output = rng.standard_normal(x.shape)
    bar = np.cumprod(1 - TABLE)[entry][:, None]
    x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * eps
    x_hat = {
        "eps": (x_t - np.sqrt(1 - bar) * output) / np.sqrt(bar),
        "x": output,
        "v": np.sqrt(bar) * x_t - np.sqrt(1 - bar) * output,
    }[kind]
    wanted = {"eps": eps, "x": x, "v": np.sqrt(bar) * eps - np.sqrt(1 - bar) * x}[kind]
    snr = (bar / (1 - bar))[:, 0]
    scale = {"eps": 1 / snr, "x": 1.0, "v": 1 / (snr + 1)}[kind] * np.minimum(snr, 5.0) if weight == "min_snr" else 1.0
    plain, bits = scale * np.mean((output - wanted) ** 2, 1), reference_bits(x, x_hat, eps, v, entry)
    with jax.enable_x64(True):

        @jax.jit
        def run(params, vlb_weight=1e-3):
            apply = lambda params, x, t, cond: jnp.concatenate(params, -1)  # noqa: E731
            return L.diffusion_loss(
                apply, params, process, kind, jnp.asarray(x), None, KEY, weight=weight,
                t=jnp.asarray((entry + 1) / 12), eps=jnp.asarray(eps), learned_variance=True, vlb_weight=vlb_weight,
            )  # fmt: skip

        params = jnp.asarray(output), jnp.asarray(v)
        loss, aux = run(params)
        np.testing.assert_allclose(aux["vlb"], bits, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(loss, plain + 1e-3 * 12 * bits, rtol=1e-8)
        np.testing.assert_allclose(run(params, 0.5)[0], plain + 6 * bits, rtol=1e-8)
        # The bound moves v and leaves the prediction to the error.
        slopes = [jax.grad(lambda p, w=w: run(p, w)[0].sum())(params) for w in (0.0, 1e-3)]
        np.testing.assert_array_equal(slopes[0][0], slopes[1][0])
        assert np.abs(slopes[0][0]).max() > 0 and (slopes[0][1] == 0).all()
        assert np.isfinite(slopes[1][1]).all() and (slopes[1][1] != 0).mean() > 0.9


@pytest.mark.parametrize("var", [0.2, 1.0])
def test_the_bound_of_a_table_has_no_gap_for_the_exact_model_of_a_gaussian(var):
    """With the exact p(x_s | x_t) of data N(m, var), whose variance lies in the learned range, the path tells no more than
    its end: sum of the terms of all entries above the first = KL(q(x_1 | x) || p(x_1)) - KL(q(x_N | x) || p(x_N))."""
    process, m, x = P.discrete_vp(TABLE), 0.3, np.array([-1.5, 0.2, 2.0])
    bar = np.cumprod(1 - TABLE)
    with jax.enable_x64(True):
        eps, w = np.polynomial.hermite_e.hermegauss(3)
        t, s = jnp.arange(2, 13) / 12, jnp.arange(1, 12) / 12
        # cov(x_s | x_t) by conditioning two Gaussians, as a place in the range.
        marginal_t, marginal_s = bar[1:] * var + 1 - bar[1:], bar[:-1] * var + 1 - bar[:-1]
        exact = np.log(marginal_s - (1 - TABLE[1:]) * marginal_s**2 / marginal_t)
        small, large = (Q.step_log_var(process, jnp.full(11, v), t, s) for v in (-1.0, 1.0))
        v = 2 * (exact - small) / (large - small) - 1
        assert (np.abs(v) <= 1 + 1e-9).all()

        def terms(x, eps):
            x, eps = jnp.full((11, 1), x), jnp.full((11, 1), eps)
            residual = (P.corrupt(process, x, eps, t)[:, 0] - np.sqrt(bar[1:]) * m) / marginal_t
            clean = Clean((m + np.sqrt(bar[1:]) * var * residual)[:, None], (np.sqrt(1 - bar[1:]) * residual)[:, None])
            return L.vlb_bits(process, Clean(x, eps), clean._replace(log_var=v[:, None]), t)

        def kl(x, i):
            q, p = 1 - bar[i], bar[i] * var + 1 - bar[i]
            return 0.5 * (np.log(p / q) - 1 + (q + bar[i] * (x - m) ** 2) / p)

        for value in x:
            total = sum(w_i * jnp.sum(terms(value, e)) for w_i, e in zip(w / w.sum(), eps))
            np.testing.assert_allclose(total * np.log(2), kl(value, 0) - kl(value, -1), rtol=1e-9)
        # The bound's own prior is N(0, 1).
        q = 1 - bar[-1]
        want = 0.5 * (-np.log(q) - 1 + q + bar[-1] * x**2) / np.log(2)
        np.testing.assert_allclose(L.prior_bits(process, jnp.asarray(x)[:, None]), want, rtol=1e-9)


def test_probabilities_of_the_256_levels_sum_to_one_and_are_those_of_the_normal_law():
    x = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    for mean, std in ((0.1, 0.05), (-0.98, 0.3), (0.7, 2.0), (0.0, 1e-3)):
        p = np.exp(L.discretized_log_prob(x, jnp.float32(mean), jnp.float32(2 * np.log(std))))
        np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-5)
        edges = stats.norm.cdf(np.append(np.append(-np.inf, (np.arange(255) + 0.5) / 127.5 - 1), np.inf), mean, std)
        np.testing.assert_allclose(p, np.diff(edges), atol=4e-4)


def test_learned_uncertainty_is_least_at_the_loss_and_evens_out_the_levels():
    loss = jnp.asarray([0.01, 1.0, 30.0])
    slope = jax.grad(lambda u: L.with_uncertainty(loss, u).sum())
    np.testing.assert_allclose(slope(jnp.log(loss)), 0.0, atol=1e-6)
    assert (slope(jnp.log(loss) + 0.1) > 0).all() and (slope(jnp.log(loss) - 0.1) < 0).all()
    np.testing.assert_allclose(L.with_uncertainty(loss, jnp.log(loss)), 1 + np.log(loss), rtol=1e-5)
    pull = jax.grad(lambda scale: L.with_uncertainty(scale * loss, jnp.log(loss)).sum())
    np.testing.assert_allclose(pull(1.0), 3.0, rtol=1e-5)


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
    # Each from a key of its own: from one key the noise of a row would follow from its time.
    key_t, key_eps = jax.random.split(KEY)
    seen = []
    L.diffusion_loss(lambda p, x, t, c: seen.append(x) or x, None, P.flow(), "x", jnp.zeros((8, 2)), None, KEY)
    t = L.sample_times(key_t, 8, process=P.flow())
    np.testing.assert_allclose(seen[0], t[:, None] * jax.random.normal(key_eps, (8, 2)), rtol=1e-5)


def test_unknown_names_and_shapes_are_named():
    with pytest.raises(ValueError, match="time distribution is 'lognormal'"):
        L.sample_times(KEY, 2, "lognormal")
    with pytest.raises(ValueError, match="expected process="):
        L.sample_times(KEY, 2, "edm")
    with pytest.raises(ValueError, match="loss weight is 'none'"):
        L.output_weight("none", "eps", P.flow(), 0.5)
    double = lambda p, x, t, c: jnp.zeros((2, 6))  # noqa: E731
    run = partial(L.diffusion_loss, double, None, kind="x", x=jnp.zeros((2, 3)), cond=None, key=KEY)
    with pytest.raises(ValueError, match=r"shape \(2, 6\), expected that of x_t, \(2, 3\)"):
        run(process=P.flow())
    with pytest.raises(ValueError, match="expected a discrete process"):
        run(process=P.flow(), learned_variance=True)
    assert set(run(process=P.flow(), learned_variance=True, vlb_weight=0)[1]) == {"t", "error"}
    x = Clean(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"expected clean\.log_var"):
        L.vlb_bits(P.discrete_vp(), x, x, jnp.ones(2))
    with pytest.raises(ValueError, match=r"scale is 2\.0"):
        L.sample_times(KEY, 2, "mode", scale=2.0)
    with pytest.raises(ValueError, match="history has 0 bins"):
        L.loss_history(0)
