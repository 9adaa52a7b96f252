"""DINOv2: a vision transformer trained without labels (Oquab et al. 2023, arXiv:2304.07193), with registers or without (Darcet et al.
2023, arXiv:2309.16588).

It is a stack of pre-norm blocks. A factor l = layer_scale for each channel scales each branch (Touvron et al. 2021, arXiv:2103.17239,
eq. 7):

    x <- x + l_1 W_o attention(norm_1(x)),    x <- x + l_2 f(norm_2(x))
    f(u) = W_2 gelu(W_1 u),    or SwiGLU in the giant model (Shazeer 2020, arXiv:2002.05202, eq. 6): W_3 (silu(W_1 u) * W_2 u)

    [class, patches] + positions -> [class, registers, patches] -> blocks -> norm;    pooled: the class token

Positions are learned on a square grid. For a picture of another size the grid is resized, in one of two published ways:

    without registers   bicubic with a = -3/4, not antialiased, edges repeated. transformers maps the grid onto n patches; the original
                        code of DINOv2, with which it was evaluated, maps it onto n + 0.1 (`interpolate_offset`)
    with registers      bicubic with a = -1/2, antialiased, as jax.image.resize does

The residual stream and all results are f32; the linear layers and the attention run in `dtype`. The names of parameters follow
transformers' Dinov2Model.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.kernels.attention import attention
from ldm_jax.models.clip import layer_norm
from ldm_jax.models.layers import Conv, Dense

init = nn.initializers.truncated_normal(0.02)


class Dinov2Output(NamedTuple):
    """The result of Dinov2, f32; S = 1 + registers + patches: the class token, the registers, the patches row by row.

    last_hidden_state  [B, S, D]  after the last norm
    pooled             [B, D]     last_hidden_state[:, 0]
    hidden_states      N + 1 of [B, S, D]: the input of the first block and the output of each, without the last norm
    """

    last_hidden_state: Array
    pooled: Array
    hidden_states: tuple[Array, ...]


def bicubic(length: int, n: int, offset: float = 0.0, a: float = -0.75) -> np.ndarray:
    """The matrix f32[n, length] that resizes a row of `length` numbers to n by cubic convolution (Keys 1981, eq. 4).

    Output i lies at (i + 1/2) length / (n + offset) - 1/2. Edges are repeated, and a reduction is not smoothed.
    """
    place = (np.arange(n) + 0.5) * length / (n + offset) - 0.5
    taps = np.floor(place).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(place[:, None] - taps)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    matrix = np.zeros((n, length), np.float32)
    np.add.at(matrix, (np.arange(n)[:, None], np.clip(taps, 0, length - 1)), np.where(d <= 1, near, far))
    return matrix


class Block(nn.Module):
    """One block, as in the module docstring: x f32[B, S, D] -> f32[B, S, D]. ValueError where the heads do not divide D."""

    heads: int
    mlp_ratio: int
    qkv_bias: bool
    use_swiglu_ffn: bool
    layerscale_value: float
    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"Dinov2: hidden_size {width} is not a multiple of num_attention_heads {self.heads}")

        def dense(name: str, features: int, inputs: Array, bias: bool = True) -> Array:
            return Dense(features, bias, self.dtype, init, name=name)(inputs)

        def scaled(name: str, branch: Array) -> Array:
            return branch * self.param(name, nn.initializers.constant(self.layerscale_value), (width,), jnp.float32)

        y = layer_norm(self.eps, "norm1")(x)
        q, k, v = (dense(f"{n}_proj", width, y, self.qkv_bias).reshape(*x.shape[:2], self.heads, -1) for n in "qkv")
        x = x + scaled("layer_scale1", dense("o_proj", width, attention(q, k, v).reshape(x.shape)))
        y = layer_norm(self.eps, "norm2")(x)
        hidden = width * self.mlp_ratio
        if self.use_swiglu_ffn:
            # Two thirds of the width, so that three matrices have as many parameters as two; rounded up to a multiple of 8.
            hidden = -(-(2 * hidden // 3) // 8) * 8
            gate, value = jnp.split(dense("weights_in", 2 * hidden, y), 2, axis=-1)
            y = dense("weights_out", width, nn.silu(gate) * value)
        else:
            y = dense("fc2", width, jax.nn.gelu(dense("fc1", hidden, y), approximate=False))
        return x + scaled("layer_scale2", y)


class Dinov2(nn.Module):
    """pixel_values f32[B, H, W, C], normalised by ImageNet's mean and deviation -> Dinov2Output.

    Patches have patch_size pixels a side; pixels on the right and below that fill no patch are ignored. `mask` bool[B, patches] is True
    where the mask token replaces a patch, as in training with iBOT's loss; with use_mask_token False there is no such token.

    image_size: the side, in pixels, for which positions are learned. num_register_tokens: None for Dinov2Model, a number for
    Dinov2WithRegistersModel. interpolate_offset: 0 as in transformers, 0.1 as in the original code; it has no effect with registers.
    Raises ValueError for images or a mask of the wrong shape.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    num_register_tokens: int | None = None
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    layerscale_value: float = 1.0
    layer_norm_eps: float = 1e-6
    interpolate_offset: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, pixel_values: Array, mask: Array | None = None) -> Dinov2Output:
        patch, width, size = self.patch_size, self.hidden_size, pixel_values.shape[1:3]
        if pixel_values.ndim != 4 or pixel_values.shape[-1] != self.num_channels or min(size) < patch:
            expected = f"[B, H, W, {self.num_channels}] with H, W >= {patch}"
            raise ValueError(f"Dinov2: pixel_values are {pixel_values.shape}; expected {expected}")
        x = Conv(width, patch, patch, 0, True, self.dtype, init, name="patch_embedding")(pixel_values)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, -1, width).astype(jnp.float32)
        if self.use_mask_token:
            token = self.param("mask_token", nn.initializers.zeros, (1, width), jnp.float32)
        if mask is not None:
            if not self.use_mask_token or mask.shape != x.shape[:2]:
                expected = x.shape[:2] if self.use_mask_token else "none, for use_mask_token is False"
                raise ValueError(f"Dinov2: mask is {mask.shape}; expected {expected}")
            x = jnp.where(mask[..., None], token.astype(jnp.float32), x)

        def repeated(name: str, initializer: nn.initializers.Initializer, count: int) -> Array:
            tokens = self.param(name, initializer, (1, count, width), jnp.float32).astype(jnp.float32)
            return jnp.broadcast_to(tokens, (batch, count, width))

        side = self.image_size // patch
        places = self.param("position_embeddings", init, (1, 1 + side * side, width), jnp.float32).astype(jnp.float32)[
            0
        ]
        first = repeated("cls_token", init, 1) + places[0]
        x = x + self._resized(places[1:].reshape(side, side, width), rows, columns).reshape(-1, width)
        if self.num_register_tokens is not None:
            first = jnp.concatenate(
                [first, repeated("register_tokens", nn.initializers.zeros, self.num_register_tokens)], axis=1
            )
        states = [jnp.concatenate([first, x], axis=1)]
        for i in range(self.num_hidden_layers):
            block = Block(
                self.num_attention_heads,
                self.mlp_ratio,
                self.qkv_bias,
                self.use_swiglu_ffn,
                self.layerscale_value,
                self.layer_norm_eps,
                self.dtype,
                name=f"layers_{i}",
            )
            states.append(block(states[-1]))
        last = layer_norm(self.layer_norm_eps, "layernorm")(states[-1])
        return Dinov2Output(last, last[:, 0], tuple(states))

    def _resized(self, grid: Array, rows: int, columns: int) -> Array:
        """Positions f32[n, n, D] -> f32[rows, columns, D], resized as the module docstring says."""
        side, exact = grid.shape[0], jax.lax.Precision.HIGHEST
        if (rows, columns) == (side, side):
            return grid
        if self.num_register_tokens is not None:
            return jax.image.resize(grid, (rows, columns, grid.shape[-1]), "cubic", precision=exact)
        down, across = (bicubic(side, n, self.interpolate_offset) for n in (rows, columns))
        return jnp.einsum("ri,ijd,cj->rcd", down, grid, across, precision=exact)


def inputs(module: Dinov2, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `__call__` for one image of `shape` (H, W, C); see models.inputs."""
    shape = shape or (module.image_size, module.image_size, module.num_channels)
    return {"pixel_values": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}
