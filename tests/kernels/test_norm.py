"""Group normalization against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.kernels.norm import activation, group_norm
from ldm_jax.models.layers import GroupNorm


def definition(x, scale, bias, groups, eps):
    b, c = x.shape[0], x.shape[-1]
    grouped = x.astype(np.float64).reshape(b, -1, groups, c // groups)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(var + eps)).reshape(x.shape) * scale + bias


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equals_definition(offset):
    random = np.random.default_rng(0)
    # Means a thousand times the deviation, one in each group: E[x^2] - E[x]^2 in float32 has no digit left there.
    x = (random.normal(size=(3, 4, 5, 12)) + offset * (1 + np.arange(12) // 3)).astype(np.float32)
    scale, bias = random.normal(size=(2, 12)).astype(np.float32)
    got = jax.jit(group_norm, static_argnums=(3, 4))(x, scale, bias, 4, 1e-5)
    np.testing.assert_allclose(got, definition(x, scale, bias, 4, 1e-5), atol=2e-3 if offset else 1e-5)


def test_activation_and_gradient():
    random = np.random.default_rng(1)
    x, g = random.normal(size=(2, 2, 3, 4, 8)).astype(np.float32)
    scale, bias = random.normal(size=(2, 8)).astype(np.float32)

    def plain(x, scale, bias):
        grouped = x.reshape(2, -1, 2, 4)
        mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        return jax.nn.silu(((grouped - mean) * jax.lax.rsqrt(var + 1e-5)).reshape(x.shape) * scale + bias)

    def grads(f):
        return jax.jit(lambda *args: jax.vjp(f, *args)[1](g))(x, scale, bias)

    for got, expected in zip(grads(lambda x, s, b: group_norm(x, s, b, 2, act="silu")), grads(plain)):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_modulation_and_dtype():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    gain, shift = jax.random.normal(jax.random.key(1), (2, 2, 8))
    module = GroupNorm(2)
    params = module.init(jax.random.key(2), x)
    plain = module.apply(params, x)
    expected = plain * (1 + gain[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(module.apply(params, x, (gain, shift)), expected, atol=1e-5)
    assert module.apply(params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_errors():
    with pytest.raises(ValueError, match="5 groups do not divide 8 channels"):
        group_norm(jnp.ones((1, 2, 2, 8)), jnp.ones(8), jnp.zeros(8), 5)
    with pytest.raises(ValueError, match="'swoosh' is unknown"):
        activation("swoosh")
