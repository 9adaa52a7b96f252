"""A small residual classifier for images of about 32 x 32. It is fast on a CPU, and gives the features of `fd_classifier`.

    stem (4 x 4 patches at stride 2) -> for each width: [3 x 3 convolution, pool to half], residual block -> mean and max pool

It follows the "ResNet-9" family of fast CIFAR-10 networks: for each width one transition and one residual block of two convolutions. It
has group norm in place of batch norm, so that there is no mutable state and rows of a batch do not depend on one another. The stem
halves the resolution at once, because layers at 32 x 32 would be costly.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.kernels.conv import average_pool
from ldm_jax.models.layers import Conv, Dense, GroupNorm

he_init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class Classifier(nn.Module):
    """module(x f32[B, H, W, C] in [-1, 1], train) -> (logits f32[B, num_classes], features f32[B, 2 widths[-1]]).

    H and W must be multiples of 2 ** len(widths). The features are the mean and the maximum over space before the last layer. `widths`
    are the channels of the levels; `logit_scale` multiplies the logits; `dropout` is the rate on the features.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (48, 96, 192)
    norm_num_groups: int = 8
    logit_scale: float = 1.0
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        factor = 2 ** len(self.widths)
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"Classifier: x is {x.shape}, expected [B, H, W, C] with H and W multiples of {factor}")
        for width in self.widths:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide widths {width}")

        def layer(h: Array, width: int, name: str) -> Array:
            h = Conv(width, use_bias=False, dtype=self.dtype, kernel_init=he_init, name=name)(h)
            return GroupNorm(self.norm_num_groups, act="gelu", name=f"{name}_norm")(h)

        h = Conv(self.widths[0], 4, 2, 1, dtype=self.dtype, kernel_init=he_init, name="stem")(x)
        h = GroupNorm(self.norm_num_groups, act="gelu", name="stem_norm")(h)
        for i, width in enumerate(self.widths):
            if i > 0:
                h = average_pool(layer(h, width, f"widen_{i}"))
            h = h + layer(layer(h, width, f"residual_{i}_a"), width, f"residual_{i}_b")
        h = h.astype(jnp.float32)
        features = jnp.concatenate([h.mean((1, 2)), h.max((1, 2))], -1)
        rows = nn.Dropout(self.dropout, deterministic=not train)(features)
        logits = Dense(self.num_classes, name="head")(rows)
        return logits * self.logit_scale, features


def inputs(module: Classifier, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `__call__` for one image of `shape` (H, W, C); see models.inputs. Without `shape`, C is 3."""
    side = 2 ** len(module.widths)
    return {"x": jax.ShapeDtypeStruct((1, *(shape or (side, side, 3))), jnp.float32)}
