"""Networks whose features a Fréchet distance is measured in.

An extractor takes images u8[N, H, W, 3] and gives f32[N, dim]. Features of Inception-V3 make the figure FID; the same
distance over any other network's features is called fd_<name>, because the two are not comparable.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.inception import FEATURES, SIZE, InceptionV3
from ldm_jax.training.images import from_uint8
from ldm_jax.weights import inception as inception_weights


class Extractor(NamedTuple):
    """A feature network with its weights in it.

    `sha256` identifies the weights. `resolution` is the side that the network works at, in pixels. `apply` is
    images u8[N, H, W, 3] -> f32[N, dim]: a host array of any N is run in batches of one size, the last one padded, so
    that there is one compile a resolution; an array that is sharded over several devices is run as it lies, and stays
    sharded.
    """

    name: str
    dim: int
    sha256: str
    resolution: int
    apply: Callable[[Any], Any]


def batched(
    function: Callable[[Any, jax.Array], jax.Array], params: Any, batch: int, resolution: int | None
) -> Callable[[Any], Any]:
    """function(params, u8[B, H, W, 3]) -> f32[B, D] as an `Extractor.apply`; images must have `resolution` unless it
    is None.
    """
    run = jax.jit(function)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, met {batch}")

    @functools.lru_cache(maxsize=2)
    def params_on(place: jax.sharding.Sharding) -> Any:
        return jax.device_put(params, place)

    def apply(images: Any) -> Any:
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images {images.dtype}{list(images.shape)}, expected uint8[N, H, W, 3]")
        if resolution is not None and images.shape[1:3] != (resolution, resolution):
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]}, expected {resolution}x{resolution}")
        if isinstance(images, jax.Array) and len(images.sharding.device_set) > 1:
            sharding = images.sharding
            if not isinstance(sharding, jax.sharding.NamedSharding):
                raise ValueError(f"images sharded by {type(sharding).__name__}, expected a NamedSharding")
            return run(params_on(jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())), images)
        images = np.asarray(images)
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.uint8)])
            parts.append((run(params_on(place), jax.device_put(padded, place)), len(part)))
        if not parts:
            raise ValueError("no images to extract features from")
        return np.concatenate([np.asarray(value)[:count] for value, count in parts])

    return apply


def inception(path: str | None = None, feature: str = "2048", batch: int = 64) -> Extractor:
    """Inception-V3 of 2015-12-05 with the weights in `path`, else in $LDM_INCEPTION, else downloaded earlier.

    `feature` is one of models.inception.FEATURES; only '2048' makes FID. Images may have any size: the network
    enlarges or reduces them itself. Raises ValueError that says how to get the weights where there are none.
    """
    if feature not in FEATURES:
        raise ValueError(f"unknown Inception feature {feature!r}; there are {list(FEATURES)}")
    params, sha256 = inception_weights.load(path)
    network = InceptionV3((feature,))
    apply = batched(lambda params, images: network.apply({"params": params}, images)[feature], params, batch, None)
    name = "inception" if feature == "2048" else f"inception_{feature}"
    return Extractor(name, FEATURES[feature], sha256, SIZE, apply)


def params_sha256(params: Any) -> str:
    """The sha256 of a tree of arrays: of each leaf's path, dtype, shape and bytes, in the order of the paths."""
    digest = hashlib.sha256()
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for path, leaf in sorted(leaves, key=lambda pair: pair[0]):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def classifier(
    function: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    *,
    dim: int,
    resolution: int,
    name: str = "classifier",
    sha256: str | None = None,
    batch: int = 64,
) -> Extractor:
    """The features of a network of one's own: function(params, f32[B, R, R, 3] in [-1, 1]) -> f32[B, dim].

    `sha256` is that of `params` unless given. The name may not begin with 'inception': those figures are called FID.
    """
    if name.startswith("inception") or not name.isidentifier():
        raise ValueError(
            f"an extractor cannot be called {name!r}: expected an identifier that does not begin with inception"
        )

    def scaled(params: Any, images: jax.Array) -> jax.Array:
        return function(params, from_uint8(images)).astype(jnp.float32)

    apply = batched(scaled, params, batch, resolution)
    return Extractor(name, dim, sha256 or params_sha256(params), resolution, apply)


def figure_name(extractor: Extractor) -> str:
    """The name of a Fréchet distance in these features: 'fid' for Inception's last pooled ones, else 'fd_<name>'."""
    return "fid" if extractor.name == "inception" else f"fd_{extractor.name}"


NAMES: dict[str, Callable[..., Extractor]] = {"inception": inception}
