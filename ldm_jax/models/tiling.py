"""A large image goes through an autoencoder in pieces, so that the memory has to hold the activations of one piece only.

    sliced   one image of the batch after another; gives the same numbers
    tiled    overlapping tiles, each encoded or decoded as an image. Where the first n pixels of a tile b lie over the last n of its
             neighbour a, b_k <- (1 - k / n) a_k + (k / n) b_k,   k = 0 ... n - 1,   first from above, then from the left
    overlaid each tile b is laid over the result a so far:
             a_ij <- a_ij + m_i m_j (b_ij - a_ij),   m_k = min(k / (n - 1), 1), and 1 at the border of the image

Tiles change the result: a convolution meets the border of each tile, and norms and attention use one tile only. `tiled` computes what
diffusers' AutoencoderKL does, and `overlaid` what its AutoencoderTiny does, so that images come out as they do there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def sliced(apply: Callable[[Array], Any], x: Array) -> Any:
    """apply(x[B, ...]), computed for one row of x at a time. The result may be a tree of arrays [B, ...]."""

    def one(row: Array) -> Any:
        return jax.tree.map(lambda y: y[0], apply(row[None]))

    return jax.lax.map(one, x)


def _blend(a: Array, b: Array, extent: int, axis: int) -> Array:
    """b, whose first `extent` pixels along `axis` are blended with the last ones of a."""
    extent = min(extent, a.shape[axis], b.shape[axis])
    if extent == 0:
        return b
    before = jax.lax.slice_in_dim(a, a.shape[axis] - extent, None, axis=axis)
    first, rest = jnp.split(b, [extent], axis)
    weight = (jnp.arange(extent) / extent).reshape([-1 if k == axis else 1 for k in range(b.ndim)])
    return jnp.concatenate([before * (1 - weight) + first * weight, rest], axis)


def _pieces(apply: Callable[[Array], Array], x: Array, tile: int, step: int) -> dict[tuple[int, int], Array]:
    """{(row, column): apply(the tile that begins there)}, row by row. The last tiles of x[B, H, W, C] may be smaller."""
    height, width = x.shape[1:3]
    corners = [(i, j) for i in range(0, height, step) for j in range(0, width, step)]
    by_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in corners:
        by_size.setdefault((min(tile, height - i), min(tile, width - j)), []).append((i, j))
    out: dict[tuple[int, int], Array] = {}
    for (h, w), alike in by_size.items():
        pieces = jnp.stack([x[:, i : i + h, j : j + w] for i, j in alike])
        out |= dict(zip(alike, jax.lax.map(apply, pieces)))
    return {corner: out[corner] for corner in corners}


def tiled(apply: Callable[[Array], Array], x: Array, tile: int, tile_out: int, overlap: float = 0.25) -> Array:
    """`apply`, which maps [B, tile, tile, C] to [B, tile_out, tile_out, D], applied to x[B, H, W, C] of any size, tile by tile.

    The distance from tile to tile is (1 - overlap) tile, so tiles at the right and below may be smaller. `apply` is compiled once for
    all tiles of one size. If x fits into one tile, the result is apply(x). Raises ValueError unless 0 <= overlap < 1 and the distance
    from tile to tile is a whole number on both sides.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"tiled: overlap is {overlap}, expected at least 0 and less than 1")
    step, extent = int(tile * (1 - overlap)), int(tile_out * overlap)
    keep = tile_out - extent
    if step < 1 or step * tile_out != keep * tile:
        raise ValueError(
            f"tiled: tiles of {tile} and {tile_out} that overlap by {overlap} step by {step} and {keep}: "
            f"expected steps in the proportion of the tiles"
        )
    if max(x.shape[1:3]) <= tile:
        return apply(x)
    out = _pieces(apply, x, tile, step)
    rows: dict[int, list[Array]] = {}
    for i, j in out:
        if i > 0:
            out[i, j] = _blend(out[i - step, j], out[i, j], extent, 1)
        if j > 0:
            out[i, j] = _blend(out[i, j - step], out[i, j], extent, 2)
        rows.setdefault(i, []).append(out[i, j][:, :keep, :keep])
    return jnp.concatenate([jnp.concatenate(row, 2) for row in rows.values()], 1)


def overlaid(apply: Callable[[Array], Array], x: Array, tile: int, tile_out: int, overlap: float = 0.125) -> Array:
    """As `tiled`, but tiles are laid over one another, row by row. Raises ValueError as `tiled` does."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlaid: overlap is {overlap}, expected at least 0 and less than 1")
    step = tile - int(tile * overlap)
    if step * tile_out % tile:
        raise ValueError(
            f"overlaid: tiles of {tile} and {tile_out} that step by {step}: expected whole steps on both sides"
        )
    keep = step * tile_out // tile
    if max(x.shape[1:3]) <= tile:
        return apply(x)
    pieces = _pieces(apply, x, tile, step)
    fade = jnp.minimum(jnp.arange(tile_out) / max(tile_out - keep - 1, 1), 1.0)
    height, width = (n * tile_out // tile for n in x.shape[1:3])
    out = jnp.zeros((x.shape[0], height, width, pieces[0, 0].shape[-1]), pieces[0, 0].dtype)
    for (i, j), piece in pieces.items():
        h, w = piece.shape[1:3]
        mask = (fade[:h] if i else jnp.ones(h))[:, None, None] * (fade[:w] if j else jnp.ones(w))[:, None]
        at = (0, i * keep // step, j * keep // step, 0)
        below = jax.lax.dynamic_slice(out, at, piece.shape)
        out = jax.lax.dynamic_update_slice(out, below + mask * (piece - below), at)
    return out
