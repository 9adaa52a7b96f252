"""Diffusion transformers as diffusers stores them (DiTTransformer2DModel, PixArtTransformer2DModel) <-> models/dit.py.

One table of rows (path of ours, names of theirs, layout) serves both directions. Layouts, with W torch's [out, in]:

    linear   kernel = W.T; several names lie side by side along `out` (q, k, v in one kernel)
    concat   vectors one after the other (the biases of such a kernel)
    patch    kernel[(i, j, c), out] = W[out, c, i, j]: a p x p convolution of stride p as a linear map of patches
    same     unchanged

diffusers gives every DiT block an embedder of its own for time and label; published files hold the same numbers in all
of them, as there was one embedder in training. PixArt's resolution and aspect-ratio embedders (the 1024 px networks)
have no place here.
"""

from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One line of the table of names; `layout` is one of those above."""

    path: str  # ours, keys joined by '/'
    names: tuple[str, ...]  # theirs; several are joined into one array
    layout: str
    copies: tuple[str, ...] = ()  # theirs, holding the same numbers as names[0]


def _dense(path: str, *names: str, copies: tuple[str, ...] = ()) -> list[Row]:
    weights = Row(f"{path}/kernel", tuple(f"{n}.weight" for n in names), "linear", tuple(f"{n}.weight" for n in copies))
    biases = Row(f"{path}/bias", tuple(f"{n}.bias" for n in names), "concat", tuple(f"{n}.bias" for n in copies))
    return [weights, biases]


def table(depth: int, adaln: str) -> list[Row]:
    """The rows of a network of `depth` blocks: of DiTTransformer2DModel with adaln 'block', of PixArt with 'single'."""
    rows = [
        Row("patch/kernel", ("pos_embed.proj.weight",), "patch"),
        Row("patch/bias", ("pos_embed.proj.bias",), "same"),
    ]
    for i in range(depth):
        ours, theirs = f"blocks_{i}", f"transformer_blocks.{i}"
        rows += _dense(f"{ours}/attention/qkv", *(f"{theirs}.attn1.to_{n}" for n in "qkv"))
        rows += _dense(f"{ours}/attention/out", f"{theirs}.attn1.to_out.0")
        rows += _dense(f"{ours}/mlp/linear_1", f"{theirs}.ff.net.0.proj")
        rows += _dense(f"{ours}/mlp/linear_2", f"{theirs}.ff.net.2")
        if adaln == "block":
            rows += _dense(f"{ours}/adaln", f"{theirs}.norm1.linear")
        else:
            rows += [Row(f"{ours}/adaln_table", (f"{theirs}.scale_shift_table",), "same")]
            rows += _dense(f"{ours}/cross/q", f"{theirs}.attn2.to_q")
            rows += _dense(f"{ours}/cross/kv", f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v")
            rows += _dense(f"{ours}/cross/out", f"{theirs}.attn2.to_out.0")
    if adaln == "block":
        embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(depth)]
        for layer in ("linear_1", "linear_2"):
            first, *others = (f"{e}.timestep_embedder.{layer}" for e in embedders)
            rows += _dense(f"time/{layer}", first, copies=tuple(others))
        first, *others = (f"{e}.class_embedder.embedding_table.weight" for e in embedders)
        rows += [Row("label", (first,), "same", tuple(others))]
        rows += _dense("final_adaln", "proj_out_1") + _dense("final", "proj_out_2")
    else:
        for layer in ("linear_1", "linear_2"):
            rows += _dense(f"time/{layer}", f"adaln_single.emb.timestep_embedder.{layer}")
            rows += _dense(f"text/{layer}", f"caption_projection.{layer}")
        rows += _dense("adaln", "adaln_single.linear") + _dense("final", "proj_out")
        rows += [Row("final_table", ("scale_shift_table",), "same")]
    return rows


def from_diffusers(state: dict[str, np.ndarray], depth: int, adaln: str) -> dict:
    """A state dict of numpy arrays -> the parameters of DiT(depth=depth, adaln=adaln) with its blocks unstacked.

    Raises ValueError naming the first key that is missing, left over, or unequal where copies must agree.
    """
    state = {k: v for k, v in state.items() if k != "pos_embed.pos_embed"}  # a constant, stored by some versions
    params: dict = {}
    used = set()
    for row in table(depth, adaln):
        for name in (*row.names, *row.copies):
            if name not in state:
                raise ValueError(f"weights lack {name!r}, which a network of {depth} blocks, adaln {adaln!r} needs")
            used.add(name)
        for name in row.copies:
            if not np.array_equal(state[name], state[row.names[0]]):
                raise ValueError(f"{name!r} differs from {row.names[0]!r}; expected one embedder shared by all blocks")
        arrays = [np.asarray(state[name]) for name in row.names]
        if row.layout == "linear":
            value = np.concatenate([a.T for a in arrays], axis=1)
        elif row.layout == "concat":
            value = np.concatenate(arrays)
        elif row.layout == "patch":
            value = arrays[0].transpose(2, 3, 1, 0).reshape(-1, arrays[0].shape[0])
        else:
            value = arrays[0]
        *parents, leaf = row.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    for name in sorted(state.keys() - used):
        raise ValueError(f"weights hold {name!r}, which a network of {depth} blocks, adaln {adaln!r} does not have")
    return params


def to_diffusers(params: dict, depth: int, adaln: str, patch_size: int = 2) -> dict[str, np.ndarray]:
    """The inverse of from_diffusers."""
    state = {}
    for row in table(depth, adaln):
        value = params
        for key in row.path.split("/"):
            value = value[key]
        value = np.asarray(value)
        if row.layout == "linear":
            parts = [np.ascontiguousarray(a.T) for a in np.split(value, len(row.names), axis=1)]
        elif row.layout == "concat":
            parts = np.split(value, len(row.names))
        elif row.layout == "patch":
            kernel = value.reshape(patch_size, patch_size, -1, value.shape[1])
            parts = [np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))]
        else:
            parts = [value]
        state |= dict(zip(row.names, parts)) | dict.fromkeys(row.copies, parts[0])
    return state


def dit_arguments(config: dict) -> dict:
    """diffusers' config.json of either class -> the arguments of our DiT; ValueError for an option that DiT lacks."""
    pixart = config.get("norm_type") == "ada_norm_single"
    fixed = {
        "norm_type": ("ada_norm_single",) if pixart else ("ada_norm_zero",),
        "activation_fn": ("gelu-approximate",),
        "attention_bias": (True,),
        "norm_elementwise_affine": (False,),
    }
    if pixart:
        # None means True at sample_size 128, as diffusers has it.
        fixed["use_additional_conditions"] = (False,) if config["sample_size"] == 128 else (False, None)
    for key, values in fixed.items():
        if config.get(key, values[0] if key != "use_additional_conditions" else None) not in values:
            raise ValueError(f"config: {key} is {config.get(key)!r}; expected {values[0]!r}")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    arguments = {
        "patch_size": config["patch_size"],
        "hidden_size": width,
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "pos_base": float(config["sample_size"] // config["patch_size"]),
        "norm_eps": 1e-6,
        "mlp_norm_eps": config["norm_eps"],
    }
    if not pixart:
        return arguments | {"adaln": "block", "num_classes": config["num_embeds_ada_norm"], "time_shift": 1.0}
    if config.get("caption_channels") is None:
        raise ValueError("config: caption_channels is None; expected the width of the text states")
    if config.get("cross_attention_dim") != width:
        raise ValueError(f"config: cross_attention_dim is {config.get('cross_attention_dim')}; expected {width}")
    if config["norm_eps"] != 1e-6:
        raise ValueError(f"config: norm_eps is {config['norm_eps']}; expected 1e-6")
    scale = config.get("interpolation_scale") or max(config["sample_size"] // 64, 1)
    return arguments | {
        "adaln": "single",
        "text_dim": config["caption_channels"],
        "text_pooled": False,
        "pos_scale": float(scale),
    }
