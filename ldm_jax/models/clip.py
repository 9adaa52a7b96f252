"""CLIP: a text and a vision transformer whose projections meet in one space (Radford et al. 2021, arXiv:2103.00020, fig. 3).

Both towers are stacks of one pre-norm block (section 2.4; it is that of GPT-2, Radford et al. 2019), with causal attention in the text:

    x <- x + W_o attention(norm_1(x)),    x <- x + W_2 act(W_1 norm_2(x)),    act quick_gelu(u) = u sigmoid(1.702 u), or gelu

    text     tokens + positions -> blocks -> norm;      pooled: the state at the end token, the only one that attends to all tokens
    vision   [class, patches] + positions -> norm -> blocks;      pooled: norm of the state of the class token
    logits   exp(logit_scale) <text, image>, both projected and of length 1

hidden_states[0] is the input of the first block, hidden_states[i] the output of block i. These are N + 1 states, without the norm that
follows the blocks. Stable Diffusion 1 and 2 condition on last_hidden_state, where `skip` leaves out the last blocks. SDXL conditions on
hidden_states[-2] without a norm (Podell et al. 2023, section 2.1) and on text_embeds, IP-Adapter on image_embeds or on
hidden_states[-2] of the vision tower. Under jit nothing is computed for results that the caller does not use. The residual stream and
all results are f32; the linear layers and the attention run in `dtype`. The names of parameters follow transformers' CLIPModel.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.kernels.attention import attention
from ldm_jax.models.layers import Conv, Dense

ACTIVATIONS = {
    "quick_gelu": lambda u: u * jax.nn.sigmoid(1.702 * u),
    "gelu": lambda u: jax.nn.gelu(u, approximate=False),
}
normal = nn.initializers.normal(0.02)


class TextOutput(NamedTuple):
    """The result of CLIPText, f32; D = hidden_size.

    last_hidden_state  [B, L, D]  final_layer_norm(hidden_states[-(skip + 1)])
    pooled             [B, D]     the state of the end token after all blocks and the final norm, whatever `skip` is
    text_embeds        [B, P]     pooled projected, not normalised; None without projection_dim
    hidden_states      N + 1 of [B, L, D], without the final norm
    """

    last_hidden_state: Array
    pooled: Array
    text_embeds: Array | None
    hidden_states: tuple[Array, ...]


class VisionOutput(NamedTuple):
    """The result of CLIPVision, f32; S = 1 + patches: the class token first, then the patches row by row.

    last_hidden_state  [B, S, D]  hidden_states[-1], without the last norm, which applies to the class token only
    pooled             [B, D]     post_layernorm(last_hidden_state[:, 0])
    image_embeds       [B, P]     pooled projected, not normalised; None without projection_dim
    hidden_states      N + 1 of [B, S, D]
    """

    last_hidden_state: Array
    pooled: Array
    image_embeds: Array | None
    hidden_states: tuple[Array, ...]


class CLIPOutput(NamedTuple):
    """The result of CLIP: logits_per_image [I, T] and its transpose; embeddings [T, P] and [I, P] of length 1; both towers' results."""

    logits_per_image: Array
    logits_per_text: Array
    text_embeds: Array
    image_embeds: Array
    text: TextOutput
    vision: VisionOutput


def normalise(x: Array) -> Array:
    """x[..., P] / |x|. The CLIP score (Hessel et al. 2021) is the inner product of two of these."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def layer_norm(eps: float, name: str) -> nn.LayerNorm:
    """A layer norm in f32. Its variance takes two passes: E[x^2] - E[x]^2 loses its digits where |mean| >> std."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=jnp.float32, name=name)


def embed(count: int, width: int, name: str, index: Array) -> Array:
    """Rows `index` of a table [count, width], f32. The rows are cast after the look-up, which does not change a table in bf16."""
    return nn.Embed(count, width, embedding_init=normal, name=name)(index).astype(jnp.float32)


class Block(nn.Module):
    """One block, as in the module docstring: x f32[B, T, D] -> f32[B, T, D]; mask bool[B or 1, T, T] or None."""

    heads: int
    intermediate_size: int
    hidden_act: str
    eps: float
    dtype: str
    implementation: str

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"CLIP: hidden_size {width} is not a multiple of num_attention_heads {self.heads}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"CLIP: hidden_act is {self.hidden_act!r}; expected one of {sorted(ACTIVATIONS)}")

        def dense(name: str, features: int, inputs: Array) -> Array:
            return Dense(features, dtype=self.dtype, name=name)(inputs)

        y = layer_norm(self.eps, "layer_norm1")(x)
        q, k, v = (dense(f"{n}_proj", width, y).reshape(*x.shape[:2], self.heads, -1) for n in "qkv")
        y = attention(q, k, v, mask, implementation=self.implementation).reshape(x.shape)
        x = x + dense("out_proj", width, y)
        y = dense("fc1", self.intermediate_size, layer_norm(self.eps, "layer_norm2")(x))
        return x + dense("fc2", width, ACTIVATIONS[self.hidden_act](y))


def through_blocks(tower: nn.Module, x: Array, mask: Array | None, implementation: str) -> tuple[Array, ...]:
    """The states before and after each of the tower's blocks `layers_{i}`: num_hidden_layers + 1 of x f32[B, T, D]."""
    states = [x]
    for i in range(tower.num_hidden_layers):
        block = Block(
            tower.num_attention_heads,
            tower.intermediate_size,
            tower.hidden_act,
            tower.layer_norm_eps,
            tower.dtype,
            implementation,
            name=f"layers_{i}",
        )
        states.append(block(states[-1], mask))
    return tuple(states)


class CLIPText(nn.Module):
    """tokens i32[B, L], L <= max_position_embeddings -> TextOutput.

    skip: how many of the last blocks last_hidden_state leaves out (Stable Diffusion's clip_skip), 0..num_hidden_layers.
    mask: bool or 0/1 [B, L], False for a token that no other token may attend to. The published diffusion models have no mask.
    eos_token_id: pooled is the state of the first token equal to it. Old configs have 2, which was never the end token of a
        vocabulary. It means the largest token of the row: in CLIP's vocabulary the end token is the largest one.
    projection_dim: width of text_embeds; None: there are none. A token outside the vocabulary gives NaN.

    Raises ValueError on tokens, skip or mask of the wrong shape or range.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: Array, skip: int = 0, mask: Array | None = None) -> TextOutput:
        self._check(tokens, skip, mask)
        length = tokens.shape[1]
        x = embed(self.vocab_size, self.hidden_size, "token_embedding", tokens)
        x = x + embed(self.max_position_embeddings, self.hidden_size, "position_embedding", jnp.arange(length))
        visible = jnp.tril(jnp.ones((1, length, length), bool))
        if mask is not None:
            visible = visible & mask.astype(bool)[:, None]
        # Not 'auto': with a mask, cuDNN's attention has no backward pass for an odd number of tokens, such as 77.
        states = through_blocks(self, x, visible, "einsum")
        norm = layer_norm(self.layer_norm_eps, "final_layer_norm")
        last = norm(states[-1])
        end = jnp.argmax(tokens if self.eos_token_id == 2 else tokens == self.eos_token_id, axis=1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        embeds = None
        if self.projection_dim is not None:
            embeds = Dense(self.projection_dim, False, self.dtype, name="text_projection")(pooled).astype(jnp.float32)
        return TextOutput(norm(states[-1 - skip]) if skip else last, pooled, embeds, states)

    def _check(self, tokens: Array, skip: int, mask: Array | None) -> None:
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.max_position_embeddings:
            raise ValueError(f"CLIPText: tokens are {tokens.shape}; expected [B, 1..{self.max_position_embeddings}]")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"CLIPText: tokens are {tokens.dtype}; expected integers")
        if not 0 <= skip <= self.num_hidden_layers:
            raise ValueError(f"CLIPText: skip is {skip}; expected 0..{self.num_hidden_layers}")
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"CLIPText: mask is {mask.shape}; expected the tokens' {tokens.shape}")


class CLIPVision(nn.Module):
    """pixel_values f32[B, image_size, image_size, C], normalised by the mean and deviation of CLIP's images -> VisionOutput.

    Patches have patch_size pixels a side; pixels on the right and below that fill no patch are ignored. projection_dim: width of
    image_embeds; None: there are none. Raises ValueError for images of another shape: the positions are learned for one size.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, pixel_values: Array) -> VisionOutput:
        expected = (self.image_size, self.image_size, self.num_channels)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(f"CLIPVision: pixel_values are {pixel_values.shape}; expected [B, {str(expected)[1:-1]}]")
        batch, width = pixel_values.shape[0], self.hidden_size
        x = Conv(width, self.patch_size, self.patch_size, 0, False, self.dtype, normal, name="patch_embedding")(
            pixel_values
        )
        x = x.reshape(batch, -1, width).astype(jnp.float32)
        first = self.param("class_embedding", nn.initializers.normal(width**-0.5), (width,), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(first.astype(jnp.float32), (batch, 1, width)), x], axis=1)
        x = x + embed(x.shape[1], width, "position_embedding", jnp.arange(x.shape[1]))
        # 'layrnorm' is the spelling of the published files.
        x = layer_norm(self.layer_norm_eps, "pre_layrnorm")(x)
        states = through_blocks(self, x, None, "auto")
        pooled = layer_norm(self.layer_norm_eps, "post_layernorm")(states[-1][:, 0])
        embeds = None
        if self.projection_dim is not None:
            embeds = Dense(self.projection_dim, False, self.dtype, name="visual_projection")(pooled).astype(jnp.float32)
        return VisionOutput(states[-1], pooled, embeds, states)


class CLIP(nn.Module):
    """Both towers, with projections of one width, and the logarithm of the scale of their logits.

    apply(..., tokens, pixel_values, mask=None) -> CLIPOutput for T texts and I images. For one tower, normalised:
    apply(..., tokens, mask, method='embed_text') -> f32[T, P], apply(..., pixel_values, method='embed_image') -> f32[I, P].
    Raises ValueError when the widths of the projections are None or differ.
    """

    text: CLIPText
    vision: CLIPVision
    logit_scale_init_value: float = 2.6592

    def setup(self) -> None:
        widths = self.text.projection_dim, self.vision.projection_dim
        if widths[0] is None or widths[0] != widths[1]:
            raise ValueError(f"CLIP: projection_dim of text and vision are {widths}; expected one width for both")
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.logit_scale_init_value), ())

    def __call__(self, tokens: Array, pixel_values: Array, mask: Array | None = None) -> CLIPOutput:
        text, vision = self.text(tokens, mask=mask), self.vision(pixel_values)
        text_embeds, image_embeds = normalise(text.text_embeds), normalise(vision.image_embeds)
        logits = jnp.exp(self.logit_scale.astype(jnp.float32)) * (text_embeds @ image_embeds.T)
        return CLIPOutput(logits.T, logits, text_embeds, image_embeds, text, vision)

    def embed_text(self, tokens: Array, mask: Array | None = None) -> Array:
        return normalise(self.text(tokens, mask=mask).text_embeds)

    def embed_image(self, pixel_values: Array) -> Array:
        return normalise(self.vision(pixel_values).image_embeds)


def text_inputs(module: CLIPText, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of CLIPText for one prompt of `shape` (L,); see models.inputs."""
    return {"tokens": jax.ShapeDtypeStruct((1, *(shape or (1,))), jnp.int32)}


def vision_inputs(module: CLIPVision, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of CLIPVision for one image of `shape` (H, W, C), which its options fix; see models.inputs."""
    shape = shape or (module.image_size, module.image_size, module.num_channels)
    return {"pixel_values": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}


def inputs(module: CLIP, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of CLIP for one prompt of `shape` (L,) and one image; see models.inputs."""
    return text_inputs(module.text, shape) | vision_inputs(module.vision)
