"""A small trainable text encoder: a pre-norm transformer over tokens, for runs without pretrained weights.

It has learned positions, attention in both directions that masks padding, and a final LayerNorm. The default vocabulary of 259 tokens
is the bytes, padding, and the marks of the beginning and the end.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models.dit import MLP, Attention


class TextEncoder(nn.Module):
    """tokens i32[B, L], L <= length -> {'text': f32[B, L, width], 'text_mask': bool[B, L]}; the mask is tokens != pad_id.

    Padding does not change the states of other tokens. A prompt that is all padding gives finite values, with a mask of False. The
    states at padded positions are zero. Raises ValueError for longer prompts, and for a width that `heads` does not divide.
    """

    vocab_size: int = 259
    length: int = 64
    pad_id: int = 0
    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> dict[str, jax.Array]:
        if tokens.ndim != 2 or tokens.shape[1] > self.length:
            raise ValueError(f"TextEncoder: tokens are {tokens.shape}; expected [B, L] with L <= {self.length}")
        if self.width % self.heads:
            raise ValueError(f"TextEncoder: width {self.width} is not a multiple of heads {self.heads}")
        mask = tokens != self.pad_id
        normal = nn.initializers.normal(0.02)
        x = self.param("token", normal, (self.vocab_size, self.width), jnp.float32)
        x = jnp.take(x, tokens, axis=0)
        x = x + self.param("position", normal, (self.length, self.width), jnp.float32)[: tokens.shape[1]]
        for i in range(self.depth):
            y = nn.LayerNorm(name=f"norm_1_{i}")(x)
            x = x + Attention(self.heads, dtype=self.dtype, name=f"attention_{i}")(y, mask=mask)
            y = nn.LayerNorm(name=f"norm_2_{i}")(x)
            x = x + MLP(int(self.width * self.mlp_ratio), self.width, dtype=self.dtype, name=f"mlp_{i}")(y)
        x = nn.LayerNorm(name="norm")(x).astype(jnp.float32)
        return {"text": jnp.where(mask[..., None], x, 0.0), "text_mask": mask}


def inputs(module: TextEncoder, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `__call__` for one prompt of `shape` (L,); see models.inputs."""
    return {"tokens": jax.ShapeDtypeStruct((1, *(shape or (1,))), jnp.int32)}
