"""Two-dimensional convolution, nearest-neighbour upsampling, and average pooling. Images are NHWC, kernels HWIO.

    y[b, i, j, o] = sum_{u, v, c} x[b, i stride + u - pad, j stride + v - pad, c] kernel[u, v, c, o]

XLA is slow at this on a CPU. Its kernel gradient dk = sum_bij x[b, i + u, j + v] g[b, i, j] takes 2 to 5 times as long as its forward
pass (benchmarks/README.md, 'U-Net'). Its forward pass takes up to twice as long as the ones below on large images with few channels
(the same file, 'Evaluation'). On a CPU we therefore compute the products of a training step (the output, and the gradients of the input
and of the kernel) in these ways:

    wide 3 x 3, stride 1   Winograd's F(2 x 2, 3 x 3) (Lavin & Gray 2016, section 4.1): y = A^T [(G k G^T) (B^T d B)] A on tiles
                           d of 4 x 4 pixels, which takes 16 products instead of 36. The kernel gradient is the transpose of this
                           map in k. One block of images is computed at a time, so that the tiles stay in the cache.
    small, no padding      The forward pass is one matrix product for two images: the shifted copies of x lie side by side.
    narrow input or output The kernel gradient is one matrix product of shifted copies of the side with few channels.
    all others             The kernel gradient is one matrix product for each of the kh kw shifts.

The first two run through the batch in a loop. If a batch is split over several devices, each device would have to gather the whole
batch for that loop; we therefore use them on one device only.
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
# When Winograd's tiles are faster. Their transforms cost time, which is saved again from WIDE channels on. They also take half a second
# a layer to compile, which a small network does not save. In the forward pass we also use them for images of at least LARGE pixels that
# have odd sides or no border, and from half of WIDE channels on for images of at least four times LARGE.
# A block of images takes about BLOCK_BYTES (the size of the L2 cache), a strip of one image at most STRIP_BYTES.
WIDE, NARROW, LARGE, BLOCK_BYTES, STRIP_BYTES = 64, 16, 1 << 12, 1 << 20, 1 << 24


def conv2d(x: Array, kernel: Array, stride: int = 1, padding: Padding = 0) -> Array:
    """Convolve `x[B, H, W, C]` with `kernel[kh, kw, C, O]`; `padding` is one width or ((top, bottom), (left, right)).

    Gives [B, H', W', O] in x's dtype. Differentiable in both modes and to any order. Raises ValueError when the channels of x and the
    kernel differ.
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


# This is a new primitive, bilinear in x and the kernel: jax derives both modes of differentiation, to any order, and vmap from its two
# transposes. With custom_vjp there would be no jvp, and with custom_jvp and linear_call no vmap.
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
        # With one kernel for each row this is a grouped convolution; XLA's batching rule handles it.
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
    """Whether Winograd's tiles cover the whole convolution and make both passes faster."""
    same = stride == 1 and kernel_shape[:2] == (3, 3) and pads == ((1, 1), (1, 1))
    return _one_device() and same and x_shape[1] % 2 == 0 and x_shape[2] % 2 == 0 and min(kernel_shape[2:]) >= WIDE


def _tiles_pay_forwards(stride: int, pads: Pads, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
    """Whether Winograd's tiles make the forward pass faster. There they may also reach over the edge of the image."""
    pixels, narrowest = x_shape[1] * x_shape[2], min(kernel_shape[2:])
    if pixels >= LARGE and stride == 1 and kernel_shape[:2] == (3, 3):
        return _one_device() and narrowest >= (WIDE if pixels < 4 * LARGE else WIDE // 2)
    # Below 8 x 8 pixels the transforms of the kernel take as much time as the tiles save.
    return pixels >= 64 and _tiles_pay(stride, pads, x_shape, kernel_shape)


# With jit, convolutions of one shape are traced and lowered once; likewise in the two transposes.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(stride: int, pads: Pads, x: Array, kernel: Array) -> Array:
    if _tiles_pay_forwards(stride, pads, x.shape, kernel.shape):
        return _winograd(pads, x, kernel)
    # Not for large kernels: for the patches of a transformer there would be hundreds of shifted copies.
    if _one_device() and pads == ((0, 0), (0, 0)) and kernel.shape[0] * kernel.shape[1] <= 9:
        return _unpadded(stride, x, kernel)
    return _direct(stride, pads, x, kernel)


def _shifted(x: Array, kernel_shape: tuple[int, ...], stride: int) -> list[Array]:
    """For each of the kh kw taps of a kernel, row by row, the pixels of x[n, H, W, C] that it meets: [n, H', W', C]."""
    (kh, kw), (h, w) = kernel_shape[:2], x.shape[1:3]
    rows, columns = ([slice(i, length - k + i + 1, stride) for i in range(k)] for k, length in ((kh, h), (kw, w)))
    return [x[:, row, column] for row in rows for column in columns]


def _unpadded(stride: int, x: Array, kernel: Array) -> Array:
    def block(x: Array) -> Array:
        patches = jnp.concatenate(_shifted(x, kernel.shape, stride), -1)
        y = jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    # More images at a time are slower: their shifted copies are up to nine times as large and no longer fit in the L3 cache.
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
    """dL/dkernel [kh, kw, C, O] from x[B, H, W, C] and g = dL/dy[B, H', W', O]."""
    if _tiles_pay(stride, pads, x.shape, kernel_shape):
        return _winograd_kernel_gradient(x, g)
    (kh, kw, c, o), (_, h, w, _) = kernel_shape, g.shape
    shifts = [(u, v) for u in range(kh) for v in range(kw)]

    def over_pixels(a: Array, b: Array) -> Array:
        # Flatten first: where a contraction runs over several axes, XLA transposes the operand.
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    if o <= NARROW and o < c and stride == 1:
        # y at i uses x at i + u - top, so x at i meets g at i - u + top.
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
    """sum_i weights[i] terms[i], without the terms of weight 0.

    It is written as additions: as an einsum, the transform of a kernel of 1280 x 1280 channels takes longer than all products of an
    image of 16 x 16 pixels.
    """
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
    """As _input_tiles, for an x that already has its border: xp[n, H + 2, W + 2, C]."""
    h, w, c = xp.shape[1] - 2, xp.shape[2] - 2, xp.shape[3]
    d = [[xp[:, i : i + h - 1 : 2, j : j + w - 1 : 2] for j in range(4)] for i in range(4)]
    rows = [[_sum(B[a], [d[i][j] for i in range(4)]) for j in range(4)] for a in range(4)]
    return [[_sum(B[b], rows[a]).reshape(-1, c) for b in range(4)] for a in range(4)]


def _blocks(x: Array, widest: int) -> Array:
    """x[B, H, W, C] as [B / n, n, H, W, C]. n divides B, and n images of `widest` channels take about BLOCK_BYTES."""
    b, h, w, c = x.shape
    n = max(1, min(b, BLOCK_BYTES // (4 * h * w * widest)))
    n = math.gcd(b, n) if b % n else n
    return x.reshape(b // n, n, h, w, c)


def _winograd(pads: Pads, x: Array, kernel: Array) -> Array:
    c, o = kernel.shape[2:]
    height, width = (length + sum(pad) - 2 for length, pad in zip(x.shape[1:3], pads))
    # Tiles give an even number of rows and columns, and all strips have as many rows. Rows and columns too many are dropped at the end.
    w = width + width % 2
    high = _strip(height, w, max(c, o))
    h = -(-height // high) * high
    pads = tuple((low, more + extra) for (low, more), extra in zip(pads, (h - height, w - width)))
    # This zero depends on x, so that the compiler cannot transform a kernel before its layer runs. Otherwise it transforms the
    # kernels of all layers first and keeps them, which takes 1.8 times the memory of the weights. (It ignores an optimization_barrier
    # on a CPU.)
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
        # One strip of a large image at a time: its tiles and products take eight times the memory of the strip.
        xp, strips = _bordered(x, pads), h // high
        pieces, shape = x.shape[0] * strips, (1, high, w, o)

        def piece(k: Array) -> Array:
            return block(jax.lax.dynamic_slice(xp, (k // strips, k % strips * high, 0, 0), (1, high + 2, w + 2, c)))

    # This is lax.map, except for the initial value of the result. lax.map begins with a constant, and the compiler would allocate these
    # constants of all layers at the start of the program.
    start = jnp.full((pieces, *shape), zero.astype(kernel.dtype))
    out = jax.lax.fori_loop(0, pieces, lambda k, y: jax.lax.dynamic_update_index_in_dim(y, piece(k), k, 0), start)
    return out.reshape(-1, h, w, o)[:, :height, :width]


def _strip(h: int, w: int, widest: int) -> int:
    """The rows of a strip, an even number: equal strips cover h rows, and one of `widest` channels takes at most STRIP_BYTES."""
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
    """Each pixel of `x[B, H, W, C]` twice along H and W: [B, 2 H, 2 W, C]. With a size (H', W'), row i is row floor(i H / H') of x, and
    columns likewise: [B, H', W', C]."""
    b, h, w, c = x.shape
    if size is not None:
        rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w)))
        return x[:, rows][:, :, columns]
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def average_pool(x: Array) -> Array:
    """The means of 2 x 2 pixels of `x[B, H, W, C]`: [B, H // 2, W // 2, C].

    An odd last row or column is dropped, as in the published networks.
    """
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
