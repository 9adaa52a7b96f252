"""Inception-V3 for the Fréchet inception distance: the network of the TensorFlow graph of 2015-12-05.

Szegedy et al. 2015 (arXiv:1512.00567) describe the network, Heusel et al. 2017 (arXiv:1706.08500) the distance over its last pooled
features. All published values of FID come from one frozen graph, which differs from the Inception-V3 of other libraries. It enlarges
images by TensorFlow 1's bilinear resize (the source of output pixel i is i * in / out, without a half-pixel centre). Its average
pools do not count the padding, its last block pools by maximum, it has 1008 logits, and its batch normalisation adds 1e-3. A change
of any of these changes FID by whole points.

Batch normalisation is folded into the kernel and the bias of each convolution (see weights.inception), so that a layer is
relu(conv(x) + bias). Convolutions run in full float32: the lower precision that is the default on accelerators changes FID visibly.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.models import layers

SIZE = 299
SPATIAL_CHANNELS = 7
# Feature -> its width. The first are means over the image: after each of the two pools of the stem, before block D, and at the end.
# 'spatial' has the 17 x 17 places of 7 channels, which sFID compares (Nash et al. 2021, arXiv:2103.03841).
FEATURES = {
    "64": 64,
    "192": 192,
    "spatial": 17 * 17 * SPATIAL_CHANNELS,
    "768": 768,
    "2048": 2048,
    "logits_unbiased": 1008,
    "logits": 1008,
}


def resize(x: jax.Array, size: int = SIZE) -> jax.Array:
    """f32[B, H, W, C] -> f32[B, size, size, C] as TensorFlow 1's resize_bilinear(align_corners=False), rows last."""

    def neighbours(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = at.astype(np.int32)
        return low, np.minimum(low + 1, length - 1), at - low.astype(np.float32)

    low_y, high_y, dy = neighbours(x.shape[1])
    low_x, high_x, dx = neighbours(x.shape[2])
    rows = x[:, :, low_x] + (x[:, :, high_x] - x[:, :, low_x]) * dx[:, None]
    return rows[:, low_y] + (rows[:, high_y] - rows[:, low_y]) * dy[:, None, None]


def preprocess(images: jax.Array) -> jax.Array:
    """u8[B, H, W, 3] of any size -> f32[B, 299, 299, 3] in [-1, 1): (x - 128) / 128 after the resize."""
    return (resize(images.astype(jnp.float32)) - 128.0) / 128.0


class Conv(nn.Module):
    """relu(conv(x) + bias); padding keeps the size unless `valid`."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = 0 if self.valid else tuple((k // 2, k // 2) for k in self.kernel)
        with jax.default_matmul_precision("highest"):
            return nn.relu(layers.Conv(self.features, self.kernel, self.stride, padding, name="conv")(x))


def average_pool(x: jax.Array) -> jax.Array:
    """f32[N, H, W, C] -> the same shape: means over 3 x 3 pixels, without the padding."""
    return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def reduce_pool(x: jax.Array) -> jax.Array:
    """f32[N, H, W, C] -> f32[N, (H - 1) // 2, (W - 1) // 2, C]: maxima over 3 x 3, stride 2."""
    return nn.max_pool(x, (3, 3), (2, 2))


def same_max_pool(x: jax.Array) -> jax.Array:
    """f32[N, H, W, C] -> the same shape: maxima over 3 x 3 (the last block of the published network has them)."""
    return nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, double 3x3 and a pooled branch."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        five = Conv(64, (5, 5), name="branch5x5_2")(Conv(48, name="branch5x5_1")(x))
        three = Conv(96, (3, 3), name="branch3x3dbl_2")(Conv(64, name="branch3x3dbl_1")(x))
        three = Conv(96, (3, 3), name="branch3x3dbl_3")(three)
        pooled = Conv(self.pool_features, name="branch_pool")(average_pool(x))
        return jnp.concatenate([Conv(64, name="branch1x1")(x), five, three, pooled], -1)


class BlockB(nn.Module):
    """35 -> 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        double = Conv(96, (3, 3), name="branch3x3dbl_2")(Conv(64, name="branch3x3dbl_1")(x))
        double = Conv(96, (3, 3), 2, True, name="branch3x3dbl_3")(double)
        return jnp.concatenate([Conv(384, (3, 3), 2, True, name="branch3x3")(x), double, reduce_pool(x)], -1)


class BlockC(nn.Module):
    """17 x 17: 7x7 factored into rows and columns, once and twice."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = Conv(self.width, (1, 7), name="branch7x7_2")(Conv(self.width, name="branch7x7_1")(x))
        single = Conv(192, (7, 1), name="branch7x7_3")(single)
        double = Conv(self.width, (7, 1), name="branch7x7dbl_2")(Conv(self.width, name="branch7x7dbl_1")(x))
        double = Conv(self.width, (7, 1), name="branch7x7dbl_4")(
            Conv(self.width, (1, 7), name="branch7x7dbl_3")(double)
        )
        double = Conv(192, (1, 7), name="branch7x7dbl_5")(double)
        pooled = Conv(192, name="branch_pool")(average_pool(x))
        return jnp.concatenate([Conv(192, name="branch1x1")(x), single, double, pooled], -1)


class BlockD(nn.Module):
    """17 -> 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = Conv(320, (3, 3), 2, True, name="branch3x3_2")(Conv(192, name="branch3x3_1")(x))
        seven = Conv(192, (1, 7), name="branch7x7x3_2")(Conv(192, name="branch7x7x3_1")(x))
        seven = Conv(192, (3, 3), 2, True, name="branch7x7x3_4")(Conv(192, (7, 1), name="branch7x7x3_3")(seven))
        return jnp.concatenate([three, seven, reduce_pool(x)], -1)


class BlockE(nn.Module):
    """8 x 8, with branches that split again. The last block of the network pools by maximum, which may have been a mistake."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def fan(x: jax.Array, row: str, column: str) -> list[jax.Array]:
            return [Conv(384, (1, 3), name=row)(x), Conv(384, (3, 1), name=column)(x)]

        three = Conv(384, name="branch3x3_1")(x)
        double = Conv(384, (3, 3), name="branch3x3dbl_2")(Conv(448, name="branch3x3dbl_1")(x))
        pooled = Conv(192, name="branch_pool")((same_max_pool if self.max_pool else average_pool)(x))
        branches = [Conv(320, name="branch1x1")(x)]
        branches += fan(three, "branch3x3_2a", "branch3x3_2b") + fan(double, "branch3x3dbl_3a", "branch3x3dbl_3b")
        return jnp.concatenate([*branches, pooled], -1)


class InceptionV3(nn.Module):
    """u8[B, H, W, 3] -> {name: f32[B, width]} for the names in `features`, which are keys of FEATURES.

    Layers after the last of them are not run. 'logits_unbiased' are the logits without the bias of the last layer; published inception
    scores are computed from these. Raises ValueError for an unknown name.
    """

    features: Sequence[str] = ("2048",)

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        names = set(self.features)
        if unknown := names - set(FEATURES):
            raise ValueError(f"unknown Inception features {sorted(unknown)}; there are {list(FEATURES)}")
        values: dict[str, jax.Array] = {}

        def done(name: str, value: jax.Array) -> bool:
            if name in names:
                values[name] = value
            return names == set(values)

        x = preprocess(images)
        x = Conv(32, (3, 3), 2, True, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), 1, True, name="Conv2d_2a_3x3")(x)
        x = reduce_pool(Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        if done("64", x.mean((1, 2))):
            return values
        x = Conv(80, name="Conv2d_3b_1x1")(x)
        x = reduce_pool(Conv(192, (3, 3), 1, True, name="Conv2d_4a_3x3")(x))
        if done("192", x.mean((1, 2))):
            return values
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_features, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160)):
            x = BlockC(width, name=name)(x)
        # The graph of 2015 counts its blocks from 'mixed' = Mixed_5b. So ADM's 'mixed_6/conv:0' is the 1 x 1 branch of Mixed_6d, which
        # is the first of the branches that are concatenated there. It is flattened as in ADM; the order does not change a distance.
        if done("spatial", x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)):
            return values
        x = BlockC(192, name="Mixed_6e")(x)
        if done("768", x.mean((1, 2))):
            return values
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(False, name="Mixed_7b")(x)
        x = BlockE(True, name="Mixed_7c")(x).mean((1, 2))
        if done("2048", x):
            return values
        kernel = self.param("fc_kernel", nn.initializers.lecun_normal(), (2048, 1008))
        bias = self.param("fc_bias", nn.initializers.zeros, (1008,))
        logits = jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)
        done("logits_unbiased", logits)
        done("logits", logits + bias)
        return values


def inputs(module: InceptionV3, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `__call__` for one image of `shape` (H, W, 3); see models.inputs."""
    return {"images": jax.ShapeDtypeStruct((1, *(shape or (8, 8, 3))), jnp.uint8)}
