"""The U-Net of diffusion models: DDPM, NCSN++, ADM and Stable Diffusion are settings of this one module.

    emb = MLP(embed(t)) + class embedding
    Levels on the way down keep each feature map; levels on the way up concatenate them with their input.

(Ho et al. 2020; Song et al. 2021; Dhariwal & Nichol 2021; Rombach et al. 2022.) The structure, the order of layers, the options and the
names of parameters are those of diffusers' UNet2DConditionModel and UNet2DModel, so that their config.json fits. Their quirks are kept:

- `attention_head_dim` is the number of channels of a head in Attn* blocks, but the *number* of heads in CrossAttn* blocks.
- 'UNetMidBlock2D' is a res-block, attention and a res-block in UNet2DModel (`mid_block_layers=1`), but one res-block in
  UNet2DConditionModel (`mid_block_layers=0`). With scale_shift its attention has a norm only if `attn_norm_num_groups` is set.
- `downsample_type` and `upsample_type` apply to Attn* blocks only. Resnet*sampleBlock2D always resample in a res-block.
- *Skip* blocks (NCSN++, models/ncsnpp.py) have fixed numbers of groups and divide by sqrt(2), whatever the options are. Where all
  blocks are of this kind, `norm_num_groups=None` applies their rule to the middle and the output as well.
- 'positional' takes any number as t; its frequencies are made for 0..999. 'fourier' (UNet2DConditionModel) takes a number of order 1,
  such as log sigma. 'fourier_log' (which UNet2DModel calls 'fourier') takes sigma > 0: it embeds log t and divides the output by t. A
  run of `ldm train` gives its network the input that it takes, or refuses the process (training/time_input.py).
- Where a height or width cannot be halved evenly, UpBlock2D and CrossAttnUpBlock2D enlarge to the size of the skip connection. Other
  blocks always double.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.embedding import TimestepMLP, gaussian_fourier_embedding, timestep_embedding
from ldm_jax.models.layers import Conv, Dense, Downsample, GroupNorm, Upsample, default_init
from ldm_jax.models.levels import DownLevel, MidLevel, UpLevel, added, below
from ldm_jax.models.ncsnpp import ATTENTION_GROUPS, RESCALE, SkipDownLevel, SkipUpLevel
from ldm_jax.models.resblock import ResBlock
from ldm_jax.models.spatial_attention import AttentionBlock, SpatialTransformer
from ldm_jax.models.unet_options import DOWN, MID, UP, check, cross_attentions, needs, per_level


class UNet(nn.Module):
    """module(x f32[B, H, W, in_channels], t f32[B], cond, train) -> f32[B, H, W, out_channels], H and W multiples of `multiple`.

    cond has these entries, where the options call for them:

    text, text_mask   f32[B, L, cross_attention_dim] and, optionally, bool[B, L]: where a block is CrossAttn*
    label             where there is a class embedding: i32[B] below `num_class_embeds`; f32[B] for the class_embed_type 'timestep',
                      f32[B, D] for 'projection' and 'identity'
    pooled, time_ids  f32[B, P] and f32[B, N]: for the addition_embed_type 'text_time'
    guidance          f32[B, time_cond_proj_dim], an embedding of the guidance scale: for networks that were distilled from guided ones
                      (Meng et al. 2023; LCM: Luo et al. 2023). It may be missing, which means zeros, as in the published network

    Any other entry, and a missing one, raise ValueError.

    Two more entries of cond hold what adapters give. Both may be missing.

    residuals   a dict of feature maps, each entry of which may be missing
                'skips'   one map f32[B, h, w, c] for each skip connection from conv_in on; it is added to that connection alone
                'middle'  one map, added to the output of the middle; both are ControlNet's (Zhang et al. 2023, arXiv:2302.05543)
                'levels'  one map for each level of the way down, added to its features (T2I-Adapter: Mou et al. 2023,
                          arXiv:2302.08453); levels.DownLevel says where
    key_values  {path: a sequence of spatial_attention.KeyValues}: the cross-attention at `path`, one of
                unet_options.cross_attentions(module), attends to them beside the text (IP-Adapter: Ye et al. 2023, arXiv:2308.06721)

    These options are not diffusers'. `null_class` appends one row to the class table: index `num_class_embeds` is then the null class
    of classifier-free guidance (published tables count it in `num_class_embeds`). `mid_block_layers`: see the module docstring.
    `zero_init` starts each residual branch and the output at zero (ADM). `remat` recomputes blocks in the backward pass.
    `scan_layers` runs the transformer blocks of a level as one scan. `attention_implementation`: see kernels/attention.py. `dtype` is
    the compute dtype.
    """

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    attention_head_dim: int | tuple[int, ...] | None = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    reverse_transformer_layers_per_block: tuple[int, ...] | None = None
    cross_attention_dim: int | None = None
    encoder_hid_dim: int | None = None
    use_linear_projection: bool = False
    only_cross_attention: bool | tuple[bool, ...] = False
    norm_num_groups: int | None = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"
    dropout: float = 0.0
    resnet_time_scale_shift: str = "default"
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    mid_block_scale_factor: float = 1.0
    mid_block_layers: int = 1
    add_attention: bool = True
    attn_norm_num_groups: int | None = None
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    null_class: bool = False
    class_embeddings_concat: bool = False
    projection_class_embeddings_input_dim: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    zero_init: bool = True
    remat: bool = False
    scan_layers: bool = False
    attention_implementation: str = "auto"
    dtype: str = "float32"

    @property
    def multiple(self) -> int:
        """H and W of the input must be multiples of this number. It is 1 where each level can enlarge to the size of its skip."""
        doublings = [UP[block][1] for block in self.up_block_types[:-1]]
        return 1 if set(doublings) <= {"conv"} else 2 ** len(doublings)

    def _check_inputs(self, x: Array, cond: dict[str, Array]) -> None:
        factor = self.multiple
        if x.ndim != 4 or x.shape[-1] != self.in_channels or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"UNet: x is {x.shape}, expected [B, H, W, {self.in_channels}], H and W multiples of {factor}"
            )
        needed = set(needs(self))
        for key in sorted(needed - set(cond)):
            raise ValueError(f"UNet: cond lacks {key!r}, it holds {sorted(cond)}")
        optional = {"residuals"} | ({"text_mask", "key_values"} if "text" in needed else set())
        if self.time_cond_proj_dim is not None:
            optional.add("guidance")
        for key in sorted(set(cond) - needed - optional):
            raise ValueError(f"UNet: cond holds {key!r}, which these options do not use: expected {sorted(needed)}")
        if unknown := sorted(set(cond.get("residuals", {})) - {"skips", "middle", "levels"}):
            raise ValueError(f"UNet: cond['residuals'] holds {unknown}, expected skips, middle or levels")
        if unknown := sorted(set(cond.get("key_values", {})) - set(cross_attentions(self))):
            raise ValueError(f"UNet: cond['key_values'] names {unknown[0]!r}, which is no block with cross-attention")
        if "guidance" in cond and cond["guidance"].shape[-1] != self.time_cond_proj_dim:
            raise ValueError(
                f"UNet: cond['guidance'] has {cond['guidance'].shape[-1]} channels, expected {self.time_cond_proj_dim}"
            )
        width = self.encoder_hid_dim or self.cross_attention_dim
        if "text" in needed and width is not None and cond["text"].shape[-1] != width:
            raise ValueError(f"UNet: cond['text'] has {cond['text'].shape[-1]} channels, expected {width}")

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: dict[str, Array] | None = None, train: bool = False) -> Array:
        check(self)
        cond = {} if cond is None else cond
        self._check_inputs(x, cond)
        emb = self._embed(t, cond)
        text, mask, more = cond.get("text"), cond.get("text_mask"), cond.get("key_values", {})
        residuals = cond.get("residuals", {})
        of_levels = _per(residuals.get("levels"), len(self.block_out_channels), "levels")
        if text is not None:
            text = text.astype(self.dtype)
            if self.encoder_hid_dim is not None:
                text = Dense(
                    self.cross_attention_dim, dtype=self.dtype, kernel_init=default_init, name="encoder_hid_proj"
                )(text)
        widths, layers = self.block_out_channels, per_level(self, "layers_per_block")
        depths, head_dims = per_level(self, "transformer_layers_per_block"), per_level(self, "attention_head_dim")
        only_cross = per_level(self, "only_cross_attention")
        up_depths = tuple(self.reverse_transformer_layers_per_block or depths[::-1])

        h = Conv(
            widths[0], self.conv_in_kernel, padding=(self.conv_in_kernel - 1) // 2, dtype=self.dtype, name="conv_in"
        )(x)
        maps, image, out = [h], x, None
        for i, block in enumerate(self.down_block_types):
            attention, resample = DOWN[block]
            if resample == "skip":
                options = self._skip_level(attention, widths[i], head_dims[i], last=i == len(widths) - 1)
                h, new, image = SkipDownLevel(**options, layers=layers[i], name=f"down_blocks_{i}")(
                    h, image, emb, train
                )
                if of_levels[i] is not None:
                    h = new[-1] = added(h, of_levels[i], f"the residual of down_blocks_{i}")
                maps += new
                continue
            resample = self.downsample_type if resample == "option" else resample
            h, new = DownLevel(
                self._resnet(widths[i]),
                self._attend(attention, widths[i], head_dims[i], depths[i], only_cross[i], self.norm_num_groups),
                attention == "cross",
                layers[i],
                self._resampler("down", resample, widths[i]) if i < len(widths) - 1 else None,
                name=f"down_blocks_{i}",
            )(h, emb, text, mask, train, below(f"down_blocks_{i}", more), of_levels[i])
            maps += new
        of_skips = _per(residuals.get("skips"), len(maps), "skips")
        maps = [
            m if r is None else added(m, r, f"the residual of skip {k}") for k, (m, r) in enumerate(zip(maps, of_skips))
        ]
        if self.mid_block_type is not None:
            attention = MID[self.mid_block_type]
            groups = self.norm_num_groups if self.resnet_time_scale_shift == "default" else 0
            groups = self.attn_norm_num_groups or groups
            attend = self._attend(
                attention, widths[-1], head_dims[-1], depths[-1], groups=groups, rescale=self.mid_block_scale_factor
            )
            if attention == "self" and not self.add_attention:
                attend = None
            h = MidLevel(
                self._resnet(widths[-1], rescale=self.mid_block_scale_factor),
                attend,
                attention == "cross",
                self.mid_block_layers if attention == "self" else 1,
                name="mid_block",
            )(h, emb, text, mask, train, below("mid_block", more))
        if "middle" in residuals:
            h = added(h, residuals["middle"], "the residual of the middle")
        for i, block in enumerate(self.up_block_types):
            j = len(widths) - 1 - i
            attention, resample = UP[block]
            maps, skips = maps[: -(layers[j] + 1)], maps[-(layers[j] + 1) :]
            if resample == "skip":
                options = self._skip_level(attention, widths[j], head_dims[j], last=j == 0)
                options |= {"out_channels": self.out_channels, "eps": self.norm_eps, "zero_init": self.zero_init}
                h, out = SkipUpLevel(**options, name=f"up_blocks_{i}")(h, skips, out, emb, train)
                continue
            resample = self.upsample_type if resample == "option" else resample
            h = UpLevel(
                self._resnet(widths[j]),
                self._attend(attention, widths[j], head_dims[j], up_depths[i], only_cross[j], self.norm_num_groups),
                attention == "cross",
                self._resampler("up", resample, widths[j]) if j > 0 else None,
                name=f"up_blocks_{i}",
            )(h, skips, emb, text, mask, train, maps[-1].shape[1:3] if j > 0 else None, below(f"up_blocks_{i}", more))
        h = GroupNorm(self.norm_num_groups, self.norm_eps, self.act_fn, name="conv_norm_out")(h)
        k = self.conv_out_kernel
        init = nn.initializers.zeros if self.zero_init else default_init
        h = Conv(self.out_channels, k, padding=(k - 1) // 2, dtype=self.dtype, kernel_init=init, name="conv_out")(h)
        h = h.astype(jnp.float32) if out is None else h.astype(jnp.float32) + out
        return h / t.astype(jnp.float32)[:, None, None, None] if self.time_embedding_type == "fourier_log" else h

    def _embed(self, t: Array, cond: dict[str, Array]) -> Array:
        """The embedding [B, E] of the time, plus that of the class and of the further conditions."""
        first = self.block_out_channels[0]
        width = self.time_embedding_dim or first * (2 if self.time_embedding_type == "fourier" else 4)
        mlp = functools.partial(TimestepMLP, dtype=self.dtype, kernel_init=default_init)
        if self.time_embedding_type == "positional":
            embed_time = functools.partial(
                timestep_embedding,
                dim=first,
                flip_sin_to_cos=self.flip_sin_to_cos,
                downscale_freq_shift=self.freq_shift,
            )
        else:
            # These frequencies are constant, but published checkpoints hold them: they are a parameter without a gradient.
            log = self.time_embedding_type == "fourier_log"
            scale, half = (16.0, first) if log else (1.0, width // 2)
            frequencies = jax.lax.stop_gradient(
                self.param("time_proj", nn.initializers.normal(scale), (half,), jnp.float32)
            )

            def embed_time(t: Array) -> Array:
                t = jnp.log(t) if log else t
                return gaussian_fourier_embedding(t, frequencies, self.flip_sin_to_cos and not log)

        guidance = cond.get("guidance")
        if guidance is None and self.time_cond_proj_dim is not None:
            guidance = jnp.zeros((t.shape[0], self.time_cond_proj_dim))
        emb = mlp(width, name="time_embedding")(embed_time(t), guidance)
        label = cond.get("label")
        if label is not None:
            if self.class_embed_type is None:
                rows = self.num_class_embeds + int(self.null_class)
                label = nn.Embed(rows, width, embedding_init=nn.initializers.normal(1.0), name="class_embedding")(label)
            elif self.class_embed_type == "timestep":
                label = mlp(width, name="class_embedding")(embed_time(label))
            elif self.class_embed_type == "projection":
                label = mlp(width, name="class_embedding")(label)
            elif self.class_embed_type == "simple_projection":
                label = Dense(width, dtype=self.dtype, kernel_init=default_init, name="class_embedding")(label)
            label = label.astype(self.dtype)
            emb = jnp.concatenate([emb, label], -1) if self.class_embeddings_concat else emb + label
        if self.addition_embed_type == "text_time":
            ids = cond["time_ids"]
            sizes = timestep_embedding(
                ids.reshape(-1),
                self.addition_time_embed_dim,
                flip_sin_to_cos=self.flip_sin_to_cos,
                downscale_freq_shift=self.freq_shift,
            ).reshape(ids.shape[0], -1)
            emb = emb + mlp(width, name="add_embedding")(jnp.concatenate([cond["pooled"], sizes], -1))
        return emb

    def _resnet(self, width: int, **options) -> Callable[..., nn.Module]:
        # `train` is a Python bool, and must remain one inside remat.
        kind = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        return functools.partial(
            kind,
            width,
            **{"groups": self.norm_num_groups, **options},
            eps=self.norm_eps,
            act=self.act_fn,
            time_scale_shift=self.resnet_time_scale_shift,
            dropout=self.dropout,
            zero_init=self.zero_init,
            dtype=self.dtype,
        )

    def _skip_level(self, attention: str, width: int, head_dim: int | None, last: bool) -> dict:
        """The arguments that both levels of ncsnpp.py take."""
        return {
            "resnet": self._resnet(width, groups=None, rescale=RESCALE),
            "attend": self._attend(attention, width, head_dim, groups=ATTENTION_GROUPS, rescale=RESCALE),
            "last": last,
            "dtype": self.dtype,
        }

    def _attend(
        self,
        kind: str,
        width: int,
        head_dim: int | None,
        depth: int = 1,
        only_cross: bool = False,
        groups: int | None = 32,
        rescale: float = 1.0,
    ) -> Callable[..., nn.Module] | None:
        """The constructor of an attention, or None. `groups` and `rescale` apply to self-attention only."""
        if kind == "none":
            return None
        shared = {
            "zero_init": self.zero_init,
            "dtype": self.dtype,
            "implementation": self.attention_implementation,
        }
        if kind == "cross":
            if not head_dim or width % head_dim:
                raise ValueError(
                    f"attention_head_dim {head_dim} (the number of heads here) does not divide {width} channels"
                )
            return functools.partial(
                SpatialTransformer,
                head_dim,
                width // head_dim,
                depth,
                self.norm_num_groups,
                only_cross=only_cross,
                remat=self.remat,
                scan_layers=self.scan_layers,
                **shared,
            )
        return functools.partial(
            nn.remat(AttentionBlock) if self.remat else AttentionBlock,
            head_dim or width,
            groups,
            self.norm_eps,
            rescale,
            **shared,
        )

    def _resampler(self, direction: str, kind: str, width: int) -> Callable[..., nn.Module]:
        if kind == "resnet":
            return self._resnet(width, resample=direction)
        if direction == "up":
            return functools.partial(Upsample, width, self.dtype)
        return functools.partial(Downsample, width, self.downsample_padding, self.dtype)


def _per(residuals: Sequence[Array] | None, count: int, what: str) -> Sequence[Array | None]:
    """`count` residuals, or None as many times; ValueError for another number of residuals."""
    if residuals is None:
        return [None] * count
    if len(residuals) != count:
        raise ValueError(f"UNet: cond['residuals'] has {len(residuals)} {what}, expected {count}")
    return residuals


def inputs(module: UNet, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The arguments of `__call__` for one x of `shape` (H, W, C); see models.inputs.

    Raises ValueError where the options do not fix the width of an entry of `cond`; the first input would then fix it.
    """

    def width(option: str) -> int:
        value = getattr(module, option)
        if value is None:
            raise ValueError(f"UNet: {option} is None, expected the number of channels that the condition has")
        return value

    def label() -> jax.ShapeDtypeStruct:
        if module.class_embed_type is None:
            return jax.ShapeDtypeStruct((1,), jnp.int32)
        if module.class_embed_type == "timestep":
            return jax.ShapeDtypeStruct((1,), jnp.float32)
        if module.class_embed_type == "identity":
            factor = 2 if module.time_embedding_type == "fourier" else 4
            channels = module.time_embedding_dim or factor * module.block_out_channels[0]
        else:
            channels = width("projection_class_embeddings_input_dim")
        return jax.ShapeDtypeStruct((1, channels), jnp.float32)

    def pooled() -> jax.ShapeDtypeStruct:
        # However many time_ids there are, they and the pooled text are joined to this many channels.
        channels = width("projection_class_embeddings_input_dim") - width("addition_time_embed_dim")
        return jax.ShapeDtypeStruct((1, channels), jnp.float32)

    def text() -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, 1, module.encoder_hid_dim or width("cross_attention_dim")), jnp.float32)

    rows = {
        "text": text,
        "label": label,
        "time_ids": lambda: jax.ShapeDtypeStruct((1, 1), jnp.float32),
        "pooled": pooled,
    }
    side = 2 ** (len(module.block_out_channels) - 1)
    return {
        "x": jax.ShapeDtypeStruct((1, *(shape or (side, side, module.in_channels))), jnp.float32),
        "t": jax.ShapeDtypeStruct((1,), jnp.float32),
        "cond": {name: rows[name]() for name in needs(module)},
    }
