"""The quantizer's own promises. The network's numbers are compared in tests/oracle."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import MODELS, vq
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


def test_an_average_finds_the_modes_that_it_revives_for():
    """Eight clusters on a circle, and a codebook that starts outside it, where a few entries are nearest to everything."""
    angle = 2 * np.pi * np.arange(8) / 8
    modes = np.stack([8 + 4 * np.cos(angle), 4 * np.sin(angle)], -1).astype(np.float32)
    start = jax.random.uniform(jax.random.key(3), (32, 2), minval=-1 / 32, maxval=1 / 32)

    @jax.jit
    def train(revive_after):
        def step(carry, key):
            book, codes = carry
            keys = jax.random.split(key, 3)
            z = jnp.asarray(modes)[jax.random.randint(keys[0], (4, 4, 4), 0, 8)]
            z = z + 0.1 * jax.random.normal(keys[1], z.shape)
            quantized = VectorQuantizer(32, 2).apply({"params": {"embedding": codes}}, z)
            return vq.update(book, z, quantized.indices, keys[2], 0.9, revive_after), quantized

        keys = jax.random.split(jax.random.key(4), 150)
        (_, codes), quantized = jax.lax.scan(step, (vq.codebook(start), start), keys)
        return codes, quantized.codebook[-1], *vq.usage(quantized.indices[-20:], 32)

    def missed(codes):
        return (np.linalg.norm(codes[:, None] - modes, axis=-1).min(0) > 0.5).sum()

    codes, error, share, perplexity = train(0)
    assert missed(codes) >= 4 and error.mean() > 0.5 and share < 0.2
    codes, error, more, higher = train(20)
    # 0.01 is a cluster's variance, the error of eight entries at their centres.
    assert missed(codes) == 0 and error.mean() < 0.01 and more > 0.5 and higher > 8 > perplexity


def test_entries_without_latents_are_revived_in_their_turn():
    book = vq.codebook(CODES)
    assert book.total.unsafe_buffer_pointer() != CODES.unsafe_buffer_pointer()
    indices = jnp.array([0, 1, 2, 3, 4] * 5)[:24].reshape(2, 3, 4)
    step = jax.jit(vq.update, static_argnums=(4, 5))
    for i in (2, 4):
        book, codes = step(book, Z, indices, jax.random.key(i), 0.9, 5)
        np.testing.assert_array_equal(book.unused, [0, 0, 0, 0, 0, i, i])
        np.testing.assert_allclose(codes[5:], CODES[5:], rtol=1e-3)  # the smoothing alone
    kept, _ = step(book, Z, indices, jax.random.key(5), 0.9, 0)
    np.testing.assert_array_equal(kept.unused[5:], [6, 6])
    revived, codes = step(book, Z, indices, jax.random.key(5), 0.9, 5)
    np.testing.assert_array_equal(revived.unused, np.zeros(7))
    np.testing.assert_array_equal(revived.count[:5], kept.count[:5])
    np.testing.assert_array_equal(revived.count[5:], [1, 1])
    np.testing.assert_array_equal(revived.total[:5], kept.total[:5])
    taken = [int(np.argmax((np.asarray(Z.reshape(24, 5)) == row).all(-1))) for row in np.asarray(revived.total[5:])]
    np.testing.assert_array_equal(revived.total[5:], Z.reshape(24, 5)[np.array(taken)])
    assert taken[0] != taken[1]
    np.testing.assert_allclose(codes[5:], revived.total[5:], rtol=1e-3)
    other, _ = step(book, Z, indices, jax.random.key(6), 0.9, 5)
    assert not np.array_equal(other.total[5:], revived.total[5:])


def test_usage():
    share, perplexity = vq.usage(jnp.array([[0, 3], [3, 0]]), 8)
    np.testing.assert_allclose([share, perplexity], [0.25, 2.0], rtol=1e-6)
    np.testing.assert_allclose(vq.usage(jnp.arange(6), 6), [1.0, 6.0], rtol=1e-6)
    np.testing.assert_allclose(vq.usage(jnp.array([1, 1, 1, 2]), 4)[1], np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4)))


SCRIPT = """
import jax, numpy as np
from ldm_jax.models import vq
from ldm_jax.kernels import mesh
z = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
codes = 3 * jax.random.normal(jax.random.key(1), (64, 3))
def run(z, codes):
    book = vq.codebook(codes)
    for i in range(3):
        quantized = vq.VectorQuantizer(64, 3).apply({"params": {"embedding": codes}}, z)
        book, codes = vq.update(book, z, quantized.indices, jax.random.key(i), 0.9, 16)
    return book, codes
ends = []
for devices in (1, 4):
    m = mesh.make_mesh(-1, 2 if devices == 4 else 1, devices=jax.devices()[:devices])
    all_of = mesh.replicated(m)
    step = jax.jit(run, in_shardings=(mesh.batch_sharding(m), all_of), out_shardings=all_of)
    ends.append(jax.device_get(step(z, codes)))
one, four = ends
revived = one[0].count == 1
assert 0 < revived.sum() < 64
np.testing.assert_array_equal(one[0].unused, four[0].unused)
np.testing.assert_array_equal(one[0].total[revived], four[0].total[revived])
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
"""


def test_the_average_is_the_same_on_four_devices():
    flags = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4"}
    root = pathlib.Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


def test_a_config_builds_one():
    assert MODELS["vq"](**SMALL) == VQModel(**SMALL)
