"""Kinds of modules: the tensors of a module in our tree of parameters, and in torch's files.

    CONV1D, CONV2D, CONV3D   kernel[k, I, O], k one number an axis   weight[O, I, k]
    DENSE                    kernel[I, O]                            weight[O, I]
    PIXEL                    kernel[I, O]                            weight[O, I, 1, 1]: a linear map of pixels, stored as a convolution
    patch(p)                 kernel[(i, j, c), O]                    weight[O, c, p, p]: a linear map of p x p pixels, stored likewise
    NORM                     scale[C]                                weight[C]
    EMBEDDING                embedding[N, D]                         weight[N, D]
    ARRAY                    the leaf itself                         the tensor itself

All but EMBEDDING and ARRAY may have a bias, which is the same on both sides. DENSE and PIXEL read both forms of the weight; they differ
in the form that they write. A new kind is one line of this file.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """One tensor in both layouts.

    to_ours   torch's tensor -> our array
    to_torch  the inverse
    flat      whether torch's tensor may have more or fewer axes of length 1 at its end than `to_torch` gives it
    """

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    flat: bool = False


# The last key of our leaf -> (the last part of torch's name, how the two tensors differ). '' stands for no such part.
Kind = Mapping[str, tuple[str, Transform]]

SAME = Transform(lambda x: x, lambda x: x)


def convolution(axes: int) -> Transform:
    """torch's [O, I, k...] <-> our [k..., I, O], with `axes` axes of the kernel."""
    order = (*range(2, 2 + axes), 1, 0)
    return Transform(lambda x: x.transpose(order), lambda x: x.transpose(np.argsort(order)))


def linear(ones: int = 0) -> Transform:
    """torch's [O, I], which is written with `ones` more axes of length 1 at its end <-> our [I, O]."""
    return Transform(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T.reshape(*x.shape[::-1], *(1,) * ones), flat=True)


def patches(p: int) -> Transform:
    """torch's [O, c, p, p] <-> our [(i, j, c), O]."""
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(p, p, -1, x.shape[1]).transpose(3, 2, 0, 1),
    )


def layer(kernel: Transform) -> Kind:
    """A module of a kernel and a bias."""
    return {"kernel": ("weight", kernel), "bias": ("bias", SAME)}


def patch(p: int) -> Kind:
    """A linear map of patches of p x p pixels."""
    return layer(patches(p))


CONV1D, CONV2D, CONV3D = (layer(convolution(axes)) for axes in (1, 2, 3))
DENSE, PIXEL = layer(linear()), layer(linear(ones=2))
NORM: Kind = {"scale": ("weight", SAME), "bias": ("bias", SAME)}
EMBEDDING: Kind = {"embedding": ("weight", SAME)}
ARRAY: Kind = {"": ("", SAME)}
