"""Attention over the pixels of a feature map: the plain block of DDPM and ADM, and the transformer of Stable Diffusion.

    AttentionBlock      y = (x + W_o attention(norm(x))) / rescale          (Ho et al. 2020, appendix B)
    SpatialTransformer  y = x + W_out blocks(W_in norm(x))                  (Rombach et al. 2022, appendix E.2.1)

A block of the transformer is self-attention, then cross-attention to the text, then a feed-forward network with GEGLU; each has a norm
before it and is added to its input. Cross-attention may attend to further states beside the text (IP-Adapter: Ye et al. 2023,
arXiv:2308.06721, eq. 5):

    attention(q, k, v) + sum_i scale_i attention(q, k_i, v_i),    before W_o

Parameter names follow diffusers' Attention, Transformer2DModel and BasicTransformerBlock.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.kernels.attention import attention
from ldm_jax.models.layers import Dense, GroupNorm, default_init


class KeyValues(NamedTuple):
    """Keys and values of a cross-attention beside those of the text, [B, S, heads head_dim] each; each query attends to all of them.

    `scale` multiplies the result of this attention: f32[B], or f32[B, T] with one number for each place of the feature map.
    """

    key: Array
    value: Array
    scale: Array


class MultiHead(nn.Module):
    """Attention of x[B, T, C] to context[B, S, D] (None: to x) and to `more`, with `heads` heads of `head_dim` channels."""

    heads: int
    head_dim: int
    features: int
    qkv_bias: bool = False
    zero_init: bool = False
    dtype: str = "float32"
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None = None, mask: Array | None = None, more: Sequence[KeyValues] = ()
    ) -> Array:
        context = x if context is None else context
        inner = self.heads * self.head_dim

        def by_head(y: Array) -> Array:
            return y.reshape(*y.shape[:2], self.heads, self.head_dim)

        def project(name: str, inputs: Array) -> Array:
            return by_head(Dense(inner, self.qkv_bias, dtype=self.dtype, kernel_init=default_init, name=name)(inputs))

        q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
        y = attention(q, k, v, mask=mask, implementation=self.implementation)
        for key, value, scale in more:
            k, v = (by_head(states.astype(q.dtype)) for states in (key, value))
            seen = attention(q, k, v, implementation=self.implementation)
            y = y + scale.reshape(scale.shape[0], -1, 1, 1).astype(y.dtype) * seen
        init = nn.initializers.zeros if self.zero_init else default_init
        return Dense(self.features, dtype=self.dtype, kernel_init=init, name="to_out")(y.reshape(*x.shape[:2], inner))


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels of x[B, H, W, C]. With `groups=0` there is no norm; with None GroupNorm chooses."""

    head_dim: int
    groups: int | None = 32
    eps: float = 1e-5
    rescale: float = 1.0
    zero_init: bool = False
    dtype: str = "float32"
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        if self.head_dim < 1 or c % self.head_dim:
            raise ValueError(f"attention_head_dim {self.head_dim} does not divide the {c} channels of its level")
        rows = x.reshape(b, h * w, c)
        if self.groups != 0:
            rows = GroupNorm(self.groups, self.eps, name="group_norm")(rows)
        heads = c // self.head_dim
        y = MultiHead(heads, self.head_dim, c, True, self.zero_init, self.dtype, self.implementation, name="attn")(rows)
        y = x + y.reshape(x.shape)
        return y if self.rescale == 1.0 else y / self.rescale


class TransformerBlock(nn.Module):
    """attn1 (to x itself), attn2 (to the text and `more`) and a GEGLU feed-forward network on x[B, T, C], each after a norm.

    `only_cross` makes attn1 a cross-attention to the text.
    """

    heads: int
    head_dim: int
    only_cross: bool = False
    dtype: str = "float32"
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Array, text: Array, mask: Array | None, more: Sequence[KeyValues] = ()) -> Array:
        c = x.shape[-1]

        def norm(name: str, rows: Array) -> Array:
            # The variance takes two passes: E[x^2] - E[x]^2 loses its digits where |mean| >> std.
            return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(rows).astype(rows.dtype)

        def attend(name: str, rows: Array, *to) -> Array:
            block = MultiHead(
                self.heads, self.head_dim, c, dtype=self.dtype, implementation=self.implementation, name=name
            )
            return block(rows, *to)

        x = x + attend("attn1", norm("norm1", x), *((text, mask) if self.only_cross else (None, None)))
        x = x + attend("attn2", norm("norm2", x), text, mask, more)
        hidden = Dense(8 * c, dtype=self.dtype, kernel_init=default_init, name="ff_in")(norm("norm3", x))
        value, gate = jnp.split(hidden, 2, axis=-1)
        hidden = value * jax.nn.gelu(gate, approximate=False)
        return x + Dense(c, dtype=self.dtype, kernel_init=default_init, name="ff_out")(hidden)


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels of x[B, H, W, C], conditioned on text[B, L, D], mask bool[B, L] or None.

    `more` holds further keys and values for the cross-attention of single blocks, under 'transformer_blocks_{i}'.
    `scan_layers` runs the blocks as one `nn.scan`: parameters get a leading layer axis, and the compile time does not grow with the
    depth. `remat` recomputes each block in the backward pass.
    """

    heads: int
    head_dim: int
    depth: int = 1
    groups: int = 32
    use_linear_projection: bool = False
    only_cross: bool = False
    zero_init: bool = False
    remat: bool = False
    scan_layers: bool = False
    dtype: str = "float32"
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Array,
        text: Array,
        mask: Array | None = None,
        more: Mapping[str, Sequence[KeyValues]] = {},
    ) -> Array:
        b, h, w, c = x.shape
        inner = self.heads * self.head_dim
        rows = GroupNorm(self.groups, 1e-6, name="norm")(x).reshape(b, h * w, c)
        # use_linear_projection changes the shape of the published kernels ([1, 1, I, O] or [I, O]), but not what is computed.
        rows = Dense(inner, dtype=self.dtype, kernel_init=default_init, name="proj_in")(rows)
        options = (self.heads, self.head_dim, self.only_cross, self.dtype, self.implementation)
        blocks = [f"transformer_blocks_{i}" for i in range(self.depth)]
        if self.scan_layers and self.depth > 1:
            if more and (set(more) != set(blocks) or len({len(more[name]) for name in blocks}) > 1):
                raise ValueError(
                    f"SpatialTransformer: key_values are for {', '.join(more)}; with scan_layers expected as many for each of "
                    f"{self.depth} blocks"
                )
            # Without further keys the scan gets no such argument, and compiles to the same program as before there was one.
            stacked = (
                (jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tuple(more[n]) for n in blocks)),) if more else ()
            )
            inside = nn.remat(TransformerBlock, prevent_cse=False) if self.remat else TransformerBlock
            scanned = nn.scan(
                lambda block, carry, *fixed: (block(carry, *fixed), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, *(0 for _ in stacked)),
                length=self.depth,
            )
            rows, _ = scanned(inside(*options, name="transformer_blocks"), rows, text, mask, *stacked)
        else:
            kind = nn.remat(TransformerBlock) if self.remat else TransformerBlock
            for name in blocks:
                rows = kind(*options, name=name)(rows, text, mask, tuple(more.get(name, ())))
        init = nn.initializers.zeros if self.zero_init else default_init
        rows = Dense(c, dtype=self.dtype, kernel_init=init, name="proj_out")(rows)
        return x + rows.reshape(x.shape)
