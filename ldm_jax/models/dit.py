"""The diffusion transformer with adaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748, fig. 3), and PixArt-alpha's variant
with text (Chen et al. 2023, arXiv:2310.00426, fig. 4).

Patches of p x p pixels become tokens h. c is the embedding of t, plus that of the label and of the pooled text. Each block computes six
vectors (shift, scale and gate, twice) from c, and then

    h <- h + gate_1 * SelfAttention(norm(h) * (1 + scale_1) + shift_1)
    h <- h + CrossAttention(h, text)                                        only with text
    h <- h + gate_2 * MLP(norm(h) * (1 + scale_2) + shift_2)

With adaln 'block' (DiT) each block has a linear map from silu(c) to the six vectors. With adaln 'single' (PixArt) one map serves all
blocks, and each block adds a learned table. Gates and the last layer start at zero, so the output of a new network is 0. The residual
stream is f32, whatever `dtype` is; linear layers and attention run in `dtype`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.kernels.attention import attention
from ldm_jax.models.embedding import TimestepMLP, sincos_position_embedding, timestep_embedding
from ldm_jax.models.layers import Dense
from ldm_jax.models.rope import axial_angles, grid_positions, rotate

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()
TIME_FREQUENCIES = 256


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over the last axis in f32, without scale or bias."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x [B, T, D] * (1 + scale [B, D]) + shift [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head attention of x [B, T, D] to itself or to `context` [B, S, D].

    `angles` f32[T, D / num_heads / 2] rotate queries and keys (models/rope.py).

    Parameters: `qkv` (or `q` and `kv`) and `out`. The columns of a fused kernel are those of q, then of k, then of v, each ordered by
    head. `qk_norm` divides q and k of each head by their root mean square, and multiplies by a learned scale (Esser et al. 2024).
    """

    num_heads: int
    qk_norm: bool = False
    dtype: str = "float32"
    implementation: str = "auto"
    out_init: nn.initializers.Initializer = xavier

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        angles: jax.Array | None = None,
    ) -> jax.Array:
        width = x.shape[-1]

        def project(x, parts, name):
            y = Dense(parts * width, dtype=self.dtype, kernel_init=xavier, name=name)(x)
            y = y.reshape(*x.shape[:2], parts, self.num_heads, width // self.num_heads)
            return [y[:, :, i] for i in range(parts)]

        if context is None:
            q, k, v = project(x, 3, "qkv")
        else:
            (q,), (k, v) = project(x, 1, "q"), project(context, 2, "kv")
        if self.qk_norm:
            dtype = q.dtype
            q = nn.RMSNorm(epsilon=1e-6, name="q_norm")(q).astype(dtype)
            k = nn.RMSNorm(epsilon=1e-6, name="k_norm")(k).astype(dtype)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = attention(q, k, v, mask, implementation=self.implementation).reshape(x.shape)
        return Dense(width, dtype=self.dtype, kernel_init=self.out_init, name="out")(out)


class MLP(nn.Module):
    """Dense -> tanh-GELU -> Dense. Parameters linear_1, linear_2."""

    hidden: int
    features: int
    dropout: float = 0.0
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = xavier

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Dense(self.hidden, dtype=self.dtype, kernel_init=self.kernel_init, name="linear_1")(x)
        x = nn.Dropout(self.dropout, deterministic=self.dropout == 0)(nn.gelu(x, approximate=True))
        return Dense(self.features, dtype=self.dtype, kernel_init=self.kernel_init, name="linear_2")(x)


class Block(nn.Module):
    """One block, as in the module docstring: x f32[B, T, D] -> f32[B, T, D].

    The argument c is silu(c) f32[B, D] for adaln 'block', and the six vectors f32[B, 6 D] that all blocks share for 'single'. `dropout`
    is the rate that applies in this call: the caller sets 0 outside of training.
    """

    num_heads: int
    mlp_ratio: float
    adaln: str
    qk_norm: bool
    cross_norm: bool
    dropout: float
    norm_eps: float
    mlp_norm_eps: float
    dtype: str
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c: jax.Array,
        text: jax.Array | None,
        text_mask: jax.Array | None,
        angles: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        if self.adaln == "block":
            six = Dense(6 * width, dtype=self.dtype, kernel_init=zeros, name="adaln")(c).astype(jnp.float32)
        else:
            six = c + self.param("adaln_table", zeros, (6, width), jnp.float32).reshape(-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(six, 6, axis=-1)
        drop = nn.Dropout(self.dropout, deterministic=self.dropout == 0)

        y = modulate(layer_norm(x, self.norm_eps), shift_1, scale_1)
        y = Attention(self.num_heads, self.qk_norm, self.dtype, self.implementation, name="attention")(y, angles=angles)
        x = x + gate_1[:, None] * drop(y)
        if text is not None:
            y = layer_norm(x, self.norm_eps) if self.cross_norm else x
            y = Attention(self.num_heads, self.qk_norm, self.dtype, self.implementation, zeros, name="cross")(
                y, text, text_mask
            )
            x = x + drop(y)
        y = modulate(layer_norm(x, self.mlp_norm_eps), shift_2, scale_2)
        y = MLP(int(width * self.mlp_ratio), width, self.dropout, self.dtype, name="mlp")(y)
        # A pair, because nn.scan expects (carry, output).
        return x + gate_2[:, None] * drop(y), None


class DiT(nn.Module):
    """x f32[B, H, W, C], t f32[B], cond -> f32[B, H, W, out].

    t is on the scale of the embedding's frequencies (0..999). cond has exactly the entries that the network was built for: `label`
    i32[B] in 0..num_classes (num_classes is the null class) when num_classes > 0; `text` f32[B, L, text_dim] when text_dim > 0, with
    `text_mask` bool[B, L] if some of the text is padding. A row whose mask has no True has no text.

    in_channels, out_channels: out_channels None means in_channels. A network that learns the variance has twice as many.
    text_pooled: c also gets the mean of the text over the tokens that are not masked. PixArt does not have this, but short runs learn
        faster with it.
    cross_norm: normalise h before cross-attention. PixArt does not do so.
    pos_embed: 'sincos', with positions that are stretched to `pos_base` cells a side and divided by `pos_scale` (both matter only for
        published networks), or 'learned' for one grid of fixed size.
    rope_theta: above 0, queries and keys of self-attention are also rotated by the row and the column of their patch (models/rope.py).
        100 suits grids of 8 to 32 patches a side.
    embed_std: standard deviation of the initial weights that map time, label and text to c, and text to the context of cross-attention.
        DiT's 0.02 was made for a width of 1152. 0 stands for 1 / sqrt(fan_in). With 0.02 a network of width 128 starts with a c of
        about 0.03, and takes several times as long to learn its conditions.
    time_shift: downscale_freq_shift of the time embedding. mlp_norm_eps: 1e-5 in diffusers' port of DiT.
    remat: recompute each block in the backward pass. scan_layers: compile one block for all layers; their parameters are stacked under
        `blocks` with a leading layer axis (see stack_blocks). On a CPU it saves memory only together with remat.
    dtype: 'float32', or 'bfloat16' for computing in bf16 with parameters in f32. attention: see kernels/attention.py.

    Raises ValueError for a shape that does not divide into patches, a width that does not divide into heads, heads that rope cannot
    divide by four, and entries of cond that are missing or not used.
    """

    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    in_channels: int = 4
    out_channels: int | None = None
    num_classes: int = 0
    text_dim: int = 0
    text_pooled: bool = True
    adaln: str = "block"
    qk_norm: bool = False
    cross_norm: bool = False
    pos_embed: str = "sincos"
    pos_base: float = 0.0
    pos_scale: float = 1.0
    rope_theta: float = 0.0
    time_shift: float = 0.0
    norm_eps: float = 1e-6
    mlp_norm_eps: float = 1e-6
    dropout: float = 0.0
    embed_std: float = 0.02
    remat: bool = False
    scan_layers: bool = False
    dtype: str = "float32"
    attention: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, cond: dict[str, jax.Array] | None = None, train: bool = False
    ) -> jax.Array:
        cond = {} if cond is None else cond
        self._check(x, cond)
        p, width = self.patch_size, self.hidden_size
        batch, rows, columns = x.shape[0], x.shape[1] // p, x.shape[2] // p

        h = x.reshape(batch, rows, p, columns, p, self.in_channels).transpose(0, 1, 3, 2, 4, 5)
        h = h.reshape(batch, rows * columns, p * p * self.in_channels)
        h = Dense(width, dtype=self.dtype, kernel_init=xavier, name="patch")(h).astype(jnp.float32)
        h = h + self._position(rows, columns)

        embed = nn.initializers.normal(self.embed_std) if self.embed_std else nn.initializers.lecun_normal()
        c = TimestepMLP(width, dtype=self.dtype, kernel_init=embed, name="time")(
            timestep_embedding(t, TIME_FREQUENCIES, downscale_freq_shift=self.time_shift)
        ).astype(jnp.float32)
        text, text_mask = cond.get("text"), cond.get("text_mask")
        if self.num_classes:
            table = self.param(
                "label", nn.initializers.normal(self.embed_std or 1.0), (self.num_classes + 1, width), jnp.float32
            )
            # take, not []: with a label out of range the result is NaN, not that of the last class.
            c = c + jnp.take(table, cond["label"], axis=0)
        if text is not None:
            if self.text_pooled:
                c = c + TimestepMLP(width, dtype=self.dtype, kernel_init=embed, name="pooled")(
                    masked_mean(text, text_mask)
                )
            text = MLP(width, width, 0.0, self.dtype, embed, name="text")(text)

        final = c
        if self.adaln == "single":
            c = Dense(6 * width, dtype=self.dtype, kernel_init=zeros, name="adaln")(nn.silu(c)).astype(jnp.float32)
        else:
            c = nn.silu(c)
        h = self._blocks(h, c, text, text_mask, self._angles(rows, columns), train)

        if self.adaln == "single":
            final = (final[:, None] + self.param("final_table", zeros, (2, width), jnp.float32)).reshape(batch, -1)
        else:
            final = Dense(2 * width, dtype=self.dtype, kernel_init=zeros, name="final_adaln")(nn.silu(final))
        shift, scale = jnp.split(final.astype(jnp.float32), 2, axis=-1)
        h = modulate(layer_norm(h, self.norm_eps), shift, scale)
        out = self.out_channels or self.in_channels
        h = Dense(p * p * out, dtype=self.dtype, kernel_init=zeros, name="final")(h).astype(jnp.float32)
        h = h.reshape(batch, rows, columns, p, p, out).transpose(0, 1, 3, 2, 4, 5)
        return h.reshape(batch, rows * p, columns * p, out)

    def _blocks(self, h, c, text, text_mask, angles, train):
        block = nn.remat(Block, prevent_cse=not self.scan_layers) if self.remat else Block
        settings = {
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "adaln": self.adaln,
            "qk_norm": self.qk_norm,
            "cross_norm": self.cross_norm,
            "dropout": self.dropout if train else 0.0,
            "norm_eps": self.norm_eps,
            "mlp_norm_eps": self.mlp_norm_eps,
            "dtype": self.dtype,
            "implementation": self.attention,
        }
        if not self.scan_layers:
            for i in range(self.depth):
                h, _ = block(**settings, name=f"blocks_{i}")(h, c, text, text_mask, angles)
            return h
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * 4,
            length=self.depth,
        )
        return scanned(**settings, name="blocks")(h, c, text, text_mask, angles)[0]

    def _position(self, rows: int, columns: int) -> jax.Array:
        if self.pos_embed == "sincos":
            return jnp.asarray(
                sincos_position_embedding(self.hidden_size, rows, columns, self.pos_base, self.pos_scale)
            )
        shape = (rows * columns, self.hidden_size)
        if self.has_variable("params", "position"):
            stored = self.get_variable("params", "position").shape
            if stored != shape:
                raise ValueError(f"DiT: learned pos_embed is for {stored[0]} patches; x has {rows} x {columns}")
        return self.param("position", nn.initializers.normal(0.02), shape, jnp.float32)

    def _angles(self, rows: int, columns: int) -> jax.Array | None:
        if not self.rope_theta:
            return None
        half = self.hidden_size // self.num_heads // 2
        return jnp.asarray(axial_angles(grid_positions(rows, columns), (half, half), self.rope_theta))

    def _check(self, x: jax.Array, cond: dict[str, jax.Array]) -> None:
        if self.adaln not in ("block", "single"):
            raise ValueError(f"DiT: adaln is {self.adaln!r}; expected 'block' or 'single'")
        if self.pos_embed not in ("sincos", "learned"):
            raise ValueError(f"DiT: pos_embed is {self.pos_embed!r}; expected 'sincos' or 'learned'")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"DiT: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.rope_theta and self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"DiT: rope needs heads of a multiple of 4 channels; hidden_size {self.hidden_size} over num_heads "
                f"{self.num_heads} gives {self.hidden_size // self.num_heads}"
            )
        if (
            x.ndim != 4
            or x.shape[3] != self.in_channels
            or x.shape[1] % self.patch_size
            or x.shape[2] % self.patch_size
        ):
            raise ValueError(
                f"DiT: x is {x.shape}; expected [B, H, W, {self.in_channels}] with H and W multiples of "
                f"patch_size {self.patch_size}"
            )
        needed = ({"label"} if self.num_classes else set()) | ({"text"} if self.text_dim else set())
        allowed = needed | ({"text_mask"} if self.text_dim else set())
        for key in sorted(needed - cond.keys()):
            raise ValueError(f"DiT: cond lacks {key!r}; expected {sorted(allowed)}")
        for key in sorted(cond.keys() - allowed):
            raise ValueError(
                f"DiT: cond has {key!r}, which a network of num_classes {self.num_classes}, text_dim {self.text_dim} "
                f"does not use; expected {sorted(allowed)}"
            )
        if self.text_dim and cond["text"].shape[-1] != self.text_dim:
            raise ValueError(f"DiT: text is {cond['text'].shape}; expected [B, L, {self.text_dim}]")


def inputs(module: DiT, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The arguments of `__call__` for one x of `shape` (H, W, C), by default one patch; see models.inputs."""
    shape = shape or (module.patch_size, module.patch_size, module.in_channels)
    cond = {}
    if module.num_classes:
        cond["label"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    if module.text_dim:
        cond["text"] = jax.ShapeDtypeStruct((1, 1, module.text_dim), jnp.float32)
    return {
        "x": jax.ShapeDtypeStruct((1, *shape), jnp.float32),
        "t": jax.ShapeDtypeStruct((1,), jnp.float32),
        "cond": cond,
    }


def masked_mean(text: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean of text [B, L, D] over the tokens whose mask is True: f32[B, D]; zero where there is no such token."""
    text = text.astype(jnp.float32)
    if mask is None:
        return text.mean(axis=1)
    weight = mask.astype(jnp.float32)[..., None]
    return (text * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)


def stack_blocks(params: dict) -> dict:
    """Parameters of a DiT without scan_layers (`blocks_0`, `blocks_1`, ...) -> those of the same DiT with scan_layers (`blocks`)."""
    names = sorted((k for k in params if k.startswith("blocks_")), key=lambda k: int(k.removeprefix("blocks_")))
    rest = {k: v for k, v in params.items() if k not in names}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[k] for k in names))}


def unstack_blocks(params: dict) -> dict:
    """The inverse of stack_blocks."""
    depth = jax.tree.leaves(params["blocks"])[0].shape[0]
    rest = {k: v for k, v in params.items() if k != "blocks"}
    return rest | {f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(depth)}
