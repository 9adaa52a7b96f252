"""Linear layers: y = x W + b, computed in bf16 or f32 over f32 parameters.

bf16 compute here means bf16 operands, an f32 accumulator and one cast of the result, on the backward pass too: with
g = dL/dy,  dL/dx = g W^T  and  dL/dW = x^T g  are dots of two bf16 arrays with an f32 result. A plain `jax.grad` would
multiply an f32 cotangent by a bf16 operand instead, which the matrix units of CPUs (AMX) do not take, and would round
dL/dW to bf16 before the optimizer sees it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype called `name` ('float32', 'bfloat16' or 'float16'); ValueError for anything else."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {sorted(DTYPES)}")
    return jnp.dtype(DTYPES[name])


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _times(x: jax.Array, w: jax.Array) -> jax.Array:
    return _dot(x, w.astype(x.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)


@jax.custom_jvp
def low_precision_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K] in bf16/f16 times w f32[K, N] -> [..., N] in x's dtype; every dot, transposes included, is
    low-precision operands with an f32 accumulator. Differentiable in both modes and to any order; dL/dw is f32."""
    return _times(x, w)


@low_precision_matmul.defjvp
def _low_precision_matmul_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    low = w.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))

    def by_weight(w, dx):
        return _times(dx, w)

    def by_weight_transposed(w, g):
        return _dot(g, w, ((g.ndim - 1,), (1,))).astype(g.dtype)

    def by_input(x, dw):
        return _times(x, dw)

    def by_input_transposed(x, g):
        return _dot(x, g, (rows, rows))

    tangent = jax.custom_derivatives.linear_call(by_weight, by_weight_transposed, low, dx)
    tangent += jax.custom_derivatives.linear_call(by_input, by_input_transposed, x, dw)
    return _times(x, low), tangent


class Dense(nn.Module):
    """y = x W + b over the last axis: x [..., K] -> [..., features] in `dtype`.

    Parameters `kernel` f32[K, features] and `bias` f32[features]. In 'bfloat16' the dots run as the module docstring
    says and the bias is added in f32 before the result is cast.
    """

    features: int
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = compute_dtype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        x = x.astype(dtype)
        y = x @ kernel if dtype == jnp.float32 else low_precision_matmul(x, kernel)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return y.astype(dtype)
