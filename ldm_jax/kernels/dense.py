"""The matrix product of linear layers, y = x W, computed in bf16 or f16 with parameters W in f32.

Computing in bf16 means here: the operands are bf16, the accumulator is f32, and the result is cast once. This holds in the backward
pass too. With g = dL/dy, dL/dx = g W^T and dL/dW = x^T g are products of two bf16 arrays with an f32 result. A plain `jax.grad` would
multiply an f32 cotangent by a bf16 operand instead; the matrix units of CPUs (AMX) do not take that pair. It would also round dL/dW
to bf16 before the optimizer gets it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype called `name` ('float32', 'bfloat16' or 'float16'); ValueError for anything else."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {sorted(DTYPES)}")
    return jnp.dtype(DTYPES[name])


def _dot(
    a: jax.Array, b: jax.Array, *, axes: tuple[tuple[int, ...], tuple[int, ...]], low: str, dtype: str
) -> jax.Array:
    product = jax.lax.dot_general(a.astype(low), b.astype(low), (axes, ((), ())), preferred_element_type=jnp.float32)
    return product.astype(dtype)


def _dot_transposed_a(g, a, b, *, axes, low, dtype):
    over_a, over_b = axes
    free_b = [i for i in range(b.ndim) if i not in over_b]
    shared = list(range(g.ndim - len(free_b), g.ndim))
    # The result has a's free axes first, then its contracted axes in the order in which b has them.
    out = low_dot.bind(g, b, axes=(tuple(shared), tuple(free_b)), low=low, dtype=a.aval.dtype.name)
    free_a = [i for i in range(a.aval.ndim) if i not in over_a]
    order = free_a + [over_a[i] for i in np.argsort(over_b)]
    return jnp.transpose(out, np.argsort(order))


def _dot_transposed_b(g, a, b, *, axes, low, dtype):
    over_a, over_b = axes
    free_a = [i for i in range(a.ndim) if i not in over_a]
    out = low_dot.bind(a, g, axes=(tuple(free_a), tuple(range(len(free_a)))), low=low, dtype=b.aval.dtype.name)
    free_b = [i for i in range(b.aval.ndim) if i not in over_b]
    order = [over_b[i] for i in np.argsort(over_a)] + free_b
    return jnp.transpose(out, np.argsort(order))


def _dot_batched(args, dims, **settings):
    return jax.vmap(functools.partial(_dot, **settings), in_axes=dims)(*args), 0


# This is a new primitive, because its transposes must again be products of operands in low precision. custom_vjp could do that as well,
# but has no forward mode, which the training of consistency models and of MeanFlow needs.
low_dot = Primitive("low_precision_dot")
low_dot.def_impl(jax.jit(_dot, static_argnames=("axes", "low", "dtype")))
low_dot.def_abstract_eval(lambda a, b, **settings: _shape(a, b, **settings))
ad.defbilinear(low_dot, _dot_transposed_a, _dot_transposed_b)
batching.primitive_batchers[low_dot] = _dot_batched
mlir.register_lowering(low_dot, mlir.lower_fun(_dot, multiple_results=False))


def _shape(a, b, **settings):
    out = jax.eval_shape(functools.partial(_dot, **settings), a, b)
    return jax.core.ShapedArray(out.shape, out.dtype)


def low_precision_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K] in bf16 or f16 times w f32[K, N] -> [..., N] in x's dtype.

    Each product, in the backward pass too, takes two arrays of x's dtype and accumulates in f32; dL/dw is f32. Differentiable in both
    modes and to any order.
    """
    low = x.dtype.name
    return low_dot.bind(x, w, axes=((x.ndim - 1,), (0,)), low=low, dtype=low)
