"""`conv2d` is a convolution, forwards and in both modes of differentiation, whichever way it is computed."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.kernels import conv
from ldm_jax.kernels.conv import average_pool, conv2d, upsample_nearest

# name -> (H, W, C, O, kernel size, stride, padding)
SHAPES = {
    "tiles": (16, 18, 32, 40, 3, 1, 1),
    "tiles_small_image": (4, 6, 32, 32, 3, 1, 1),
    "odd_image": (5, 7, 32, 32, 3, 1, 1),
    "narrow_input": (6, 5, 3, 8, 3, 1, 1),
    "narrow_output": (6, 5, 24, 3, 3, 1, 1),
    "narrow_output_uneven_padding": (6, 5, 24, 3, 3, 1, ((0, 1), (2, 0))),
    "stride": (8, 8, 20, 24, 3, 2, 1),
    "stride_right_and_below": (8, 6, 20, 24, 3, 2, ((0, 1), (0, 1))),
    "patches": (8, 8, 3, 8, 4, 2, 1),
    "unpadded": (7, 9, 20, 24, 3, 1, 0),
    "unpadded_patches": (8, 8, 3, 24, 4, 4, 0),
    "one_by_one_stride": (7, 8, 20, 24, 1, 2, 0),
    "unpadded_stride": (9, 8, 3, 24, (3, 2), 2, 0),
    "one_by_one": (4, 4, 20, 24, 1, 1, 0),
}


@pytest.fixture(autouse=True)
def tiles_from_32_channels(monkeypatch):
    """Winograd's tiles at a width that compiles fast."""
    monkeypatch.setattr(conv, "WIDE", 32)


def reference(x, kernel, stride, padding):
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def close(a, b, tolerance=1e-5):
    for got, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(got, expected, atol=tolerance * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", SHAPES)
def test_equals_xla(name):
    h, w, c, o, k, stride, padding = SHAPES[name]
    random = np.random.default_rng(0)
    x, dx = random.normal(size=(2, 6, h, w, c)).astype(np.float32)
    kernel, dkernel = random.normal(size=(2, *np.broadcast_to(k, 2), c, o)).astype(np.float32)
    g = random.normal(size=reference(x, kernel, stride, padding).shape).astype(np.float32)

    def everything(f):
        @jax.jit
        def run(x, kernel, dx, dkernel, g):
            y, tangent = jax.jvp(f, (x, kernel), (dx, dkernel))
            return y, tangent, jax.vjp(f, x, kernel)[1](g)

        return run(x, kernel, dx, dkernel, g)

    close(
        everything(lambda x, k: conv2d(x, k, stride, padding)),
        everything(lambda x, k: reference(x, k, stride, padding)),
    )


def test_second_derivatives_and_vmap():
    random = np.random.default_rng(1)
    x, kernel = random.normal(size=(3, 2, 16, 16, 32)), random.normal(size=(3, 3, 32, 32))
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32) / 17

    def penalty(f):
        def loss(x, kernel):
            return jnp.tanh(f(x, kernel, 1, 1)).sum()

        # The gradient of a gradient norm, as in R1 regularization, for every row of a vmap.
        return jax.jit(jax.vmap(jax.grad(lambda x, k: jnp.square(jax.grad(loss)(x, k)).sum(), 1), (0, None)))(x, kernel)

    close(penalty(conv2d), penalty(reference), 1e-4)


def test_which_way_a_convolution_without_padding_takes():
    """Few shifts as one matrix product a block of images, one image where the batch is odd; the patches of a transformer by XLA."""

    def products(batch, k, stride, dtype=jnp.float32):
        x, kernel = jnp.ones((batch, 8, 8, 3), dtype), jnp.ones((k, k, 3, 5), dtype)
        convolve = jax.jit(lambda x, kernel: conv2d(x, kernel, stride))
        y = convolve(x, kernel)
        np.testing.assert_array_equal(y, np.full(y.shape, 3 * k * k))
        assert y.dtype == dtype
        return "stablehlo.convolution" not in convolve.lower(x, kernel).as_text()

    assert products(4, 3, 2) and products(5, 3, 2) and products(2, 3, 1, jnp.bfloat16)
    assert not products(4, 4, 4)


def test_blocks_of_a_prime_batch(monkeypatch):
    monkeypatch.setattr(conv, "BLOCK_BYTES", 4 * 16 * 16 * 32 * 3)
    random = np.random.default_rng(2)
    x, kernel = random.normal(size=(7, 16, 16, 32)).astype(np.float32), random.normal(size=(3, 3, 32, 32))
    close(
        jax.jit(lambda x, k: conv2d(x, k, 1, 1))(x, kernel.astype(np.float32)),
        reference(x, kernel.astype(np.float32), 1, 1),
    )


def test_bfloat16_stays_bfloat16():
    x, kernel = jnp.ones((2, 16, 16, 32), jnp.bfloat16), jnp.ones((3, 3, 32, 32), jnp.bfloat16)
    y, vjp = jax.vjp(lambda x, k: conv2d(x, k, 1, 1), x, kernel)
    assert {a.dtype for a in (y, *vjp(y))} == {jnp.dtype(jnp.bfloat16)}
    assert float(y[0, 5, 5, 0]) == 288.0


def test_wrong_channels():
    with pytest.raises(ValueError, match="expects 4 channels, x has 3"):
        conv2d(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 4, 8)), 1, 1)


def test_resampling():
    x = np.arange(2 * 3 * 5 * 2, dtype=np.float32).reshape(2, 3, 5, 2)
    np.testing.assert_array_equal(upsample_nearest(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))
    np.testing.assert_allclose(average_pool(upsample_nearest(jnp.asarray(x))), x)
    assert average_pool(jnp.asarray(x)).shape == (2, 1, 2, 2)


@pytest.mark.parametrize("padding", [0, 1, ((0, 1), (2, 0))])
def test_tiles_of_large_images_of_any_sides(monkeypatch, padding):
    """Images large enough for tiles at half of WIDE: odd sides, no border or an uneven one."""
    monkeypatch.setattr(conv, "LARGE", 32)
    random = np.random.default_rng(3)
    x, kernel = (random.normal(size=shape).astype(np.float32) for shape in ((3, 13, 15, 16), (3, 3, 16, 24)))
    convolve = jax.jit(lambda x, kernel: conv2d(x, kernel, 1, padding))
    assert "stablehlo.convolution" not in convolve.lower(x, kernel).as_text()
    close(convolve(x, kernel), reference(x, kernel, 1, padding))
    g = np.ones_like(reference(x, kernel, 1, padding))
    close(jax.vjp(convolve, x, kernel)[1](g), jax.vjp(lambda x, k: reference(x, k, 1, padding), x, kernel)[1](g))


@pytest.mark.parametrize("h, padding", [(48, 1), (47, 1), (53, 0), (50, ((2, 0), (0, 1)))])
def test_large_images_are_convolved_in_strips(monkeypatch, h, padding):
    """Two images in strips of some 12 rows, borders between strips included; strips of 2 mod 4 rows, and one that reaches below."""
    monkeypatch.setattr(conv, "STRIP_BYTES", 4 * 12 * 16 * 32)
    assert (conv._strip(48, 16, 32), conv._strip(47, 16, 32), conv._strip(51, 16, 32)) == (12, 12, 12)
    assert (conv._strip(50, 16, 32), conv._strip(12, 16, 32), conv._strip(1, 16, 32)) == (10, 12, 2)
    random = np.random.default_rng(4)
    x, kernel = (random.normal(size=shape).astype(np.float32) for shape in ((2, h, 16, 32), (3, 3, 32, 32)))
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    close(jax.jit(lambda x, kernel: conv._winograd(pads, x, kernel))(x, kernel), reference(x, kernel, 1, padding))


SPLIT = """
import jax, jax.numpy as jnp
from ldm_jax.kernels.conv import conv2d
from ldm_jax.kernels import mesh
four = mesh.make_mesh()
rows, whole = mesh.batch_sharding(four), mesh.replicated(four)
x = jax.ShapeDtypeStruct((8, 16, 16, 64), jnp.float32, sharding=rows)
kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32, sharding=whole)
for padding in (0, 1):
    both = jax.grad(lambda x, k: jnp.square(conv2d(x, k, 1, padding)).sum(), (0, 1))
    program = jax.jit(both, out_shardings=(rows, whole)).lower(x, kernel).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program, padding
"""


def test_a_batch_over_devices_is_not_gathered():
    """Each device convolves its own images; only the kernel's gradient is summed."""
    flags = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4"}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SPLIT], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
