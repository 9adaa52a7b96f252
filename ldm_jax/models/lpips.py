"""LPIPS: the distance of two images in the features of VGG16, with weights that were fitted to human judgements.

    d(x, y) = sum_l mean_hw sum_c w_lc (u_lhwc(x) - u_lhwc(y))^2,   u = f / (|f| + 1e-10), of length 1 over the channels

(Zhang et al. 2018, arXiv:1801.03924, eq. 1; our w are the squares of those in the paper, as in the published 'heads', version 0.1.) f_l
are the last activations of the five stages of VGG16 (Simonyan & Zisserman 2015, arXiv:1409.1556, table 1 D), whose layers are
numbered as in torchvision. The name LPIPS stands for this distance with the published weights only (weights.lpips).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.models.layers import Conv, Dense

# Channels and convolutions of a stage.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
# ImageNet's mean and deviation for images in [-1, 1], rounded as they were when the published heads were trained.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPS = 1e-10


def max_pool(x: Array) -> Array:
    """Maximum over 2 x 2 pixels of `x[B, H, W, C]`; an odd last row or column is dropped."""
    # On a CPU the gradient of a reduction over windows takes several times as long as that of slices.
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = jnp.maximum(x[:, 0:h:2], x[:, 1:h:2])
    return jnp.maximum(x[:, :, 0:w:2], x[:, :, 1:w:2])


def unit(f: Array) -> Array:
    """`f[..., C]` divided by its length over the last axis; 0 stays 0."""
    # The derivative of a square root at 0 is infinite: without this maximum a pixel without any activation makes the gradient NaN.
    return f / (jnp.sqrt(jnp.maximum(jnp.square(f).sum(-1, keepdims=True), 1e-36)) + EPS)


class VGG16(nn.Module):
    """Images f32[B, H, W, 3] in [-1, 1] -> the last activations of the stages, f32[B, H / 2^l, W / 2^l, C_l] for l = 0, ..., 4."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        x, maps, layer = (x - SHIFT) / SCALE, [], 0
        for width, depth in STAGES:
            if maps:
                x, layer = max_pool(x), layer + 1
            for _ in range(depth):
                x, layer = nn.relu(Conv(width, name=f"features_{layer}")(x)), layer + 2
            maps.append(x)
        return tuple(maps)


class LPIPS(nn.Module):
    """module(x, y) -> distances f32[B] of images f32[B, H, W, 3] in [-1, 1], with H and W at least 16.

    Convolutions have the default precision of the device, which is enough for a loss. For a figure that is compared with published
    ones, put `jax.default_matmul_precision('highest')` around the call. Raises ValueError for other shapes.
    """

    def setup(self) -> None:
        self.vgg = VGG16()
        self.heads = [Dense(1, use_bias=False) for _ in STAGES]

    def features(self, x: Array) -> tuple[Array, ...]:
        """The activations of VGG16, before they are divided by their length: f32[B, H / 2^l, W / 2^l, C_l]."""
        if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 2 ** (len(STAGES) - 1):
            raise ValueError(f"LPIPS: x is {x.shape}, expected [B, H, W, 3] with H and W at least 16")
        return self.vgg(x)

    def __call__(self, x: Array, y: Array) -> Array:
        if x.shape != y.shape:
            raise ValueError(f"LPIPS: x is {x.shape} and y {y.shape}, expected images of one shape")

        def distance(head: Dense, a: Array, b: Array) -> Array:
            return head(jnp.square(unit(a) - unit(b)).mean((1, 2)))[:, 0]

        # Not as one batch: for a gradient with respect to y only, half of the backward pass would be wasted.
        return sum(map(distance, self.heads, self.features(x), self.features(y)))


def inputs(module: LPIPS, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `__call__` for one pair of images of `shape` (H, W, 3); see models.inputs."""
    image = jax.ShapeDtypeStruct((1, *(shape or (16, 16, 3))), jnp.float32)
    return {"x": image, "y": image}
