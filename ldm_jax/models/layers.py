"""Layers with parameters, made of the operations of kernels/: linear layers, convolutions, resampling, group normalization.

Parameters are float32; `dtype` is the compute dtype.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.kernels.conv import Padding, conv2d, upsample_nearest
from ldm_jax.kernels.dense import compute_dtype, low_precision_matmul
from ldm_jax.kernels.norm import group_norm

Initializer = Callable[..., jax.Array]

# U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), with which the published convolutional networks were initialized.
default_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class Dense(nn.Module):
    """y = x W + b over the last axis: x [..., K] -> [..., features] in `dtype`.

    Parameters: `kernel` f32[K, features] and `bias` f32[features]. In 'bfloat16' the product is that of kernels/dense.py, and the
    bias is added in f32 before the result is cast.
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
        # x is made a matrix. Otherwise dL/dW contracts several axes at once, and XLA's CPU backend transposes both operands for that
        # (a transformer block took 528 instead of 411 ms of processor time).
        rows = x.astype(dtype).reshape(-1, x.shape[-1])
        y = rows @ kernel if dtype == jnp.float32 else low_precision_matmul(rows, kernel)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return y.astype(dtype).reshape(*x.shape[:-1], self.features)


class Conv(nn.Module):
    """`conv2d` with the parameters `kernel` and `bias`, which are float32 and are cast to `dtype`."""

    features: int
    kernel_size: int | tuple[int, int] = 3
    stride: int = 1
    padding: Padding = 1
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = default_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = (self.kernel_size,) * 2 if isinstance(self.kernel_size, int) else self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (*size, x.shape[-1], self.features), jnp.float32)
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2. `padding=1` pads all sides (U-Nets), `padding=0` only right and below (autoencoders).

    It takes the arguments of a res-block, which may take its place, but does not use the time embedding.
    """

    features: int
    padding: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None, train: bool = False) -> Array:
        pads = ((0, 1), (0, 1)) if self.padding == 0 else self.padding
        return Conv(self.features, 3, 2, pads, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, or resizing to `size` (H, W), followed by a 3 x 3 convolution. It takes the arguments of a res-block,
    like Downsample."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Array, temb: Array | None = None, train: bool = False, size: tuple[int, int] | None = None
    ) -> Array:
        return Conv(self.features, dtype=self.dtype, name="conv")(upsample_nearest(x, size))


class GroupNorm(nn.Module):
    """Group normalization over the last axis of `x[B, ..., C]`, with an optional activation in the same pass.

    `num_groups=None` stands for NCSN++'s rule: four channels a group, and at most 32 groups (Song et al. 2021, appendix H).
    With `modulation`, a pair of f32[B, C], the result before the activation is y (1 + modulation[0]) + modulation[1].
    """

    num_groups: int | None = 32
    eps: float = 1e-5
    act: str = "none"

    @nn.compact
    def __call__(self, x: Array, modulation: tuple[Array, Array] | None = None) -> Array:
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        if modulation is not None:
            gain = 1.0 + modulation[0].astype(jnp.float32)
            scale, bias = scale * gain, bias * gain + modulation[1].astype(jnp.float32)
        groups = min(c // 4, 32) if self.num_groups is None else self.num_groups
        return group_norm(x, scale, bias, groups, self.eps, self.act)
