"""Device mesh and sharding rules: one jitted step on one CPU or on a pod.

The mesh has three axes. `data` replicates parameters and splits the batch; `fsdp` splits both the batch and the parameters
(ZeRO-3: Rajbhandari et al. 2020, sec. 5); `tensor` splits parameters by explicit rules only. Parameters are plain trees:
where an array lies is a rule over its path and shape, so models know nothing of it and a checkpoint does not depend on it.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices; one of the three sizes may be -1: whatever is left.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: every axis must be positive, and at most one may be -1")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(f"mesh {sizes} does not cover the {len(devices)} devices that jax sees")
    # Auto axes: under the default (Explicit) axes of jax.make_mesh an ordinary FSDP step raises.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading (batch) axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def own(tree: Any, shardings: Any) -> Any:
    """A copy whose buffers are XLA's own, placed as `shardings` say: donating what another library made is not safe."""
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.copy(), tree), out_shardings=shardings)(tree)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raise ValueError unless a global batch splits evenly over accumulation steps and batch shards."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (shards * accumulate):
        raise ValueError(
            f"batch size {batch_size} must be a multiple of {shards * accumulate} "
            f"({shards} batch shards of the mesh {dict(mesh.shape)} x {accumulate} accumulation steps)"
        )


def check_rules(rules: Rules) -> None:
    """Raise ValueError, naming config.mesh.rules, for a rule that is no (regular expression, axes) of these AXES."""
    for rule in rules:
        if not (isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[1], list | tuple)):
            raise ValueError(
                f"config.mesh.rules holds {rule!r}; expected (regular expression, axes), an axis or None each"
            )
        if unknown := [axis for axis in rule[1] if axis is not None and axis not in AXES]:
            raise ValueError(f"config.mesh.rules: {rule!r} names the axis {unknown[0]!r}; there are {', '.join(AXES)}")
        try:
            re.compile(rule[0])
        except (re.error, TypeError) as error:
            raise ValueError(f"config.mesh.rules: {rule[0]!r} is no regular expression ({error})") from None


def path_name(path: tuple) -> str:
    """'params/denoiser/block_0/kernel' for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = (), min_size: int = 2**16) -> P:
    """Partition of one array: the first rule whose regex is found in `name`, else the shape rule.

    The shape rule splits the largest axis that `fsdp` divides, for arrays of at least `min_size` elements; smaller ones
    are replicated, since gathering them costs more than holding them. A rule gives one mesh axis or None per array axis.
    """
    for pattern, axes in rules:
        if re.search(pattern, name):
            if len(axes) != len(shape):
                raise ValueError(f"sharding rule {pattern!r} has {len(axes)} axes but {name} has shape {shape}")
            for axis, size in zip(axes, shape):
                if axis is not None and axis not in mesh.shape:
                    raise ValueError(f"sharding rule {pattern!r} names the axis {axis!r}; the mesh has {AXES}")
                if axis is not None and size % mesh.shape[axis]:
                    raise ValueError(
                        f"sharding rule {pattern!r}: {name} {shape} does not split by {axis}={mesh.shape[axis]}"
                    )
            return P(*axes)
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1 or int(np.prod(shape)) < min_size:
        return P()
    for axis in sorted(range(len(shape)), key=lambda a: -shape[a]):
        if shape[axis] % fsdp == 0:
            return P(*(("fsdp" if a == axis else None) for a in range(len(shape))))
    return P()


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = (), min_size: int = 2**16) -> Any:
    """NamedSharding for every leaf. Optimizer moments and EMAs end in the same path as their parameter, so they follow it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules, min_size)), tree
    )


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of the global batch -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def shard_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The same global batch known to every process (evaluation) -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
        for name, value in batch.items()
    }


def to_host(tree: Any) -> Any:
    """Device arrays -> numpy, gathered over processes where no process holds the whole."""

    def fetch(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
