"""The parts of LPIPS. Its numbers are compared in tests/oracle, and with the lpips package in tests/metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.lpips import LPIPS, max_pool, unit


def test_published_structure():
    """138,357,544 parameters of VGG16 without its three linear layers, and a head for each of 1472 channels."""
    x = jnp.zeros((2, 37, 32, 3))
    params = jax.eval_shape(LPIPS().init, jax.random.key(0), x, x)["params"]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert sizes.pop("vgg") == 138_357_544 - 4097 * 1000 - 4097 * 4096 - 25089 * 4096
    assert list(sizes.values()) == [64, 128, 256, 512, 512]
    features = jax.eval_shape(lambda p, x: LPIPS().apply({"params": p}, x, method="features"), params, x)
    assert [f.shape[1:] for f in features] == [(37, 32, 64), (18, 16, 128), (9, 8, 256), (4, 4, 512), (2, 2, 512)]


def test_a_pixel_without_activations_has_a_gradient():
    f = jnp.zeros((2, 3)).at[0].set(jnp.array([3.0, 0.0, 4.0]))
    np.testing.assert_allclose(unit(f), [[0.6, 0, 0.8], [0, 0, 0]], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda f: unit(f)[:, 0].sum()))(f)
    np.testing.assert_allclose(gradient, [[0.2 * 0.64, 0, -0.2 * 0.48], [1e10, 0, 0]], rtol=1e-5)


def test_max_pool_drops_an_odd_edge():
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    expected = x[:, :4].reshape(2, 2, 2, 2, 2, 3).max((2, 4))
    np.testing.assert_array_equal(max_pool(x), expected)
    gradient = jax.grad(lambda x: max_pool(x).sum())(x)
    np.testing.assert_array_equal(gradient[:, :4], (x[:, :4] == expected.repeat(2, 1).repeat(2, 2)))
    assert not gradient[:, 4].any()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((1, 16, 16, 1), (1, 16, 16, 1), r"x is \(1, 16, 16, 1\), expected \[B, H, W, 3\] with H and W at least 16"),
        ((1, 16, 15, 3), (1, 16, 15, 3), "at least 16"),
        ((2, 16, 16, 3), (1, 16, 16, 3), r"x is \(2, 16, 16, 3\) and y \(1, 16, 16, 3\)"),
    ],
)
def test_errors(x, y, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(LPIPS().init, jax.random.key(0), jnp.zeros(x), jnp.zeros(y))
