"""Scaled dot-product attention, which all networks use.

    out = softmax(scale q k^T + bias) v,    by default scale = 1 / sqrt(D) and bias = 0        (Vaswani et al. 2017, eq. 1)

The softmax is computed in f32, whatever the dtype of q, k and v. A query whose keys are all masked gives zeros (not NaN, and not the
mean of the masked values), so that an empty prompt adds nothing. The implementations are equal up to rounding:

    einsum    computes all T x S scores at once; the fastest for short sequences
    chunked   computes one head and one block of queries at a time, and the scores again in the backward pass. It needs memory for T + S
              numbers instead of T * S. On a CPU the block stays in the cache; the whole matrix is several times slower from 1024 on
    xla       jax.nn.dot_product_attention, compiled by XLA
    cudnn     flash attention on NVIDIA GPUs, for bf16 and f16 only
"""

import functools
import warnings

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "einsum", "chunked", "xla", "cudnn")
# 'auto' takes `chunked` where the scores take more bytes than this: on a CPU they no longer fit in the cache, elsewhere in the memory.
CHUNK_ABOVE = {"cpu": 1 << 24, "other": 1 << 30}
BLOCK = 256


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """q [B, T, H, D], k and v [B, S, H, D] -> [B, T, H, D] in q's dtype.

    mask            bool[B, S] or bool[B, T, S] (axes of length 1 broadcast), True where a query may attend to a key
    bias            f32[B, H, T, S] (axes of length 1 broadcast), added to the scores, such as relative positions (T5: Raffel et al.
                    2020, section 2.1). It must be finite: use the mask to hide a key
    scale           factor of the scores; None: 1 / sqrt(D). T5 has 1
    implementation  one of IMPLEMENTATIONS; 'auto' chooses by backend, dtype and length

    Raises ValueError on shapes that do not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention: implementation is {implementation!r}; expected one of {IMPLEMENTATIONS}")
    if q.ndim != 4 or k.shape != v.shape or q.shape[:1] + q.shape[2:] != k.shape[:1] + k.shape[2:]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape}; expected [B, T, H, D], [B, S, H, D], [B, S, H, D]"
        )
    if mask is not None:
        mask = _full_mask(mask, q.shape[0], q.shape[1], k.shape[1])
    if bias is not None:
        bias = _full_bias(bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    if implementation == "auto":
        # cuDNN's gradient of a bias has conditions on its shape, so 'auto' does not choose cuDNN for one.
        dtype = q.dtype if bias is None else jnp.float32
        implementation = choose(q.shape, k.shape[1], dtype, jax.default_backend())
    if implementation == "cudnn" and not cudnn_works():
        implementation = "xla"
    if implementation == "einsum":
        return _einsum(q, k, v, mask, bias, scale)
    if implementation == "chunked":
        return _chunked(q, k, v, mask, bias, scale)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], q.shape[1], k.shape[1]))
        bias = bias.astype(q.dtype) if implementation == "cudnn" else bias
    out = jax.nn.dot_product_attention(
        q, k, v, bias, None if mask is None else mask[:, None], scale=scale, implementation=implementation
    )
    return out if mask is None else jnp.where(mask.any(-1)[..., None, None], out, 0).astype(out.dtype)


def choose(query_shape: tuple[int, ...], keys: int, dtype: jnp.dtype, backend: str) -> str:
    """The implementation that 'auto' takes for a q of shape `query_shape` [B, T, H, D] and `keys` keys."""
    batch, queries, heads, depth = query_shape
    if backend in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2 and depth <= 128 and depth % 8 == 0:
        return "cudnn"
    # On a CPU the scores of one head must fit in the cache; elsewhere the scores of all heads must fit in the memory.
    if backend == "cpu":
        return "chunked" if queries * keys * 4 >= CHUNK_ABOVE["cpu"] else "einsum"
    return "chunked" if batch * heads * queries * keys * 4 > CHUNK_ABOVE["other"] else "xla"


@functools.cache
def cudnn_works() -> bool:
    """Whether cuDNN's attention compiles and runs here, forwards and backwards. It is tried once; one warning says if it fails."""

    def loss(q):
        mask = jnp.ones((1, 1, 64, 64), bool)
        return jax.nn.dot_product_attention(q, q, q, mask=mask, implementation="cudnn").astype(jnp.float32).sum()

    try:
        # The caller may be inside a trace, but only a real run shows whether it works.
        with jax.ensure_compile_time_eval():
            jax.block_until_ready(jax.jit(jax.grad(loss))(jnp.ones((1, 64, 1, 64), jnp.bfloat16)))
        return True
    except Exception as error:  # cuDNN's absence shows as RuntimeError, NotImplementedError or XlaRuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"cuDNN attention does not run here, XLA's is used instead: {reason}", stacklevel=2)
        return False


def _full_mask(mask: jax.Array, batch: int, queries: int, keys: int) -> jax.Array:
    """mask -> bool[B, T or 1, S]."""
    if mask.dtype != jnp.bool_:
        raise ValueError(f"attention: mask is {mask.dtype}; expected bool")
    full = mask[:, None] if mask.ndim == 2 else mask
    fits = full.ndim == 3 and all(m in (1, n) for m, n in zip(full.shape, (batch, queries, keys)))
    if not fits:
        raise ValueError(f"attention: mask {mask.shape}; expected [{batch}, {keys}] or [{batch}, {queries}, {keys}]")
    return jnp.broadcast_to(full, (batch, full.shape[1], keys))


def _full_bias(bias: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """bias as f32, each axis as in [B, H, T, S] or 1."""
    if bias.ndim != 4 or any(b not in (1, n) for b, n in zip(bias.shape, shape)):
        raise ValueError(f"attention: bias {bias.shape}; expected {list(shape)}, or 1 in the place of a number")
    return bias.astype(jnp.float32)


def _weights(scores: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """exp(scores - max) and its sum over the last axis, f32. A row whose mask has no True gives weights 0 and sum 1.

    The caller divides by the sum, after the product with v: that is a division of T * D numbers instead of T * S.
    """
    if mask is not None:
        # A large finite number, not -inf: in a row that is masked as a whole inf - inf would be NaN, in the gradient too.
        scores = jnp.where(mask, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    if mask is None:
        return weights, weights.sum(axis=-1, keepdims=True)
    weights = jnp.where(mask, weights, 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights, jnp.where(total > 0, total, 1.0)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The product of a and b over one axis of each, f32. The first axis of both is the batch."""
    axes = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _by_head(x: jax.Array) -> jax.Array:
    """[B, T, H, D] -> [B H, T, D]. The transpose is explicit, so that XLA multiplies contiguous matrices on a CPU."""
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _einsum(q, k, v, mask, bias, scale):
    batch, queries, heads, depth = q.shape
    scale = depth**-0.5 if scale is None else scale
    scores = _dot(_by_head(q * jnp.asarray(scale, q.dtype)), _by_head(k), (2, 2))
    if bias is not None:
        scores = (scores.reshape(batch, heads, queries, -1) + bias).reshape(scores.shape)
    weights, total = _weights(scores, None if mask is None else jnp.repeat(mask, heads, axis=0))
    out = (_dot(weights.astype(v.dtype), _by_head(v), (2, 1)) / total).astype(q.dtype)
    return out.reshape(batch, heads, queries, depth).transpose(0, 2, 1, 3)


def _chunked(q, k, v, mask, bias, scale, block: int | None = None):
    batch, queries, heads, depth = q.shape
    keys = k.shape[1]
    block = min(block or BLOCK, queries)
    count = -(-queries // block)
    pad = count * block - queries
    scale = jnp.asarray(depth**-0.5 if scale is None else scale, q.dtype)

    q_heads = _by_head(jnp.pad(q * scale, ((0, 0), (0, pad), (0, 0), (0, 0)))).reshape(-1, count, block, depth)
    k_heads, v_heads = _by_head(k), _by_head(v)
    if mask is not None and mask.shape[1] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, pad), (0, 0))).reshape(batch, count, block, keys)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:3], keys))
        if bias.shape[2] > 1:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(*bias.shape[:2], count, block, keys)

    def head(args):
        index, q_head, k_head, v_head = args

        # Without checkpoint the loop would store the weights of all blocks for the backward pass: T * S numbers again.
        @jax.checkpoint
        def queries_block(q_block, mask_block, bias_block):
            scores = jnp.einsum("td,sd->ts", q_block, k_head, preferred_element_type=jnp.float32)
            if bias_block is not None:
                scores = scores + bias_block
            weights, total = _weights(scores, mask_block)
            out = jnp.einsum("ts,sd->td", weights.astype(v_head.dtype), v_head, preferred_element_type=jnp.float32)
            return (out / total).astype(q_block.dtype)

        # A mask or bias of one row for all queries is a constant of the loop; any other goes through it block by block.
        row, by_block = index // heads, {}
        mask_head, bias_head = None, None
        if mask is not None:
            mask_head = mask[row]
            if mask.ndim == 4:
                by_block["mask"] = mask_head
        if bias is not None:
            bias_head = bias[row if bias.shape[0] > 1 else 0, index % heads if bias.shape[1] > 1 else 0]
            if bias.ndim == 5:
                by_block["bias"] = bias_head

        def one(args):
            q_block, parts = args
            return queries_block(q_block, parts.get("mask", mask_head), parts.get("bias", bias_head))

        return jax.lax.map(one, (q_head, by_block))

    out = jax.lax.map(head, (jnp.arange(batch * heads), q_heads, k_heads, v_heads))
    out = out.reshape(batch, heads, count * block, depth)[:, :, :queries]
    return out.transpose(0, 2, 1, 3)
