"""The quantizer's own promises. The network's numbers are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.vq import VectorQuantizer, VQModel

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "num_vq_embeddings": 8}
Z = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
CODES = jax.random.normal(jax.random.key(1), (7, 5))


def quantize(z, codes=CODES):
    return VectorQuantizer(7, 5).apply({"params": {"embedding": codes}}, z)


def test_the_nearest_entry():
    got = jax.jit(quantize)(Z)
    distances = np.square(np.asarray(Z)[..., None, :] - np.asarray(CODES)).sum(-1)
    np.testing.assert_array_equal(got.indices, distances.argmin(-1))
    np.testing.assert_allclose(got.z, CODES[distances.argmin(-1)], atol=1e-6)
    np.testing.assert_allclose(got.codebook, distances.min(-1).mean((1, 2)) / 5, rtol=1e-5)
    np.testing.assert_allclose(got.loss(0.5), 1.5 * got.codebook, rtol=1e-6)


def test_gradients_go_where_they_are_meant_to():
    weight = jax.random.normal(jax.random.key(2), Z.shape)
    gradients = jax.jit(jax.grad(lambda z, codes, f: f(quantize(z, codes)), (0, 1)), static_argnums=2)
    straight = gradients(Z, CODES, lambda q: (q.z * weight).sum())
    np.testing.assert_allclose(straight[0], weight)
    assert not np.any(straight[1])
    assert not np.any(gradients(Z, CODES, lambda q: q.codebook.sum())[0])
    assert np.any(gradients(Z, CODES, lambda q: q.codebook.sum())[1])
    assert np.any(gradients(Z, CODES, lambda q: q.commitment.sum())[0])
    assert not np.any(gradients(Z, CODES, lambda q: q.commitment.sum())[1])


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 8, 9, 3), "VQModel.encode: x is .* H and W multiples of 2"),
        ("decode", (1, 4, 4, 2), r"VQModel.decode: z is .* expected \[B, h, w, 3\]"),
    ],
)
def test_errors(method, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: VQModel(**SMALL).init(jax.random.key(0), x, method=method), jnp.zeros(shape))


def test_a_lookup_wants_indices():
    module = VQModel(**SMALL, lookup_from_codebook=True)
    with pytest.raises(ValueError, match="expected indices i32"):
        jax.eval_shape(lambda z: module.init(jax.random.key(0), z, True, method="decode"), jnp.zeros((1, 4, 4, 3)))
