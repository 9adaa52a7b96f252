"""attention(): the implementations agree with each other and with the formula, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.kernels import attention as module
from ldm_jax.kernels.attention import attention, choose, cudnn_works


def formula(q, k, v, mask=None, bias=None, scale=None):
    """The definition, one query at a time in float64."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    bias = np.broadcast_to(0.0 if bias is None else bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        seen = np.ones(k.shape[1], bool) if mask is None else np.broadcast_to(mask[b], (q.shape[1], k.shape[1]))[i]
        if seen.any():
            weights = np.exp(k[b, seen, h] @ q[b, i, h] * scale + bias[b, h, i, seen])
            out[b, i, h] = weights @ v[b, seen, h] / weights.sum()
    return out


def qkv(queries=11, keys=7, batch=3, heads=2, depth=8, dtype=np.float32):
    r = np.random.RandomState(0)
    return tuple(r.randn(batch, n, heads, depth).astype(dtype) for n in (queries, keys, keys))


PADDING = np.arange(7) < np.array([[7], [3], [0]])
PER_QUERY = np.random.RandomState(1).rand(3, 11, 7) < 0.4
MASKS = {"none": None, "padding": PADDING, "per query": PER_QUERY, "one row for all": PADDING[1:2]}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["einsum", "chunked", "xla"])
def test_equals_the_formula(implementation, mask):
    q, k, v = qkv()
    out = jax.jit(lambda *a: attention(*a, implementation=implementation))(q, k, v, MASKS[mask])
    full = None if MASKS[mask] is None else np.broadcast_to(MASKS[mask], (3, *MASKS[mask].shape[1:]))
    np.testing.assert_allclose(out, formula(q, k, v, full), atol=2e-6)


BIASES = {
    "whole": (3, 2, 11, 7),
    "relative positions": (1, 2, 11, 7),
    "of keys": (3, 1, 1, 7),
    "of queries": (1, 2, 11, 1),
}


@pytest.mark.parametrize("mask", ["none", "padding", "per query"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("implementation", ["einsum", "chunked", "xla"])
def test_a_bias_and_a_scale_of_the_scores(implementation, bias, mask, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    q, k, v = qkv()
    added = np.random.RandomState(2).randn(*BIASES[bias]).astype(np.float32)
    f = jax.jit(lambda *a, b: attention(*a, bias=b, scale=0.7, implementation=implementation))
    out = f(q, k, v, MASKS[mask], b=added)
    np.testing.assert_allclose(out, formula(q, k, v, MASKS[mask], added, 0.7), atol=2e-6)


def test_gradients_of_a_bias_agree(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    q, k, v = qkv()

    def gradient(implementation, shape):
        bias = np.random.RandomState(2).randn(*shape).astype(np.float32)
        loss = lambda b: jnp.sum(jnp.sin(attention(q, k, v, PADDING, bias=b, implementation=implementation)))  # noqa: E731
        return jax.jit(jax.grad(loss))(bias)

    for shape in (BIASES["relative positions"], BIASES["of keys"]):
        reference = gradient("einsum", shape)
        assert np.abs(reference).max() > 1e-2
        for name in ("chunked", "xla"):
            np.testing.assert_allclose(gradient(name, shape), reference, atol=5e-6)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_agree_and_are_finite(mask, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)  # several blocks, the last one padded
    q, k, v = qkv()

    def gradients(implementation):
        loss = lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, MASKS[mask], implementation=implementation)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    reference = gradients("einsum")
    for name in ("chunked", "xla"):
        for mine, theirs in zip(gradients(name), reference):
            assert np.isfinite(mine).all()
            np.testing.assert_allclose(mine, theirs, atol=5e-6)


@pytest.mark.parametrize("implementation", ["einsum", "chunked", "xla"])
def test_forward_mode_agrees_with_finite_differences(implementation):
    q, k, v = qkv(5, 7)
    direction = tuple(np.roll(a, 1, axis=1) for a in (q, k, v))
    f = jax.jit(lambda *a: attention(*a, PADDING, implementation=implementation))
    _, tangent = jax.jvp(f, (q, k, v), direction)
    h = 1e-2
    ahead, behind = (f(*(a + s * h * d for a, d in zip((q, k, v), direction))) for s in (1, -1))
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * h), atol=2e-2)


@pytest.mark.parametrize("implementation", ["einsum", "chunked", "xla"])
def test_a_query_that_sees_nothing_gives_zero_even_beside_huge_values(implementation):
    q, k, v = qkv()
    v[2], k[2] = 1e30, 1e10
    out = jax.jit(lambda *a: attention(*a, PADDING, implementation=implementation))(q, k, v)
    assert (np.asarray(out[2]) == 0).all()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("implementation", ["einsum", "chunked", "xla"])
def test_bf16_keeps_its_dtype_and_an_f32_softmax(implementation):
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in qkv(9, 300))
    out = jax.jit(lambda *a: attention(*a, implementation=implementation))(q, k, v)
    assert out.dtype == jnp.bfloat16
    # 300 weights summed in bf16 would be off by several per cent.
    np.testing.assert_allclose(out.astype(jnp.float32), formula(q, k, v), atol=2e-2)


def test_choice_by_backend_and_length():
    assert choose((8, 256, 6, 64), 256, jnp.float32, "cpu") == "einsum"
    assert choose((1, 4096, 6, 64), 4096, jnp.float32, "cpu") == "chunked"
    assert choose((8, 256, 6, 64), 256, jnp.bfloat16, "gpu") == "cudnn"
    assert choose((8, 256, 6, 64), 256, jnp.float32, "gpu") == "xla"
    assert choose((8, 256, 6, 160), 256, jnp.bfloat16, "gpu") == "xla"
    assert choose((64, 4096, 16, 64), 4096, jnp.float32, "tpu") == "chunked"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN may well work here")
def test_cudnn_falls_back_with_one_warning():
    cudnn_works.cache_clear()
    q, k, v = qkv()
    f = jax.jit(lambda q: attention(q, k, v, PADDING, implementation="cudnn"))
    with pytest.warns(UserWarning, match="cuDNN attention does not run here") as caught:
        out = f(q)
        f(q[:, :5])
    assert len(caught) == 1
    np.testing.assert_allclose(out, formula(q, k, v, PADDING), atol=2e-6)


def test_bad_arguments_are_named():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="implementation is 'flash'"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match=r"k \(3, 7, 1, 8\)"):
        attention(q, k[:, :, :1], v[:, :, :1])
    with pytest.raises(ValueError, match=r"mask \(3, 11\); expected \[3, 7\]"):
        attention(q, k, v, np.ones((3, 11), bool))
    with pytest.raises(ValueError, match=r"bias \(2, 11, 7\); expected \[3, 2, 11, 7\]"):
        attention(q, k, v, bias=np.zeros((2, 11, 7)))
    with pytest.raises(ValueError, match=r"bias \(3, 2, 7, 11\)"):
        attention(q, k, v, bias=np.zeros((3, 2, 7, 11)))
    with pytest.raises(ValueError, match="mask is float32; expected bool"):
        attention(q, k, v, np.ones((3, 7), np.float32))
