"""The grid of finite scalar quantization, both ways, and the autoencoder around it."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import weights
from ldm_jax.models import MODELS, fsq, vq

SMALL = {"levels": (4, 3, 2), "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
X = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1.0)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 6, 5), (2, 3)])
def test_every_index_is_one_code(levels):
    # The first channel's digit moves fastest.
    digits = np.array([d[::-1] for d in itertools.product(*map(range, levels[::-1]))])
    expected = np.stack([d / (n // 2) - 1 for d, n in zip(digits.T, levels)], -1)
    codes = fsq.to_codes(jnp.arange(math.prod(levels)), levels)
    np.testing.assert_allclose(codes, expected, atol=1e-6)
    assert codes.min() == -1 and codes.max() <= 1
    np.testing.assert_array_equal(fsq.to_indices(codes, levels), np.arange(math.prod(levels)))
    # Anywhere in a cell, and beyond the grid: the nearest code.
    z = np.random.default_rng(0).uniform(-1.5, 1.5, (400, len(levels))).astype(np.float32)
    indices = fsq.to_indices(jnp.asarray(z), levels)
    nearest = np.square(z[:, None] - expected).sum(-1).argmin(-1)
    np.testing.assert_array_equal(indices, nearest)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 6, 5), (2, 3)])
def test_the_bound_reaches_every_value_and_no_further(levels):
    """The paper's bound as it is printed, then its range: each of the L values is the nearest somewhere, -L // 2 first."""
    y = np.linspace(-20, 20, 4001, dtype=np.float32)[:, None].repeat(len(levels), 1)
    z = np.asarray(fsq.bound(jnp.asarray(y), levels))
    for i, n in enumerate(levels):
        half = (n - 1) * (1 - 1e-3) / 2
        offset = 0.0 if n % 2 else 0.5
        grid = np.tanh(y[:, i] + np.tan(offset / half)) * half - offset
        np.testing.assert_allclose(z[:, i] * (n // 2), grid, atol=1e-5)
        np.testing.assert_array_equal(np.unique(np.round(z[:, i] * (n // 2))), np.arange(n) - n // 2)
    # Odd grids, and even ones nearly, take 0 to 0; with two values -1 and 0 there is no such point.
    middle = np.asarray(fsq.bound(jnp.zeros(len(levels)), levels))
    assert all(abs(m) < 1e-3 for m, n in zip(middle, levels) if n > 2)


def test_gradients_pass_straight_through():
    levels, y = (4, 5, 2), jax.random.normal(jax.random.key(1), (2, 3, 4, 3))
    module = fsq.FSQModel(**SMALL | {"levels": levels})
    weight = jax.random.normal(jax.random.key(2), y.shape)

    def loss(y):
        quantized = module.apply({}, fsq.bound(y, levels), method="quantized")
        return (quantized.z * weight).sum() + quantized.loss().sum(), quantized

    gradient, quantized = jax.jit(jax.grad(loss, has_aux=True))(y)
    # d z / d y of the tanh, as if there were no rounding.
    half = np.array([1.5, 2.0, 0.5]) * 0.999
    shift = np.tan(np.array([0.5, 0.0, 0.5]) / half)
    slope = half * (1 - np.tanh(np.asarray(y) + shift) ** 2) / np.array([2, 2, 1])
    np.testing.assert_allclose(gradient, weight * slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(quantized.codebook, [0, 0])
    np.testing.assert_array_equal(quantized.commitment, [0, 0])
    np.testing.assert_allclose(quantized.z, fsq.to_codes(quantized.indices, levels), atol=1e-6)


def test_parts_make_the_whole():
    module = MODELS["fsq"](**SMALL)
    params = jax.jit(module.init)(jax.random.key(1), X)["params"]
    keys = iter(jax.random.split(jax.random.key(2), 1000))
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), params)

    @jax.jit
    def run(params):
        variables = {"params": params}
        z = module.apply(variables, X, method="encode")
        decoded = [module.apply(variables, z, plain, method="decode") for plain in (False, True)]
        return z, module.apply(variables, z, method="quantized"), decoded, module.apply(variables, X)

    z, expected, (decoded, unrounded), (image, quantized) = run(params)
    assert z.shape == (2, 4, 6, 3) and image.shape == X.shape
    assert quantized.indices.shape == (2, 4, 6) and quantized.indices.dtype == jnp.int32
    assert vq.usage(quantized.indices, module.num_vq_embeddings)[0] > 0.3
    for a, b in zip(quantized, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(image, decoded, atol=1e-5)
    assert np.abs(image - unrounded).max() > 1e-2


@pytest.mark.parametrize(
    ("levels", "method", "shape", "message"),
    [
        ((4, 3, 2), "encode", (1, 8, 9, 3), "FSQModel.encode: x is .* H and W multiples of 2"),
        ((4, 3, 2), "decode", (1, 4, 4, 4), r"FSQModel.decode: z is .* expected \[B, h, w, 3\]"),
        ((4, 3, 2), "quantized", (1, 4, 4, 1), r"fsq: z is \(1, 4, 4, 1\), expected 3 channels"),
        ((4, 1), "encode", (1, 8, 8, 3), r"levels is \(4, 1\), expected numbers of at least 2"),
        ((), "encode", (1, 8, 8, 3), "levels is"),
        ((2,) * 31, "encode", (1, 8, 8, 3), "a product below"),
    ],
)
def test_errors(levels, method, shape, message):
    module = fsq.FSQModel(**SMALL | {"levels": levels})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x, method=method), jnp.zeros(shape))


def test_no_published_class_computes_it(tmp_path):
    module = fsq.FSQModel(**SMALL)
    with pytest.raises(ValueError, match=r"FSQModel: expected a module of type .*VQModel"):
        weights.save(tmp_path / "a", module, {})
    assert not list(tmp_path.iterdir())
