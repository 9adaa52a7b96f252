"""The discriminator of patches (PatchGAN): one logit for every patch of an image.

    conv 4 x 4 / 2 -> lrelu;   (conv 4 x 4 / 2 -> norm -> lrelu) x (layers - 1);   conv 4 x 4 -> norm -> lrelu;   conv 4 x 4 -> logit

(Isola et al. 2017, arXiv:1611.07004, section 6.1.2; as in VQGAN, Esser et al. 2021, and latent diffusion.) lrelu(u) = max(u, 0.2 u);
with three layers a patch has 70 pixels a side. Kernels start as N(0, 0.02^2), gains of a batch norm as N(1, 0.02^2).

    batch     (x - mean) / sqrt(var + 1e-5) scale + bias, with the moments of the batch in training and running moments in evaluation,
              running <- 0.9 running + 0.1 batch  (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2)
    spectral  kernel / (u^T K v) in each convolution, where K is the kernel as a matrix of outputs by inputs; activations have no norm;
              u <- K v / |K v|,  v <- K^T u / |K^T u|  once for each training call  (Miyato et al. 2018, arXiv:1802.05957, algorithm 1)
    group     kernels.norm with four channels a group, and at most 32 groups
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.kernels.conv import conv2d
from ldm_jax.models.layers import Conv, GroupNorm

NORMS = ("batch", "spectral", "group", "none")
MOMENTUM, EPS = 0.1, 1e-5
# Steps of the power method before the first training call, so that the first division is by about the norm.
ITERATIONS = 15
normal = nn.initializers.normal(0.02)


def gain_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """N(1, 0.02^2)."""
    return 1.0 + normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """`x[B, H, W, C]` normalized over all axes but the channels. Under jit that is over the whole batch, however it is sharded.

    'state' holds the running `mean` and `var` f32[C]; `var` is the average of unbiased variances. A training call normalizes by the
    moments of the batch, and updates the running ones where 'state' is mutable.
    """

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        c = x.shape[-1]
        scale = self.param("scale", gain_init, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        running_mean = self.variable("state", "mean", jnp.zeros, (c,))
        running_var = self.variable("state", "var", jnp.ones, (c,))
        rows, mean, var = x.astype(jnp.float32), running_mean.value, running_var.value
        if train:
            mean = rows.mean((0, 1, 2))
            var = jnp.square(rows - mean).mean((0, 1, 2))
            if self.is_mutable_collection("state") and not self.is_initializing():
                n = x.size // c
                running_mean.value += MOMENTUM * (mean - running_mean.value)
                running_var.value += MOMENTUM * (var * n / (n - 1) - running_var.value)
        return ((rows - mean) * (jax.lax.rsqrt(var + EPS) * scale) + bias).astype(x.dtype)


def power_iteration(matrix: Array, v: Array, iterations: int) -> tuple[Array, Array]:
    """(u[O], v[I]) of length 1 after `iterations` steps from `v`: they tend to the singular vectors of the largest singular value of
    `matrix[O, I]`."""

    def unit(a: Array) -> Array:
        return a / jnp.maximum(jnp.linalg.norm(a), 1e-12)

    for _ in range(iterations):
        u = unit(jnp.matmul(matrix, v, precision="highest"))
        v = unit(jnp.matmul(u, matrix, precision="highest"))
    return u, v


class SpectralConv(nn.Module):
    """A 4 x 4 convolution whose kernel is divided by its largest singular value. 'state' holds its singular vectors `u` and `v`."""

    features: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        kernel = self.param("kernel", normal, (4, 4, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        matrix = kernel.reshape(-1, self.features).T
        fixed = jax.lax.stop_gradient(matrix)

        def start() -> dict[str, Array]:
            v = jax.random.normal(self.make_rng("params"), (matrix.shape[1],))
            return dict(zip("uv", power_iteration(fixed, v, ITERATIONS)))

        state = self.variable("state", "vectors", start)
        vectors = state.value
        if train and not self.is_initializing():
            vectors = dict(zip("uv", power_iteration(fixed, vectors["v"], 1)))
            if self.is_mutable_collection("state"):
                state.value = vectors
        largest = jnp.sum(vectors["u"] * jnp.matmul(matrix, vectors["v"], precision="highest"))
        y = conv2d(x.astype(self.dtype), (kernel / largest).astype(self.dtype), self.stride, 1)
        return y + bias.astype(self.dtype)


class PatchDiscriminator(nn.Module):
    """module(x f32[B, H, W, C] in [-1, 1], train) -> logits f32[B, H / 2^layers - 2, W / 2^layers - 2, 1], higher for data.

    H and W are at least 3 * 2^layers. The layers have width, 2 width, 4 width and then 8 width channels; norm is one of NORMS; dtype is
    the compute dtype. 'batch' and 'spectral' have a collection 'state', which a training call updates where it is mutable. The
    published training calls the network on data, on reconstructions and for the generator's loss, one after another; each call
    updates the state and uses the moments of its batch. Raises ValueError for an unknown norm, for fewer layers than one, and for an
    image that is too small for a patch.
    """

    width: int = 64
    layers: int = 3
    norm: str = "batch"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.norm not in NORMS:
            raise ValueError(f"PatchDiscriminator: norm is {self.norm!r}, expected one of {', '.join(NORMS)}")
        if self.layers < 1:
            raise ValueError(f"PatchDiscriminator: layers is {self.layers}, expected at least 1")
        least = 3 * 2**self.layers
        if x.ndim != 4 or min(x.shape[1:3]) < least:
            raise ValueError(
                f"PatchDiscriminator: x is {x.shape}, expected [B, H, W, C] with H and W at least {least}: "
                f"{self.layers} layers leave no patch of less"
            )

        def conv(x: Array, i: int, features: int, stride: int, use_bias: bool) -> Array:
            if self.norm == "spectral":
                return SpectralConv(features, stride, self.dtype, name=f"conv_{i}")(x, train)
            return Conv(features, 4, stride, 1, use_bias, self.dtype, normal, name=f"conv_{i}")(x)

        for i in range(self.layers + 1):
            norm = self.norm if i > 0 else "none"
            # A bias before a batch norm has no effect: the norm subtracts it.
            x = conv(x, i, self.width * min(2**i, 8), 2 if i < self.layers else 1, use_bias=norm != "batch")
            if norm == "batch":
                x = BatchNorm(name=f"norm_{i}")(x, train)
            elif norm == "group":
                x = GroupNorm(None, name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(x, self.layers + 1, 1, 1, use_bias=True).astype(jnp.float32)


def inputs(module: PatchDiscriminator, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `__call__` for one image of `shape` (H, W, C); see models.inputs. Without `shape`, C is 3."""
    side = 3 * 2**module.layers
    return {"x": jax.ShapeDtypeStruct((1, *(shape or (side, side, 3))), jnp.float32)}
