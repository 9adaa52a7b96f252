"""The autoencoder's own promises. Its numbers are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.autoencoder_kl import AutoencoderKL, Posterior, tiled_decode, tiled_encode

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 2}
X = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1.0)


def test_parts_make_the_whole():
    module = AutoencoderKL(**SMALL)
    variables = jax.jit(module.init)(jax.random.key(1), X)

    @jax.jit
    def run(x, key):
        posterior = module.apply(variables, x, method="encode")
        decoded = module.apply(variables, posterior.sample(key), method="decode")
        return posterior, decoded, module.apply(variables, x, key), module.apply(variables, x)

    posterior, decoded, (sampled, _), (mean, _) = run(X, jax.random.key(2))
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 6, 2)
    np.testing.assert_allclose(decoded, sampled, atol=1e-5)
    assert np.abs(mean - sampled).max() > 1e-3


def test_remat_and_bfloat16():
    plain, other = AutoencoderKL(**SMALL), AutoencoderKL(**SMALL, remat=True)
    half = AutoencoderKL(**SMALL, dtype="bfloat16")
    params = jax.jit(plain.init)(jax.random.key(1), X)["params"]

    def loss(module):
        return lambda p: jnp.square(module.apply({"params": p}, X)[0] - X).mean()

    grads = [jax.jit(jax.grad(loss(m)))(params) for m in (plain, other)]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    y = jax.jit(half.apply)({"params": params}, X)[0]
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, jax.jit(plain.apply)({"params": params}, X)[0], atol=0.05)


def test_posterior():
    mean, logvar = jnp.full((2, 1, 1, 2), 3.0), jnp.full((2, 1, 1, 2), jnp.log(4.0))
    posterior = Posterior(mean, logvar)
    # KL(N(3, 4) || N(0, 1)) = (9 + 4 - 1 - log 4) / 2 for each of two dimensions.
    np.testing.assert_allclose(posterior.kl(), [12 - np.log(4)] * 2, rtol=1e-6)
    big = Posterior(*(jnp.broadcast_to(a[:1], (1, 200, 200, 2)) for a in posterior)).sample(jax.random.key(0))
    assert abs(float(big.mean()) - 3) < 0.05 and abs(float(big.std()) - 2) < 0.05


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 8, 9, 3), "H and W multiples of 2"),
        ({}, (1, 8, 8, 4), r"expected \[B, H, W, 3\]"),
        ({"norm_num_groups": 3}, (1, 8, 8, 3), "norm_num_groups 3 does not divide"),
        ({"down_block_types": ("DownEncoderBlock2D",)}, (1, 8, 8, 3), "down_block_types has 1 entries: expected 2"),
        ({"up_block_types": ("UpDecoderBlock2D", "UpBlock3D")}, (1, 8, 8, 3), "'UpBlock3D': expected one of"),
    ],
)
def test_errors(options, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(AutoencoderKL(**{**SMALL, **options}).init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("function", [tiled_encode, tiled_decode])
def test_tiles_are_whole_latents(function):
    with pytest.raises(ValueError, match="tile is 7, expected a multiple of 2"):
        function(AutoencoderKL(**SMALL), {}, X, tile=7)


def test_logvar_is_clipped():
    module = AutoencoderKL(**SMALL)
    params = jax.jit(module.init)(jax.random.key(1), X)["params"]
    params["quant_conv"]["bias"] = jnp.array([0.0, 0.0, 1e3, -1e3])
    posterior = jax.jit(lambda p: module.apply({"params": p}, X, method="encode"))(params)
    np.testing.assert_array_equal(posterior.logvar[..., 0], 20.0)
    np.testing.assert_array_equal(posterior.logvar[..., 1], -30.0)
