"""Two-dimensional convolution, nearest-neighbour upsampling and their mirror images, NHWC and HWIO.

    y[b, i, j, o] = sum_{u, v, c} x[b, i stride + u - pad, j stride + v - pad, c] kernel[u, v, c, o] + bias[o]

On a CPU, XLA's own kernel gradient dk = sum_bij x[b, i + u, j + v] g[b, i, j] takes 2 to 5 times as long as the forward pass
(benchmarks/README.md, 'U-Net'), and its forward pass up to twice as long as these on large images and few channels ('Evaluation').
There the three products of a training step are written so:

    wide 3 x 3, stride 1   Winograd's F(2 x 2, 3 x 3) (Lavin & Gray 2016, section 4.1): y = A^T [(G k G^T) (B^T d B)] A on tiles
                           d of 4 x 4 pixels, 16 products for 36; its transpose in k is the kernel gradient. One block of
                           images at a time, so that the tiles stay in cache.
    small, no padding      forwards one matrix product of shifted copies side by side, two images at a time
    narrow input or output the kernel gradient from shifted copies of the narrow side, one matrix product
    all others             the kernel gradient as one matrix product for each of the kh kw shifts

The first two go through the batch in a loop. Of a batch that is split over several devices each would gather the whole for it: they are
for one device.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Padding = int | tuple[tuple[int, int], tuple[int, int]]
Pads = tuple[tuple[int, int], tuple[int, int]]

# Winograd's transforms for two outputs of a three-tap filter.
B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)
# Tiles pay for their transforms from WIDE channels on, and small networks not for compiling them (half a second a layer); forwards also
# on images of LARGE pixels with odd sides or without a border, and on those of four times LARGE with half of WIDE. A block of images
# has about BLOCK_BYTES (the L2 cache), a strip of one image STRIP_BYTES.
WIDE, NARROW, LARGE, BLOCK_BYTES, STRIP_BYTES = 64, 16, 1 << 12, 1 << 20, 1 << 24


def conv2d(x: Array, kernel: Array, stride: int = 1, padding: Padding = 0) -> Array:
    """Convolve `x[B, H, W, C]` with `kernel[kh, kw, C, O]`; `padding` is one width or ((top, bottom), (left, right)).

    Differentiable in both modes and to any order. ValueError when the channels of x and kernel differ.
    """
    pads = ((padding, padding), (padding, padding)) if isinstance(padding, int) else tuple(map(tuple, padding))
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(f"conv2d: the kernel expects {kernel.shape[2]} channels, x has {x.shape[-1]}")
    if kernel.shape[:2] == (1, 1) and stride == 1 and pads == ((0, 0), (0, 0)):
        y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], preferred_element_type=jnp.float32)
        return y.astype(x.dtype).reshape(*x.shape[:3], -1)
    if jax.default_backend() == "cpu":
        return _cpu_conv(stride, pads, x, kernel)
    return _direct(stride, pads, x, kernel)


def _direct(stride: int, pads: Pads, x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _cpu_conv(stride: int, pads: Pads, x: Array, kernel: Array) -> Array:
    return conv_p.bind(x, kernel, stride=stride, pads=pads)


# A primitive of its own, bilinear in x and kernel: both modes of differentiation, to any order, and vmap follow from its two
# transposes. custom_vjp would lose jvp, custom_jvp with linear_call has no vmap.
conv_p = Primitive("cpu_conv")


def _implementation(x: Array, kernel: Array, *, stride: int, pads: Pads) -> Array:
    return _forward(stride, pads, x, kernel)


def _abstract(x, kernel, *, stride, pads):
    shape = jax.eval_shape(
        functools.partial(_direct, stride, pads),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct(kernel.shape, kernel.dtype),
    )
    return x.update(shape=shape.shape, dtype=shape.dtype)


def _transpose_x(g, x, kernel, *, stride, pads):
    return _input_gradient(stride, pads, x.aval.shape, kernel, g)


def _transpose_kernel(g, x, kernel, *, stride, pads):
    return _kernel_gradient(stride, pads, kernel.aval.shape, x, g)


def _batch(args, axes, *, stride, pads):
    (x, kernel), (x_axis, kernel_axis) = args, axes
    if kernel_axis is not None:
        # One kernel for each row is a grouped convolution, which XLA's own rule knows.
        return jax.vmap(functools.partial(_direct, stride, pads), axes)(x, kernel), 0
    x = jnp.moveaxis(x, x_axis, 0)
    y = _cpu_conv(stride, pads, x.reshape(-1, *x.shape[2:]), kernel)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


conv_p.def_impl(_implementation)
conv_p.def_abstract_eval(_abstract)
ad.defbilinear(conv_p, _transpose_x, _transpose_kernel)
batching.primitive_batchers[conv_p] = _batch
mlir.register_lowering(conv_p, mlir.lower_fun(_implementation, multiple_results=False))


def _one_device() -> bool:
    return jax.device_count() == 1


def _tiles_pay(stride: int, pads: Pads, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
    """Whether Winograd's tiles cover this convolution whole, and are worth their transforms in both passes."""
    same = stride == 1 and kernel_shape[:2] == (3, 3) and pads == ((1, 1), (1, 1))
    return _one_device() and same and x_shape[1] % 2 == 0 and x_shape[2] % 2 == 0 and min(kernel_shape[2:]) >= WIDE


def _tiles_pay_forwards(stride: int, pads: Pads, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
    """Whether they are worth their transforms in the forward pass, where they may also reach over the edge."""
    pixels, narrowest = x_shape[1] * x_shape[2], min(kernel_shape[2:])
    if pixels >= LARGE and stride == 1 and kernel_shape[:2] == (3, 3):
        return _one_device() and narrowest >= (WIDE if pixels < 4 * LARGE else WIDE // 2)
    # Below 8 x 8 pixels the transforms of the kernel cost as much as the tiles save.
    return pixels >= 64 and _tiles_pay(stride, pads, x_shape, kernel_shape)


# jit: convolutions of one shape are traced and lowered once, here and in the two transposes.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(stride: int, pads: Pads, x: Array, kernel: Array) -> Array:
    if _tiles_pay_forwards(stride, pads, x.shape, kernel.shape):
        return _winograd(pads, x, kernel)
    # Of the patches of a transformer there would be a copy for each of hundreds of shifts.
    if _one_device() and pads == ((0, 0), (0, 0)) and kernel.shape[0] * kernel.shape[1] <= 9:
        return _unpadded(stride, x, kernel)
    return _direct(stride, pads, x, kernel)


def _shifted(x: Array, kernel_shape: tuple[int, ...], stride: int) -> list[Array]:
    """What each of the kh kw shifts of a kernel sees of x[n, H, W, C], row by row: [n, H', W', C]."""
    (kh, kw), (h, w) = kernel_shape[:2], x.shape[1:3]
    rows, columns = ([slice(i, length - k + i + 1, stride) for i in range(k)] for k, length in ((kh, h), (kw, w)))
    return [x[:, row, column] for row in rows for column in columns]


def _unpadded(stride: int, x: Array, kernel: Array) -> Array:
    def block(x: Array) -> Array:
        patches = jnp.concatenate(_shifted(x, kernel.shape, stride), -1)
        y = jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    # More images at a time are slower: their copies, up to nine times as large, fall out of the cache (the L3).
    y = jax.lax.map(block, x.reshape(-1, 2 - x.shape[0] % 2, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _input_gradient(stride: int, pads: Pads, x_shape: tuple[int, ...], kernel: Array, g: Array) -> Array:
    if _tiles_pay(stride, pads, x_shape, kernel.shape):
        return _cpu_conv(stride, pads, g, kernel[::-1, ::-1].swapaxes(2, 3))
    zeros = jnp.zeros(x_shape, g.dtype)
    return jax.linear_transpose(lambda x: _direct(stride, pads, x, kernel), zeros)(g)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _kernel_gradient(stride: int, pads: Pads, kernel_shape: tuple[int, ...], x: Array, g: Array) -> Array:
    """dL/dkernel from x[B, H, W, C] and g = dL/dy[B, H', W', O]."""
    if _tiles_pay(stride, pads, x.shape, kernel_shape):
        return _winograd_kernel_gradient(x, g)
    (kh, kw, c, o), (_, h, w, _) = kernel_shape, g.shape
    shifts = [(u, v) for u in range(kh) for v in range(kw)]

    def over_pixels(a: Array, b: Array) -> Array:
        # Flattened first: XLA transposes an operand whose contraction runs over several axes.
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    if o <= NARROW and o < c and stride == 1:
        # y at i sees x at i + u - top, so x at i meets g at i - u + top.
        (top, _), (left, _) = pads
        around = [(kh - 1 - top, x.shape[1] + top - h), (kw - 1 - left, x.shape[2] + left - w)]
        gp = jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *((*pad, 0) for pad in around), (0, 0, 0)])
        moved = [gp[:, kh - 1 - u :, kw - 1 - v :][:, : x.shape[1], : x.shape[2]] for u, v in shifts]
        dk = over_pixels(x, jnp.concatenate(moved, -1))
        return dk.reshape(c, kh, kw, o).transpose(1, 2, 0, 3).astype(g.dtype)
    moved = _shifted(_bordered(x, pads), kernel_shape, stride)
    if c <= NARROW:
        dk = over_pixels(jnp.concatenate(moved, -1), g)
    else:
        dk = jnp.stack([over_pixels(part, g) for part in moved])
    return dk.reshape(kernel_shape).astype(g.dtype)


def _sum(weights: np.ndarray, terms: list[Array]) -> Array:
    """sum_i weights[i] terms[i] without the zeros, written as additions: as an einsum the transform of a 1280 x 1280 kernel takes
    longer than all products of 16 x 16 pixels."""
    total = None
    for weight, term in zip(weights, terms):
        if weight:
            term = term if weight == 1 else -term if weight == -1 else float(weight) * term
            total = term if total is None else total + term
    return total


def _input_tiles(x: Array) -> list[list[Array]]:
    """B^T d B for every 4 x 4 tile d of x[n, H, W, C] at stride 2: 4 x 4 arrays [n H W / 4, C]."""
    return _tiles(_bordered(x, ((1, 1), (1, 1))))


def _bordered(x: Array, pads: Pads) -> Array:
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _tiles(xp: Array) -> list[list[Array]]:
    """_input_tiles of x that has its border already: xp[n, H + 2, W + 2, C]."""
    h, w, c = xp.shape[1] - 2, xp.shape[2] - 2, xp.shape[3]
    d = [[xp[:, i : i + h - 1 : 2, j : j + w - 1 : 2] for j in range(4)] for i in range(4)]
    rows = [[_sum(B[a], [d[i][j] for i in range(4)]) for j in range(4)] for a in range(4)]
    return [[_sum(B[b], rows[a]).reshape(-1, c) for b in range(4)] for a in range(4)]


def _blocks(x: Array, widest: int) -> Array:
    """x[B, H, W, C] as [B / n, n, H, W, C], n dividing B, a block of n images being about BLOCK_BYTES at `widest` channels."""
    b, h, w, c = x.shape
    n = max(1, min(b, BLOCK_BYTES // (4 * h * w * widest)))
    n = math.gcd(b, n) if b % n else n
    return x.reshape(b // n, n, h, w, c)


def _winograd(pads: Pads, x: Array, kernel: Array) -> Array:
    c, o = kernel.shape[2:]
    height, width = (length + sum(pad) - 2 for length, pad in zip(x.shape[1:3], pads))
    # Tiles make an even number of rows and columns, and strips as many each; what is too much is dropped.
    w = width + width % 2
    high = _strip(height, w, max(c, o))
    h = -(-height // high) * high
    pads = tuple((low, more + extra) for (low, more), extra in zip(pads, (h - height, w - width)))
    # A zero that is known only when x is: the compiler would else transform the kernels of all layers first and hold them, 1.8 times
    # the weights (it drops an optimization_barrier on a CPU).
    zero = jnp.minimum(jnp.abs(x[0, 0, 0, 0].astype(jnp.float32)), 0.0)
    kernel32 = kernel.astype(jnp.float32) + zero
    rows = [[_sum(G[a], [kernel32[u, v] for u in range(3)]) for v in range(3)] for a in range(4)]
    transformed = [[_sum(G[b], rows[a]) for b in range(4)] for a in range(4)]

    def block(xp: Array) -> Array:
        n, high = xp.shape[0], xp.shape[1] - 2
        tiles = _tiles(xp.astype(jnp.float32))
        products = [[tiles[a][b] @ transformed[a][b] for b in range(4)] for a in range(4)]
        rows = [[_sum(A[p], [products[a][b] for a in range(4)]) for b in range(4)] for p in range(2)]
        y = [[_sum(A[q], rows[p]).reshape(n, high // 2, w // 2, o) for q in range(2)] for p in range(2)]
        return jnp.stack([jnp.stack(row, 3) for row in y], 2).reshape(n, high, w, o).astype(kernel.dtype)

    if high == h:
        blocks = _blocks(x, max(c, o))
        pieces, shape = blocks.shape[0], (blocks.shape[1], h, w, o)

        def piece(k: Array) -> Array:
            return block(_bordered(blocks[k], pads))
    else:
        # A strip of a large image at a time: its tiles and products are eight times what it is.
        xp, strips = _bordered(x, pads), h // high
        pieces, shape = x.shape[0] * strips, (1, high, w, o)

        def piece(k: Array) -> Array:
            return block(jax.lax.dynamic_slice(xp, (k // strips, k % strips * high, 0, 0), (1, high + 2, w + 2, c)))

    # lax.map, but for what the result begins as: of constants the compiler would hold those of all layers from the start.
    start = jnp.full((pieces, *shape), zero.astype(kernel.dtype))
    out = jax.lax.fori_loop(0, pieces, lambda k, y: jax.lax.dynamic_update_index_in_dim(y, piece(k), k, 0), start)
    return out.reshape(-1, h, w, o)[:, :height, :width]


def _strip(h: int, w: int, widest: int) -> int:
    """Rows of a strip, even, so that equal strips cover h rows and are of STRIP_BYTES at most at `widest` channels."""
    strips = -(-4 * h * w * widest // STRIP_BYTES)
    return 2 * -(-h // (2 * strips))


def _winograd_kernel_gradient(x: Array, g: Array) -> Array:
    c, o = x.shape[-1], g.shape[-1]

    def block(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = (array.astype(jnp.float32) for array in pair)
        tiles = _input_tiles(x)
        parts = [[g[:, p::2, q::2] for q in range(2)] for p in range(2)]
        rows = [[_sum(A[:, a], [parts[p][q] for p in range(2)]) for q in range(2)] for a in range(4)]
        spread = [[_sum(A[:, b], rows[a]).reshape(-1, o) for b in range(4)] for a in range(4)]
        products = [[tiles[a][b].T @ spread[a][b] for b in range(4)] for a in range(4)]
        return total + jnp.stack([jnp.stack(row) for row in products]), None

    start = jnp.zeros((4, 4, c, o), jnp.float32)
    total, _ = jax.lax.scan(block, start, (_blocks(x, max(c, o)), _blocks(g, max(c, o))))
    rows = [[_sum(G[:, v], [total[a, b] for b in range(4)]) for v in range(3)] for a in range(4)]
    return jnp.stack(
        [jnp.stack([_sum(G[:, u], [rows[a][v] for a in range(4)]) for v in range(3)]) for u in range(3)]
    ).astype(g.dtype)


def upsample_nearest(x: Array, size: tuple[int, int] | None = None) -> Array:
    """Repeat every pixel of `x[B, H, W, C]` twice along H and W; with a size (H', W') take pixel floor(i H / H') for row i."""
    b, h, w, c = x.shape
    if size is not None:
        rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w)))
        return x[:, rows][:, :, columns]
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def average_pool(x: Array) -> Array:
    """Mean over 2 x 2 pixels of `x[B, H, W, C]`; an odd last row or column is dropped, as in the published networks."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
