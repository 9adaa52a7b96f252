"""Two-dimensional convolution, nearest-neighbour upsampling and its mirror images, NHWC and HWIO.

y[b, i, j, o] = sum_{u, v, c} x[b, i stride + u - pad, j stride + v - pad, c] kernel[u, v, c, o] + bias[o]
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

# U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): the start from which the published convolutional networks were trained.
default_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")

Padding = int | tuple[tuple[int, int], tuple[int, int]]


def conv2d(x: Array, kernel: Array, stride: int = 1, padding: Padding = 0) -> Array:
    """Convolve `x[B, H, W, C]` with `kernel[kh, kw, C, O]`; `padding` is one width or ((top, bottom), (left, right))."""
    pads = ((padding, padding), (padding, padding)) if isinstance(padding, int) else tuple(padding)
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(f"conv2d: the kernel expects {kernel.shape[2]} channels, x has {x.shape[-1]}")
    if kernel.shape[:2] == (1, 1) and stride == 1 and pads == ((0, 0), (0, 0)):
        y = jnp.einsum("bhwc,co->bhwo", x, kernel[0, 0], preferred_element_type=jnp.float32)
        return y.astype(x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Conv(nn.Module):
    """`conv2d` with parameters `kernel` and `bias`, held in float32 and used in `dtype`."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = 1
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = default_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k = self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (k, k, x.shape[-1], self.features), jnp.float32)
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y


def upsample_nearest(x: Array) -> Array:
    """Repeat every pixel of `x[B, H, W, C]` twice along H and W."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def average_pool(x: Array) -> Array:
    """Mean over 2 x 2 pixels of `x[B, H, W, C]`; an odd last row or column is dropped, as in the published networks."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2. `padding=1` pads all sides (U-Nets), `padding=0` only right and below (autoencoders).

    Called as a res-block is, which may stand in its place; the time embedding is not used.
    """

    features: int
    padding: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None, train: bool = False) -> Array:
        pads = ((0, 1), (0, 1)) if self.padding == 0 else self.padding
        return Conv(self.features, 3, 2, pads, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a 3 x 3 convolution; called as a res-block is, like Downsample."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None, train: bool = False) -> Array:
        return Conv(self.features, dtype=self.dtype, name="conv")(upsample_nearest(x))
