"""A classifier of noisy data: the downward half of a diffusion U-Net with a pool of attention (Dhariwal & Nichol 2021, section 4.1).

    emb = MLP(embed(t));   conv -> levels of res-blocks, each halved into the next -> attention_pool -> logits

Their pool is that of CLIP (Radford et al. 2021): the mean of the last feature map is the query, it and the pixels are keys and values.
CLIP adds learned positions to these; here there are none, so that any resolution fits.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.embedding import TimestepMLP, timestep_embedding
from ldm_jax.models.layers import Conv, Dense, GroupNorm, default_init
from ldm_jax.models.resblock import ResBlock
from ldm_jax.models.spatial_attention import AttentionBlock, MultiHead


class NoisyClassifier(nn.Module):
    """module(x f32[B, H, W, in_channels], t f32[B], train) -> logits f32[B, num_classes].

    t is the time input of a process, best in 0..999. A level has `layers_per_block` res-blocks of `block_out_channels` channels. The
    last `attention_levels` levels attend to their pixels after each res-block, with heads of `attention_head_dim` channels. This
    number divides the channels of each such level and of the last one. Raises ValueError for an image that does not halve evenly,
    and for options that do not divide.
    """

    num_classes: int = 10
    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (64, 128, 128)
    layers_per_block: int = 2
    attention_levels: int = 2
    attention_head_dim: int = 64
    norm_num_groups: int = 32
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, t: Array, train: bool = False) -> Array:
        widths = self.block_out_channels
        factor = 2 ** (len(widths) - 1)
        if x.ndim != 4 or x.shape[-1] != self.in_channels or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"NoisyClassifier: x is {x.shape}, expected [B, H, W, {self.in_channels}] with H and W multiples of {factor}"
            )
        for width in widths:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide block_out_channels {width}")
        if widths[-1] % self.attention_head_dim:
            raise ValueError(f"attention_head_dim {self.attention_head_dim} does not divide {widths[-1]} channels")

        def resnet(width: int, name: str, resample: str = "none") -> ResBlock:
            options = {"time_scale_shift": "scale_shift", "resample": resample, "dropout": self.dropout}
            return ResBlock(width, self.norm_num_groups, zero_init=True, dtype=self.dtype, name=name, **options)

        emb = TimestepMLP(4 * widths[0], dtype=self.dtype, kernel_init=default_init, name="time_embedding")(
            timestep_embedding(t, widths[0])
        )
        h = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            for j in range(self.layers_per_block):
                h = resnet(width, f"level_{i}_resnet_{j}")(h, emb, train)
                if i >= len(widths) - self.attention_levels:
                    name = f"level_{i}_attention_{j}"
                    attend = AttentionBlock(
                        self.attention_head_dim, self.norm_num_groups, zero_init=True, dtype=self.dtype, name=name
                    )
                    h = attend(h)
            if i < len(widths) - 1:
                h = resnet(width, f"level_{i}_down", "down")(h, emb, train)
        h = GroupNorm(self.norm_num_groups, act="silu", name="norm_out")(h)
        rows = h.reshape(len(h), -1, widths[-1])
        query = jnp.mean(rows.astype(jnp.float32), 1, keepdims=True).astype(rows.dtype)
        heads = widths[-1] // self.attention_head_dim
        pool = MultiHead(heads, self.attention_head_dim, widths[-1], True, dtype=self.dtype, name="pool")
        pooled = pool(query, jnp.concatenate([query, rows], 1))[:, 0]
        return Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(pooled.astype(jnp.float32))


def inputs(module: NoisyClassifier, shape: tuple[int, ...] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `__call__` for one item of `shape` (H, W, C); see models.inputs."""
    side = 2 ** (len(module.block_out_channels) - 1)
    x = jax.ShapeDtypeStruct((1, *(shape or (side, side, module.in_channels))), jnp.float32)
    return {"x": x, "t": jax.ShapeDtypeStruct((1,), jnp.float32)}
