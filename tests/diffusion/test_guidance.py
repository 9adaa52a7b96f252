"""The denoiser of a network, the pair, and guidance: identities, closed forms, one program for every scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import grids, guidance
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.denoiser import make_branches, make_denoiser, make_pair
from ldm_jax.diffusion.exact import GAUSSIAN, MIXTURE, Gaussian
from ldm_jax.diffusion.guidance import GUIDANCES, cfg
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.samplers.ode import renoise

X = np.random.default_rng(0).standard_normal((4, 3, 3, 2)).astype(np.float32)
COND = {"label": jnp.asarray([1.0, 2.0, 3.0, 4.0])}
UNCOND = {"label": jnp.zeros(1)}
PROCESS, FLOW = P.vp_linear(), P.flow()


def network(params, x, t, cond):
    """A smooth function of all its arguments, row by row."""
    pull = cond["label"].reshape(-1, 1, 1, 1)
    return jnp.tanh(params * x + 0.3 * pull * jnp.roll(x, 1, axis=1) + 1e-3 * t.reshape(-1, 1, 1, 1))


def pair(kind="eps", uncond=UNCOND):
    return make_pair(network, 0.7, PROCESS, kind, COND, uncond)


def both(denoise, t=0.4):
    """x and eps of a denoiser at X, as one array."""
    clean = jax.jit(lambda x, t: denoise(x, t))(X, t)
    return np.stack([clean.x, clean.eps])


@pytest.mark.parametrize("kind", ["eps", "edm"])
def test_pair_is_two_denoisers_in_one_call(kind):
    calls = []

    def counted(params, x, t, cond):
        calls.append((x.shape, t.shape, cond["label"].shape))
        return network(params, x, t, cond)

    cond, uncond = make_pair(counted, 0.7, PROCESS, kind, COND, UNCOND)(jnp.asarray(X), 0.4)
    assert calls == [((8, 3, 3, 2), (8,), (8,))]
    np.testing.assert_allclose(
        np.stack([cond.x, cond.eps]), both(make_denoiser(network, 0.7, PROCESS, kind, COND)), atol=1e-5
    )
    null = {"label": jnp.zeros(4)}
    np.testing.assert_allclose(
        np.stack([uncond.x, uncond.eps]), both(make_denoiser(network, 0.7, PROCESS, kind, null)), atol=1e-5
    )


def test_the_network_sees_the_time_input_of_each_row():
    seen = []
    process = P.discrete_vp()
    denoise = make_denoiser(lambda p, x, t, c: (seen.append(t), x)[1], None, process, "eps")
    denoise(jnp.asarray(X), 0.5)
    denoise(jnp.asarray(X), jnp.asarray([0.001, 0.25, 0.5, 1.0]))
    np.testing.assert_array_equal(seen[0], [499] * 4)
    np.testing.assert_array_equal(seen[1], [0, 249, 499, 999])


@pytest.mark.usefixtures("exact_programs")
def test_scale_one_and_times_outside_the_interval_are_the_conditional_network():
    cond = both(lambda x, t: pair()(x, t)[0])
    np.testing.assert_array_equal(both(cfg(pair(), 1.0)), cond)
    np.testing.assert_array_equal(both(cfg(pair(), 5.0, t_lo=0.5, t_hi=0.8)), cond)
    np.testing.assert_array_equal(both(cfg(pair(), 5.0, t_lo=0.1, t_hi=0.3)), cond)
    np.testing.assert_array_equal(both(cfg(pair(), 5.0, t_lo=0.3, t_hi=0.5)), both(cfg(pair(), 5.0)))
    assert np.abs(both(cfg(pair(), 5.0)) - cond).max() > 0.1


def test_interval_is_judged_row_by_row():
    t = jnp.asarray([0.1, 0.4, 0.6, 0.9])
    out, cond = both(cfg(pair(), 5.0, t_lo=0.3, t_hi=0.7), t), both(lambda x, t: pair()(x, t)[0], t)
    np.testing.assert_array_equal(np.abs(out - cond).max((0, 2, 3, 4)) > 0, [False, True, True, False])


def test_guidance_by_the_same_network_is_unguided_whatever_the_scale():
    same = lambda scale, rescale: both(cfg(pair(uncond=COND), scale, rescale=rescale))  # noqa: E731
    np.testing.assert_allclose(same(7.0, 0.0), same(1.0, 0.0), atol=1e-6)
    np.testing.assert_allclose(same(7.0, 0.7), same(1.0, 0.0), atol=1e-6)


@pytest.mark.usefixtures("exact_programs")
def test_scale_extrapolates_and_may_differ_by_row():
    c, u = both(lambda x, t: pair()(x, t)[0]), both(lambda x, t: pair()(x, t)[1])
    np.testing.assert_allclose(both(cfg(pair(), 3.0)), u + 3 * (c - u), atol=2e-5)
    rows = both(cfg(pair(), jnp.asarray([1.0, 3.0, 1.0, 3.0])))
    np.testing.assert_array_equal(rows[:, ::2], c[:, ::2])
    np.testing.assert_array_equal(rows[:, 1::2], both(cfg(pair(), 3.0))[:, 1::2])


@pytest.mark.parametrize("process", [P.vp_linear(), P.flow(), P.edm()])
def test_guided_and_rescaled_estimates_still_explain_x_t(process):
    pair = make_pair(network, 0.7, process, "flow", COND, UNCOND)
    t = jnp.asarray([0.1, 0.4, 0.6, 0.9])
    clean = jax.jit(cfg(pair, 4.0, rescale=0.7))(X, t)
    np.testing.assert_allclose(P.corrupt(process, clean.x, clean.eps, t), X, atol=1e-4)


def test_rescale_is_lin_equation_16_for_the_v_prediction():
    t, scale, phi = 0.4, 6.0, 0.7
    alpha, sigma = float(PROCESS.alpha(jnp.float32(t))), float(PROCESS.sigma(jnp.float32(t)))
    c, u = (alpha * clean.eps - sigma * clean.x for clean in pair()(jnp.asarray(X), t))
    guided = u + scale * (c - u)
    want = (phi * c.std((1, 2, 3), keepdims=True) / guided.std((1, 2, 3), keepdims=True) + 1 - phi) * guided
    clean = cfg(pair(), scale, rescale=phi)(jnp.asarray(X), t)
    np.testing.assert_allclose(alpha * clean.eps - sigma * clean.x, want, atol=1e-4)


def test_rescale_is_finite_where_alpha_or_sigma_is_zero():
    process = P.flow()
    for t in (0.0, 1.0):
        clean = cfg(make_pair(network, 0.7, process, "flow", COND, UNCOND), 4.0, rescale=1.0)(jnp.asarray(X), t)
        assert np.isfinite(clean.x).all() and np.isfinite(clean.eps).all()


@pytest.mark.usefixtures("exact_programs")
def test_guidance_of_the_first_channels_leaves_the_others_to_the_condition():
    """x_c + (scale - 1) (x_c - x_u) on the first channel of two, as DiT's original guides three of four."""
    cond, uncond = (both(make_denoiser(network, 0.7, PROCESS, "eps", c)) for c in (COND, {"label": jnp.zeros(4)}))
    expected = np.concatenate([(4 * cond - 3 * uncond)[..., :1], cond[..., 1:]], -1)
    np.testing.assert_allclose(both(cfg(pair(), 4.0, channels=1)), expected, atol=1e-5)
    np.testing.assert_array_equal(both(cfg(pair(), 4.0, channels=2)), both(cfg(pair(), 4.0)))


def test_one_program_serves_every_scale():
    traces = []

    @jax.jit
    def run(x, scale, rescale):
        traces.append(1)
        return cfg(pair(), scale, rescale=rescale)(x, 0.4)

    values = [run(X, scale, rescale).x for scale, rescale in [(1.0, 0.0), (3.0, 0.0), (3.0, 0.5)]]
    assert len(traces) == 1
    assert not np.allclose(values[0], values[1]) and not np.allclose(values[1], values[2])


def test_log_variance_passes_through():
    clean = Clean(jnp.asarray(X), jnp.asarray(X), jnp.ones_like(X))
    assert cfg(lambda x, t: (clean, clean), 2.0)(jnp.asarray(X), 0.5).log_var is clean.log_var


def test_a_condition_that_does_not_match_is_named():
    with pytest.raises(ValueError, match=r"branch 1 holds \[\], expected the keys of branch 0, \['label'\]"):
        make_pair(network, 0.7, PROCESS, "eps", COND, {})
    with pytest.raises(ValueError, match=r"branch 1's 'label' has shape \(3,\)"):
        make_pair(network, 0.7, PROCESS, "eps", COND, {"label": jnp.zeros(3)})


# ---- Every guidance. CALLS builds it from a scale s, the branches b(n) of one network, and a process.

IMAGE = {"label": jnp.asarray([-1.0, 0.5, 2.0, -2.0])}
NOTHING = {"label": jnp.zeros(4)}


def branch(i, kind="flow", process=PROCESS):
    return make_denoiser(network, 0.7, process, kind, (COND, NOTHING, IMAGE)[i])


def branches(n, kind="flow", process=PROCESS, same=False):
    conds = [COND] * 3 if same else [COND, UNCOND, IMAGE]
    return make_branches(network, 0.7, process, kind, *conds[:n])


def mean_of_rows(x):
    """A linear operator, f[B, 3, 3, 2] -> f[B, 3, 2]."""
    return x.mean(1)


def loudness(x_t, t):
    """A log-probability for every row."""
    return -jnp.sum(jnp.tanh(x_t - 0.3) ** 2, (1, 2, 3)) * (1 - 0.5 * t)


def one(b, i=0):
    """Branch i of the pair as a denoiser."""
    return lambda x_t, t: b(2)(x_t, t)[i]


Y = np.random.default_rng(1).standard_normal((4, 3, 2)).astype(np.float32)

CALLS = {
    "cfg": lambda s, b, p: cfg(b(2), s),
    "autoguidance": lambda s, b, p: guidance.autoguidance(one(b), one(b, 1), s),
    "cfg_pp": lambda s, b, p: guidance.cfg_pp(b(2), s),
    "cfg_zero": lambda s, b, p: guidance.cfg_zero(b(2), s, p, t_zero=1.1),
    "apg": lambda s, b, p: guidance.apg(b(2), s, eta=0.3, threshold=2.0),
    "third_branch": lambda s, b, p: guidance.third_branch(b(3), s, s - 1),
    "dual": lambda s, b, p: guidance.dual(b(3), s, 0.5 + 0.5 * s),
    "interval": lambda s, b, p: guidance.interval(cfg(b(2), s), one(b), 0.3, 0.5),
    "classifier": lambda s, b, p: guidance.classifier(one(b), loudness, p, s - 1),
    "dps": lambda s, b, p: guidance.dps(one(b), mean_of_rows, jnp.asarray(Y), s - 1, p),
    "pigdm": lambda s, b, p: guidance.pigdm(one(b), mean_of_rows, jnp.asarray(Y), 0.1, p, s - 1, iterations=2),
    "static_threshold": lambda s, b, p: guidance.static_threshold(one(b), p, -10 / s**3, 10 / s**3),
    "dynamic_threshold": lambda s, b, p: guidance.dynamic_threshold(one(b), p, 0.9, 10 / s**3),
}
# The scale s that does nothing: what is left is the conditional branch, the unconditional one for CFG++.
NEUTRAL = {name: 0.0 if name == "cfg_pp" else 1.0 for name in CALLS}
# These change the estimate whatever the branches say.
BY_DATA = {"classifier", "dps", "pigdm", "static_threshold", "dynamic_threshold"}
NAMES = sorted(CALLS)


@functools.cache
def compiled(name, kind="flow", process=PROCESS, same=False):
    """(x_t, t, scale) -> x and eps of the guidance as one array, jitted once; how often it was traced."""
    traces = []

    @jax.jit
    def run(x, t, scale):
        traces.append(1)
        clean = CALLS[name](scale, lambda n: branches(n, kind, process, same), process)(x, t)
        return jnp.stack([clean.x, clean.eps])

    return run, traces


@functools.cache
def plain(i, kind="flow", process=PROCESS):
    return jax.jit(lambda x, t: jnp.stack(branch(i, kind, process)(x, t)[:2]))


def test_every_guidance_is_listed_and_tested():
    assert set(CALLS) == set(GUIDANCES)


def test_branches_are_as_many_denoisers_in_one_call():
    calls = []

    def counted(params, x, t, cond):
        calls.append((x.shape, t.shape, cond["label"].shape))
        return network(params, x, t, cond)

    t = jnp.asarray([0.1, 0.4, 0.6, 0.9])
    three = make_branches(counted, 0.7, PROCESS, "edm", COND, UNCOND, IMAGE)(jnp.asarray(X), t)
    assert calls == [((12, 3, 3, 2), (12,), (12,))]
    for i, clean in enumerate(three):
        np.testing.assert_allclose(np.stack(clean[:2]), plain(i, "edm")(X, t), atol=1e-5)
    for mine, theirs in zip(branches(2)(jnp.asarray(X), t), pair("flow")(jnp.asarray(X), t)):
        np.testing.assert_array_equal(np.stack(mine[:2]), np.stack(theirs[:2]))


def test_branches_carry_a_learned_variance_each():
    apply = lambda params, x, t, cond: jnp.concatenate([x, x * cond["label"].reshape(-1, 1, 1, 1)], -1)  # noqa: E731
    three = make_branches(apply, None, PROCESS, "eps", COND, UNCOND, IMAGE, learned_variance=True)(jnp.asarray(X), 0.4)
    for clean, cond in zip(three, (COND, NOTHING, IMAGE)):
        np.testing.assert_array_equal(clean.log_var, X * cond["label"].reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_neutral_scale_is_the_unguided_network_exactly(name):
    # Not jitted: two compiled programs may round one tanh differently.
    x_t, t = jnp.asarray(X), jnp.full(4, 0.4)
    clean = CALLS[name](NEUTRAL[name], branches, PROCESS)(x_t, t)
    want = branches(3 if name in ("third_branch", "dual") else 2)(x_t, t)[1 if name == "cfg_pp" else 0]
    np.testing.assert_array_equal(clean.x, want.x)
    np.testing.assert_array_equal(clean.eps, want.eps)
    assert np.abs(compiled(name)[0](X, 0.4, 3.0)[0] - want.x).max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_one_compiled_program_serves_every_scale(name):
    run, traces = compiled(name)
    scales = [1.5, 3.0, 4.0]
    outputs = [run(X, 0.4, scale) for scale in scales]
    assert len(traces) == 1
    for scale, output in zip(scales, outputs):
        clean = CALLS[name](scale, branches, PROCESS)(jnp.asarray(X), jnp.float32(0.4))
        np.testing.assert_allclose(output, np.stack(clean[:2]), atol=1e-5)
    assert np.abs(outputs[1] - outputs[2]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_see_each_other(name):
    run, other = compiled(name)[0], X.copy()
    other[0] = 5 * other[0] + 1
    before, after = run(X, 0.4, 3.0), run(other, 0.4, 3.0)
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert np.abs(before[:, 0] - after[:, 0]).max() > 0.01


@pytest.mark.parametrize("name", sorted(set(NAMES) - BY_DATA))
def test_guidance_by_one_network_in_every_branch_is_unguided(name):
    np.testing.assert_allclose(compiled(name, same=True)[0](X, 0.4, 5.0), plain(0)(X, 0.4), atol=2e-6)


@pytest.mark.parametrize("process", [P.vp_linear(), P.flow(), P.edm()], ids=["vp_linear", "flow", "edm"])
@pytest.mark.parametrize("name", NAMES)
def test_the_guided_estimate_explains_x_t(name, process):
    with jax.enable_x64(True):
        t, x_t = jnp.asarray([0.1, 0.35, 0.45, 0.8]), jnp.asarray(X, jnp.float64)
        parts = functools.partial(branches, process=process)
        clean = CALLS[name](4.0, parts, process)(x_t, t)
        assert clean.x.dtype == clean.eps.dtype == jnp.float64
        gap = P.corrupt(process, clean.x, clean.eps, t) - x_t
        if name == "cfg_pp":  # the unconditional eps does not explain the guided x: that is the method
            cond, uncond = parts(2)(x_t, t)
            assert np.abs(gap).max() > 0.01
            gap = gap - P.per_row(4 * process.alpha(t), x_t) * (cond.x - uncond.x)
        assert np.abs(gap).max() < 1e-11
        assert np.abs(clean.x - parts(2)(x_t, t)[0].x).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_guidance_is_regular_where_alpha_or_sigma_is_zero(name):
    run, _ = compiled(name, process=FLOW)
    (x, _), (_, eps) = data, noise = run(X, 0.0, 3.0), run(X, 1.0, 3.0)
    for guided in (data, noise):
        assert guided.dtype == jnp.float32 and np.isfinite(guided).all()
    np.testing.assert_allclose(eps, X, atol=1e-6)
    if not name.endswith("threshold"):  # where sigma = 0 no eps explains the clipped x
        np.testing.assert_allclose(x, X, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_learned_variance_passes_through(name):
    clean = Clean(jnp.asarray(X), jnp.asarray(0.5 * X), jnp.ones_like(X))
    guided = CALLS[name](2.0, lambda n: lambda x, t: (clean,) * n, PROCESS)(jnp.asarray(X), jnp.float32(0.4))
    np.testing.assert_array_equal(guided.log_var, clean.log_var)


# ---- The scale as a function of time.


@pytest.mark.parametrize("name", sorted(guidance.SHAPES))
def test_shapes_spread_the_extra_scale_and_keep_its_mean(name):
    t = (np.arange(2000) + 0.5) / 2000
    scale = np.asarray(guidance.dynamic(3.0, name)(jnp.asarray(t)))
    assert abs(scale.mean() - 3) < 1e-5 and scale.min() >= 1 and scale.max() > 4.9
    if name in ("linear", "cosine"):
        assert (np.diff(scale) <= 1e-6).all()
    if name in ("sine", "inverse_linear"):
        assert (np.diff(scale) >= -1e-6).all()
    if name.endswith("v"):
        np.testing.assert_allclose(scale, scale[::-1], atol=1e-5)
        assert (scale[0] > scale[1000]) == (name == "v")


def test_schedules_at_known_times():
    at = lambda scale, t: float(scale(jnp.float32(t)))  # noqa: E731
    # Wang et al. 2024: omega (T - t) / T * 2, and max(c, omega_t).
    assert at(guidance.dynamic(8.5), 0.25) == 1 + 7.5 * 1.5
    assert at(guidance.dynamic(8.5, floor=2.0), 0.95) == 3 and at(guidance.dynamic(8.5, floor=2.0), 0.5) == 8.5
    assert abs(at(guidance.dynamic(3.0, "cosine"), 1 / 3) - 4) < 1e-6
    assert at(guidance.dynamic(0.6, "linear", neutral=0.0), 0.75) == pytest.approx(0.3)
    powered = guidance.dynamic(5.0, guidance.powered_cosine(2.0))
    assert at(powered, 0.0) == 5 and at(powered, 1.0) == 1 and at(powered, 1 - 0.5**0.5) == pytest.approx(3)
    assert at(guidance.within(5.0, 0.2, 0.4), 0.3) == 5 and at(guidance.within(5.0, 0.2, 0.4), 0.5) == 1
    assert at(guidance.within(powered, 0.2, 0.4, 0.0), 0.5) == 0


@pytest.mark.parametrize("name", ["cfg", "cfg_pp", "cfg_zero", "apg", "classifier"])
def test_a_scale_may_be_a_function_of_time_row_by_row(name):
    t, scale = jnp.asarray([0.1, 0.4, 0.6, 0.9]), guidance.dynamic(3.0, "linear")
    call = {
        "classifier": lambda s: guidance.classifier(branch(0), loudness, PROCESS, s),
    }.get(name, lambda s: CALLS[name](s, branches, PROCESS))
    np.testing.assert_allclose(both(call(scale), t), both(call(scale(t)), t), atol=2e-5)
    assert np.abs(both(call(scale), t) - both(call(3.0), t)).max() > 0.01


# ---- Intervals.


def test_every_pair_keeps_to_its_interval():
    cond = plain(0)(X, 0.4)
    for make in (
        lambda **kw: cfg(branches(2), 5.0, **kw),
        lambda **kw: guidance.autoguidance(branch(0), branch(1), 5.0, **kw),
        lambda **kw: guidance.cfg_zero(branches(2), 5.0, PROCESS, **kw),
        lambda **kw: guidance.apg(branches(2), 5.0, **kw),
        lambda **kw: guidance.third_branch(branches(3), 5.0, 2.0, **kw),
        lambda **kw: guidance.dual(branches(3), 5.0, 2.0, **kw),
    ):
        run = jax.jit(lambda lo, hi, phi, make=make: jnp.stack(make(t_lo=lo, t_hi=hi, rescale=phi)(X, 0.4)[:2]))
        np.testing.assert_allclose(run(0.5, 1.0, 0.0), cond, atol=1e-6)
        np.testing.assert_allclose(run(0.0, 0.3, 0.7), cond, atol=1e-6)
        assert np.abs(run(0.3, 0.5, 0.0) - cond).max() > 0.01
        assert np.abs(run(0.3, 0.5, 0.7) - run(0.3, 0.5, 0.0)).max() > 0.01


def test_interval_runs_only_what_it_needs():
    calls = []

    def counted(name, denoise):
        def wrapped(x_t, t):
            jax.debug.callback(lambda: calls.append(name))
            return denoise(x_t, t)

        return wrapped

    strong, plain = MIXTURE.denoiser(FLOW), GAUSSIAN.denoiser(FLOW)
    guided = guidance.interval(counted("guided", strong), counted("plain", plain), 0.35, 0.65)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2)), jnp.float32)
    run = jax.jit(lambda x: sample(SAMPLERS["euler"](), guided, FLOW, x, grids.uniform(FLOW, 10)))
    run(x).block_until_ready()
    jax.effects_barrier()
    assert calls == ["plain"] * 4 + ["guided"] * 3 + ["plain"] * 3
    t = jnp.asarray([0.2, 0.5, 0.9])
    rows = guided(x, t)
    np.testing.assert_array_equal(rows.x[1], strong(x, t).x[1])
    np.testing.assert_array_equal(rows.eps[::2], plain(x, t).eps[::2])


# ---- Each against its formula.


def three(t=0.4):
    return [np.asarray(plain(i)(X, t)) for i in range(3)]


def test_negative_prompt_is_another_uncond():
    c, _, n = three()
    guided = cfg(make_pair(network, 0.7, PROCESS, "flow", COND, IMAGE), 4.0)
    np.testing.assert_allclose(both(guided), n + 4 * (c - n), atol=2e-5)


def test_third_branch_and_dual_are_their_formulas():
    a, b, c = three()
    np.testing.assert_allclose(
        both(guidance.third_branch(branches(3), 4.0, 2.5)), b + 4 * (a - b) + 2.5 * (a - c), atol=2e-5
    )
    # InstructPix2Pix, equation 3: (both, image alone, none).
    np.testing.assert_allclose(both(guidance.dual(branches(3), 7.5, 1.5)), c + 1.5 * (b - c) + 7.5 * (a - b), atol=2e-5)


def test_the_perturbed_branch_may_have_an_interval_of_its_own():
    triple, skip = branches(3), guidance.within(2.5, 0.8, 0.99, 0.0)
    np.testing.assert_allclose(both(guidance.third_branch(triple, 4.0, skip)), both(cfg(branches(2), 4.0)), atol=2e-5)
    assert np.abs(both(guidance.third_branch(triple, 4.0, skip), 0.9) - both(cfg(branches(2), 4.0), 0.9)).max() > 0.01


@pytest.mark.parametrize("process", [P.vp_linear(), P.flow(), P.edm()], ids=["vp_linear", "flow", "edm"])
def test_a_step_of_cfg_pp_is_a_step_of_cfg_with_a_scale_of_the_step(process):
    with jax.enable_x64(True):
        pair = branches(2, process=process)

        @jax.jit
        def steps(x, t, s):
            ratio = process.sigma(s) * process.alpha(t) / (process.alpha(s) * process.sigma(t))
            ways = guidance.cfg_pp(pair, 0.6), cfg(pair, 0.6 / (1 - ratio)), cfg(pair, 0.6)
            return [renoise(process, denoise(x, t), s) for denoise in ways]

        for t, s in ((0.8, 0.6), (0.3, 0.1)):
            plus, same, other = steps(jnp.asarray(X, jnp.float64), t, s)
            np.testing.assert_allclose(plus, same, atol=1e-12)
            assert np.abs(plus - other).max() > 1e-3


@pytest.mark.parametrize("kind", ["flow", "v"])
def test_cfg_zero_fits_the_unconditional_velocity_to_the_conditional(kind):
    a, b = (
        (1.0, 1.0)
        if kind == "flow"
        else (float(PROCESS.sigma(jnp.float32(0.4))), float(PROCESS.alpha(jnp.float32(0.4))))
    )
    velocity = lambda clean: b * clean[1] - a * clean[0]  # noqa: E731
    rows = (1, 2, 3)
    c, u = (velocity(clean) for clean in three()[:2])
    fit = (c * u).sum(rows, keepdims=True) / (u * u).sum(rows, keepdims=True)
    got = velocity(both(guidance.cfg_zero(branches(2), 3.0, PROCESS, kind=kind)))
    np.testing.assert_allclose(got, fit * u + 3 * (c - fit * u), atol=2e-5)
    assert np.abs(fit - 1).max() > 0.05


@pytest.mark.parametrize("process", [P.flow(), P.flow(3.0), P.vp_linear()], ids=["flow", "shifted", "vp_linear"])
def test_cfg_zero_stands_still_at_first(process):
    times = jnp.asarray([1.0, 0.8, 0.6, 0.4])
    run = jax.jit(
        lambda t_zero: sample(
            SAMPLERS["euler"](),
            guidance.cfg_zero(branches(2, process=process), 3.0, process, t_zero),
            process,
            jnp.asarray(X),
            times,
            trajectory=True,
        )
    )
    scale = process.alpha(times) + process.sigma(times)
    for k, t_zero in enumerate([1.1, 1.0, 0.8]):
        x = np.asarray(run(t_zero)) / np.asarray(scale).reshape(-1, 1, 1, 1, 1)
        moved = np.abs(np.diff(x, axis=0)).max((1, 2, 3, 4))
        assert (moved[:k] < 1e-6).all() and (moved[k:] > 1e-3).all()


def test_apg_splits_along_the_conditional_estimate():
    c, u = three()[0][0], three()[1][0]
    dot = lambda a, b: (a * b).sum((1, 2, 3), keepdims=True)  # noqa: E731
    d = c - u
    small = d * np.minimum(1, 1.5 / np.sqrt(dot(d, d)))
    parallel = dot(small, c) / dot(c, c) * c
    got = both(guidance.apg(branches(2), 4.0, eta=0.3, threshold=1.5))[0]
    np.testing.assert_allclose(got, c + 3 * (small - 0.7 * parallel), atol=2e-5)
    assert (np.sqrt(dot(d, d)) > 1.5).any() and (np.sqrt(dot(d, d)) < 1.5).any()
    assert np.abs(dot(both(guidance.apg(branches(2), 4.0))[0] - c, c)).max() < 1e-4
    np.testing.assert_allclose(both(guidance.apg(branches(2), 4.0, eta=1.0)), both(cfg(branches(2), 4.0)), atol=2e-5)


@pytest.mark.parametrize("low, high", [(-0.5, 0.4), (-1.0, 1.0)])
def test_static_threshold_clips_x_and_lets_eps_follow(low, high):
    x, _ = plain(0)(X, 0.4)
    got = both(guidance.static_threshold(branch(0), PROCESS, low, high))
    alpha, sigma = (float(c(jnp.float32(0.4))) for c in PROCESS[:2])
    np.testing.assert_allclose(got[0], np.clip(x, low, high), atol=1e-6)
    np.testing.assert_allclose(got[1], (X - alpha * np.clip(x, low, high)) / sigma, atol=1e-5)
    assert np.abs(x).max() > 1.5


@pytest.mark.parametrize("percentile, floor", [(0.9, 0.6), (0.995, 0.5), (1.0, 0.25)])
def test_dynamic_threshold_squeezes_each_row_by_its_percentile(percentile, floor):
    x = np.asarray(plain(0)(X, 0.4)[0])
    s = np.maximum(floor, np.quantile(np.abs(x).reshape(4, -1), percentile, axis=1)).reshape(4, 1, 1, 1)
    got = both(guidance.dynamic_threshold(branch(0), PROCESS, percentile, floor))
    np.testing.assert_allclose(got[0], floor * np.clip(x, -s, s) / s, atol=1e-6)
    assert np.abs(got[0]).max() <= floor * (1 + 1e-6) and (s > floor).all()


# ---- Closed forms: data whose guided denoiser is known.

EXACT = pytest.mark.parametrize(
    "process", [P.vp_linear(), P.flow(), P.ve(), P.edm()], ids=["vp_linear", "flow", "ve", "edm"]
)
POINTS = np.random.default_rng(3).standard_normal((6, 2))
TIMES = np.linspace(0.15, 0.95, 6)


def gap(ours, theirs, process):
    """Largest difference of two denoisers in double precision, in x and in eps, at x_t as wide as the process's."""
    with jax.enable_x64(True):
        t = jnp.asarray(TIMES)
        x_t = jnp.asarray(POINTS) * P.per_row(P.prior_std(process, t), jnp.asarray(POINTS))
        a, b = jax.jit(lambda x_t, t: (ours(x_t, t), theirs(x_t, t)))(x_t, t)
        return max(float(np.abs(a.x - b.x).max()), float(np.abs(a.eps - b.eps).max()))


@EXACT
def test_cfg_between_gaussians_of_one_covariance_moves_the_mean(process):
    other = GAUSSIAN._replace(mean=np.array([-0.2, 0.5]))
    moved = GAUSSIAN._replace(mean=other.mean + 3 * (GAUSSIAN.mean - other.mean))
    guided = guidance.autoguidance(GAUSSIAN.denoiser(process), other.denoiser(process), 3.0)
    assert gap(guided, moved.denoiser(process), process) < 1e-12


@EXACT
def test_autoguidance_between_gaussians_of_one_mean_adds_precisions(process):
    weak = GAUSSIAN._replace(std=2 * GAUSSIAN.std)

    def guided(x_t, t):
        alpha, sigma = (P.per_row(c(t), x_t) for c in process[:2])
        mean, rotation = jnp.asarray(GAUSSIAN.mean), jnp.asarray(GAUSSIAN.rotation)
        strong, loose = (1 / (alpha**2 * std**2 + sigma**2) for std in (GAUSSIAN.std, weak.std))
        eps = sigma * ((2.5 * strong - 1.5 * loose) * ((x_t - alpha * mean) @ rotation)) @ rotation.T
        return Clean((x_t - sigma * eps) / alpha, eps)

    ours = guidance.autoguidance(GAUSSIAN.denoiser(process), weak.denoiser(process), 2.5)
    assert gap(ours, guided, process) < 1e-12


@EXACT
def test_classifier_guidance_with_scale_one_is_bayes(process):
    label = 1

    def log_prob(x_t, t):
        """log p(y | x_t), y being the component of the mixture's first axis."""
        alpha, sigma = (P.per_row(c(t), x_t) for c in process[:2])
        y = (x_t @ jnp.asarray(MIXTURE.rotation))[:, :1]
        density = -0.5 * (y - alpha * MIXTURE.centers[0]) ** 2 / (alpha**2 * MIXTURE.std**2 + sigma**2)
        return jax.nn.log_softmax(jnp.log(MIXTURE.weights[0]) + density)[:, label]

    chosen = MIXTURE._replace(weights=np.array([[0.0, 1.0], MIXTURE.weights[1]]))
    guided = guidance.classifier(MIXTURE.denoiser(process), log_prob, process, 1.0)
    assert gap(guided, chosen.denoiser(process), process) < 1e-12
    assert gap(MIXTURE.denoiser(process), chosen.denoiser(process), process) > 0.05


MATRIX = np.array([[0.8, -0.5], [0.3, 1.1]])


def posterior(data, matrix, y, std):
    """The Gaussian data given y = matrix x + std noise."""
    cov = data.rotation * data.std**2 @ data.rotation.T
    precision = np.linalg.inv(cov) + matrix.T @ matrix / std**2
    mean = np.linalg.solve(precision, np.linalg.solve(cov, data.mean) + matrix.T @ y / std**2)
    variances, rotation = np.linalg.eigh(np.linalg.inv(precision))
    return Gaussian(mean, np.sqrt(variances), rotation)


@EXACT
@pytest.mark.parametrize("rank", [1, 2])
def test_pigdm_is_the_posterior_of_gaussian_data(process, rank):
    matrix, y, std = MATRIX[:rank], np.array([0.9, -0.6])[:rank], 0.2
    ask = lambda data, process, **kw: guidance.pigdm(  # noqa: E731
        data.denoiser(process),
        lambda x: x @ jnp.asarray(matrix, x.dtype).T,
        jnp.broadcast_to(jnp.asarray(y, jnp.float64), (6, rank)),
        std,
        process,
        iterations=rank,
        **kw,
    )
    with jax.enable_x64(True):
        # r^2 I is the covariance of x given x_t when the data are round with sigma_data; Tweedie's for any Gaussian.
        round_data = Gaussian(GAUSSIAN.mean, np.array([0.6, 0.6]), np.eye(2))
        scaled = process._replace(sigma_data=0.6)
        assert gap(ask(round_data, scaled), posterior(round_data, matrix, y, std).denoiser(process), process) < 1e-12
        exact = posterior(GAUSSIAN, matrix, y, std).denoiser(process)
        assert gap(ask(GAUSSIAN, process, tweedie=True), exact, process) < 1e-12
        assert gap(ask(GAUSSIAN, process), exact, process) > 1e-2
        assert gap(GAUSSIAN.denoiser(process), exact, process) > 1e-2


@EXACT
def test_dps_is_the_posterior_when_its_scale_knows_the_spread(process):
    """One measurement a . x: 1 / scale is then the variance of y given x_t, std^2 + a^T cov(x | x_t) a."""
    a, y, std = MATRIX[:1], np.array([0.9]), 0.2

    def scale(t):
        alpha, sigma = process.alpha(t)[..., None], process.sigma(t)[..., None]
        spread = GAUSSIAN.std**2 * sigma**2 / (alpha**2 * GAUSSIAN.std**2 + sigma**2)
        return 1 / (std**2 + jnp.sum(spread * jnp.asarray(a @ GAUSSIAN.rotation) ** 2, -1))

    with jax.enable_x64(True):
        guided = guidance.dps(GAUSSIAN.denoiser(process), lambda x: x @ a.T, jnp.full((6, 1), y[0]), scale, process)
        exact = posterior(GAUSSIAN, a, y, std).denoiser(process)
        assert gap(guided, exact, process) < 1e-12


@pytest.mark.parametrize("normalize", [False, True])
@EXACT
def test_a_step_under_dps_is_a_step_of_its_algorithm_1(process, normalize):
    with jax.enable_x64(True):
        t, s, scale = 0.7, 0.5, 0.8
        denoise, y = MIXTURE.denoiser(process), jnp.full((6, 2), 0.3)
        operator = lambda x: x @ MATRIX.T  # noqa: E731
        width = float(P.prior_std(process, t))

        @jax.jit
        def steps(x, t, s):
            step = lambda denoise: renoise(process, denoise(x, t), s)  # noqa: E731
            error = lambda row, y: jnp.sum((y - operator(denoise(row[None], t).x[0])) ** 2)  # noqa: E731
            zeta = process.sigma(t) * (process.alpha(s) * process.sigma(t) / process.alpha(t) - process.sigma(s))
            zeta = 0.5 * scale * zeta
            if normalize:  # their zeta' / |y - A x|
                zeta = zeta / jnp.sqrt(jax.vmap(error)(x, y))[:, None]
            want = step(denoise) - zeta * jax.vmap(jax.grad(error))(x, y)
            return step(guidance.dps(denoise, operator, y, scale, process, normalize)), want, step(denoise)

        got, want, unguided = steps(width * jnp.asarray(POINTS), t, s)
        np.testing.assert_allclose(got, want, atol=1e-12 * width)
        assert np.abs(want - unguided).max() > 1e-3


def test_inpainting_by_pigdm_keeps_what_was_measured():
    """Half of x known without noise: any sampler lands on it, and the other half follows the correlation."""
    process = P.flow()
    y = jnp.asarray(np.random.default_rng(4).standard_normal((64, 1)), jnp.float32)
    guided = guidance.pigdm(GAUSSIAN.denoiser(process), lambda x: x[:, :1], y, 0.0, process, tweedie=True)
    x = sample(
        SAMPLERS["heun"](),
        guided,
        process,
        jnp.asarray(np.random.default_rng(5).standard_normal((64, 2)), jnp.float32),
        grids.uniform(process, 60),
    )
    cov = GAUSSIAN.rotation * GAUSSIAN.std**2 @ GAUSSIAN.rotation.T
    np.testing.assert_allclose(x[:, :1], y, atol=2e-2)
    want = GAUSSIAN.mean[1] + cov[0, 1] / cov[0, 0] * (y[:, 0] - GAUSSIAN.mean[0])
    left = np.asarray(x[:, 1] - want)
    assert abs(left.mean()) < 0.2 and abs(left.std() - np.sqrt(np.linalg.det(cov) / cov[0, 0])) < 0.1


@pytest.mark.parametrize("name", ["cfg", "apg"])
def test_gradients_pass_through_guidance_that_is_off(name):
    """dps differentiates the denoiser that it is given, here one with nothing to add at this time."""
    inner = GUIDANCES[name](branches(2), 5.0, t_hi=0.3, rescale=0.7)
    ask = lambda denoise: both(guidance.dps(denoise, mean_of_rows, jnp.asarray(Y), 2.0, PROCESS))  # noqa: E731
    np.testing.assert_allclose(ask(inner), ask(branch(0)), atol=1e-5)


def test_guidances_compose():
    """A threshold on an interval of adaptive guidance, its classifier beside it: one scan, finite, unlike its parts."""
    process = P.discrete_vp()
    apg = guidance.apg(branches(2, "eps", process), guidance.dynamic(4.0, "cosine"), threshold=5.0, rescale=0.5)
    inner = guidance.interval(apg, branch(0, "eps", process), 0.1, 0.9)
    whole = guidance.dynamic_threshold(guidance.classifier(inner, loudness, process, 2.0), process, 0.95)

    @functools.partial(jax.jit, static_argnums=0)
    def run(denoise):
        return sample(SAMPLERS["dpmpp_2m"](), denoise, process, jnp.asarray(X), grids.trailing(process, 6))

    outputs = [np.asarray(run(denoise)) for denoise in (whole, inner)]
    assert all(np.isfinite(x).all() for x in outputs) and np.abs(outputs[0] - outputs[1]).max() > 0.01
    assert np.abs(outputs[0]).max() <= 1 + 1e-5  # the last step lands on the clean estimate


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: cfg(branches(2), 2.0, t_lo=0.8, t_hi=0.2), r"guidance interval is 0.8..0.2, expected t_lo <= t_hi"),
        (lambda: guidance.interval(branch(0), branch(1), 0.8, 0.2), r"guidance interval is 0.8..0.2"),
        (lambda: cfg(branches(3), 2.0), r"got 3 branches, expected 2: \(cond, uncond\)"),
        (
            lambda: guidance.third_branch(branches(2), 2.0, 1.0),
            r"got 2 branches, expected 3: \(cond, uncond, perturbed\)",
        ),
        (lambda: guidance.dual(branches(2), 2.0, 1.0), r"got 2 branches, expected 3: \(both, image, none\)"),
        (lambda: guidance.dynamic(2.0, "linaer"), r"shape is 'linaer', expected a function of t or one of \['cosine'"),
        (lambda: guidance.powered_cosine(0), r"power is 0, expected a number > 0"),
        (lambda: guidance.cfg_zero(branches(2), 2.0, PROCESS, kind="velocity"), r"prediction kind is 'velocity'"),
        (lambda: guidance.classifier(branch(0), lambda x, t: x, PROCESS, 1.0), r"log_prob has shape \(4, 3, 3, 2\)"),
        (lambda: guidance.dps(branch(0), mean_of_rows, jnp.zeros((3, 2)), 1.0, PROCESS), r"y has shape \(3, 2\)"),
        (lambda: guidance.pigdm(branch(0), mean_of_rows, jnp.zeros((3, 2)), 0.1, PROCESS), r"y has shape \(3, 2\)"),
        (lambda: guidance.pigdm(branch(0), mean_of_rows, Y, 0.1, PROCESS, iterations=0), r"iterations is 0"),
        (
            lambda: guidance.static_threshold(branch(0), PROCESS, 1.0, 1.0),
            r"clipping to \[1.0, 1.0\], expected low < high",
        ),
        (
            lambda: guidance.dynamic_threshold(branch(0), PROCESS, 99.5),
            r"percentile is 99.5, expected a number in \(0, 1\]",
        ),
        (lambda: guidance.dynamic_threshold(branch(0), PROCESS, floor=0.0), r"floor is 0.0, expected a number > 0"),
        (
            lambda: make_branches(network, 0.7, PROCESS, "eps", COND, UNCOND, {}),
            r"branch 2 holds \[\], expected the keys",
        ),
        (
            lambda: make_branches(network, 0.7, PROCESS, "eps", COND, {"label": jnp.zeros(3)}),
            r"branch 1's 'label' has shape",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()(jnp.asarray(X), 0.4)
