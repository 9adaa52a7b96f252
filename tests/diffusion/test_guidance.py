"""The denoiser of a network, the pair, and classifier-free guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.denoiser import make_denoiser, make_pair
from ldm_jax.diffusion.guidance import cfg
from ldm_jax.diffusion.prediction import Clean

X = np.random.default_rng(0).standard_normal((4, 3, 3, 2)).astype(np.float32)
COND = {"label": jnp.asarray([1.0, 2.0, 3.0, 4.0])}
UNCOND = {"label": jnp.zeros(1)}
PROCESS = P.vp_linear()


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
    with pytest.raises(ValueError, match=r"uncond holds \[\], expected the keys of cond, \['label'\]"):
        make_pair(network, 0.7, PROCESS, "eps", COND, {})
    with pytest.raises(ValueError, match=r"uncond\['label'\] has shape \(3,\)"):
        make_pair(network, 0.7, PROCESS, "eps", COND, {"label": jnp.zeros(3)})
