"""Dense: f32 is x W + b; bf16 is bf16 dots with f32 accumulators, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.kernels.dense import low_precision_matmul
from ldm_jax.kernels.precision import best_dtype, has_amx
from ldm_jax.models.layers import Dense

R = np.random.RandomState(0)
X, W = R.randn(4, 6, 64).astype(np.float32), R.randn(64, 10).astype(np.float32)
X16 = jnp.asarray(X, jnp.bfloat16)


def exact(x, w):
    """The product of the bf16-rounded operands in float64."""
    x, w = (np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), np.float64) for a in (x, w))
    return x @ w


def test_f32_and_parameters():
    dense = Dense(10)
    params = dense.init(jax.random.key(0), X)["params"]
    assert {k: (v.shape, v.dtype.name) for k, v in params.items()} == {
        "kernel": ((64, 10), "float32"),
        "bias": ((10,), "float32"),
    }
    bias = np.arange(10, dtype=np.float32)
    np.testing.assert_allclose(
        dense.apply({"params": {"kernel": W, "bias": bias}}, X), X @ W + bias, rtol=1e-4, atol=1e-4
    )
    assert "bias" not in Dense(10, use_bias=False).init(jax.random.key(0), X)["params"]


def test_bf16_output_is_the_exact_product_rounded_once():
    out = jax.jit(Dense(10, use_bias=False, dtype="bfloat16").apply)({"params": {"kernel": W}}, X)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact(X, W), rtol=2**-8, atol=1e-5)


def test_bf16_weight_gradient_is_f32_and_not_rounded():
    g = jnp.asarray(R.randn(4, 6, 10), jnp.bfloat16)
    _, pull = jax.vjp(low_precision_matmul, X16, jnp.asarray(W))
    dx, dw = pull(g)
    assert dx.dtype == jnp.bfloat16
    assert dw.dtype == jnp.float32
    g64 = np.asarray(g.astype(jnp.float32), np.float64)
    x64 = np.asarray(X16.astype(jnp.float32), np.float64)
    np.testing.assert_allclose(dw, np.einsum("abk,abn->kn", x64, g64), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.astype(jnp.float32), exact(g.astype(jnp.float32), W.T), rtol=2**-8, atol=1e-4)


def test_bf16_has_no_mixed_or_upcast_dot_on_either_pass():
    grad = jax.grad(lambda x, w: low_precision_matmul(x, w).astype(jnp.float32).sum(), argnums=(0, 1))
    text = jax.jit(grad).lower(X16, W).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) >= 2
    for line in dots:
        operands, result = line.rsplit("->", 1)
        assert operands.count("xbf16>") == 2, line
        assert "xf32>" in result, line


def test_bf16_forward_mode_second_order_and_vmap():
    f = lambda x, w: jnp.sum(jnp.sin(low_precision_matmul(x, w).astype(jnp.float32)))  # noqa: E731
    g = lambda x, w: jnp.sum(jnp.sin(x.astype(jnp.float32) @ w))  # noqa: E731
    x, w = X16 * 0.1, W * 0.1
    for make in (
        lambda f: jax.jvp(f, (x, w), (x, w))[1],
        lambda f: jax.jvp(jax.grad(f, 1), (x, w), (x, w))[1],
        lambda f: jax.grad(lambda w: jax.jvp(f, (x, w), (x, w))[1])(w),
        lambda f: jax.vmap(jax.grad(f, 1), (0, None))(x, w),
        lambda f: jax.vmap(jax.grad(f, 1), (None, 0))(x, jnp.stack([w, 2 * w])),
        lambda f: jax.vmap(jax.grad(f, 1))(x, jnp.stack([w, 2 * w, w, w])),
    ):
        mine, reference = jax.jit(lambda make=make: (make(f), make(g)))()
        assert mine.shape == reference.shape
        assert jnp.linalg.norm(mine - reference) < 0.03 * jnp.linalg.norm(reference)


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="dtype is 'bf16'; expected"):
        Dense(3, dtype="bf16").init(jax.random.key(0), X)


def test_amx_is_read_from_cpuinfo(tmp_path):
    with_amx, without = tmp_path / "with", tmp_path / "without"
    with_amx.write_text("processor : 0\nflags : fpu avx512f amx_bf16 amx_tile\n")
    without.write_text("processor : 0\nflags : fpu avx512f amx_bf16_not\n")
    assert has_amx(str(with_amx))
    assert not has_amx(str(without))
    assert not has_amx(str(tmp_path / "missing"))
    if jax.default_backend() == "cpu":
        assert best_dtype() == ("bfloat16" if has_amx() else "float32")
