"""Linear layers: y = x W + b, computed in bf16 or f32 over f32 parameters.

bf16 compute here means bf16 operands, an f32 accumulator and one cast of the result, on the backward pass too: with
g = dL/dy,  dL/dx = g W^T  and  dL/dW = x^T g  are dots of two bf16 arrays with an f32 result. A plain `jax.grad` would
multiply an f32 cotangent by a bf16 operand instead, which the matrix units of CPUs (AMX) do not take, and would round
dL/dW to bf16 before the optimizer sees it.
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
    # Comes out as a's free axes, then its contracted ones in the order in which b's lie.
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


# A primitive of its own, because its transposes must again be dots of low-precision operands; custom_vjp could say so
# as well, but loses forward mode, which consistency and MeanFlow training need.
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
    """x [..., K] in bf16/f16 times w f32[K, N] -> [..., N] in x's dtype. Every dot, on the backward pass too, takes two
    arrays of x's dtype and accumulates in f32; dL/dw is f32. Differentiable in both modes and to any order."""
    low = x.dtype.name
    return low_dot.bind(x, w, axes=((x.ndim - 1,), (0,)), low=low, dtype=low)
