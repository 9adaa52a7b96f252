"""The transformations of EQ-VAE, and that their error vanishes for what is equivariant alone."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.training.terms import equivariance

Z = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
MIX = jax.random.normal(jax.random.key(1), (3, 3))
RAMP = jnp.linspace(0, 1, 8)[None, :, None, None]


def test_turns_and_scales():
    for k in range(4):
        np.testing.assert_array_equal(equivariance.turned(Z, jnp.int32(k)), np.rot90(Z, k, (1, 2)))
    np.testing.assert_allclose(equivariance.scaled(jnp.ones((1, 8, 8, 2)), 3), np.ones((1, 3, 3, 2)), rtol=1e-6)
    np.testing.assert_allclose(equivariance.scaled(RAMP * jnp.ones((1, 1, 8, 1)), 4).mean(), 0.5, rtol=1e-6)


def test_the_error_vanishes_for_a_decoder_that_is_equivariant_alone():
    def error(decode, x, key):
        return equivariance.equivariance(decode, jnp.square, x, Z, key)

    seen = []
    for key in jax.random.split(jax.random.key(2), 12):
        assert error(lambda z: z @ MIX, Z @ MIX, key) < 1e-10
        seen.append(float(error(lambda z: z * jnp.linspace(0, 1, z.shape[1])[:, None, None], Z * RAMP[0], key)))
    assert np.mean(np.array(seen) > 1e-3) > 0.5, "but for those taus that do nothing"
    assert len({round(v, 6) for v in seen}) > 4, "tau is drawn by the key"
