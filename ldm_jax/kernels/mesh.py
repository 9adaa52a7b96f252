"""The mesh of devices, and the rules that split arrays over it: one jitted step runs on one CPU or on a pod.

The mesh has three axes. Along `data` the parameters are replicated and the batch is split. Along `fsdp` both the batch and the
parameters are split (ZeRO-3: Rajbhandari et al. 2020, sec. 5). Along `tensor` parameters are split by explicit rules only. Parameters
are plain trees, and rules over the path and the shape of an array say how it is split. So the models do not know of it, and a
checkpoint does not depend on it.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.kernels import processes

AXES = ("data", "fsdp", "tensor")
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices. One of the three sizes may be -1: it takes all devices that the others leave.

    Raises ValueError when the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: every axis must be positive, and at most one may be -1")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(f"mesh {sizes} does not cover the {len(devices)} devices that jax sees")
    # The axes are Auto: with Explicit ones, the default of jax.make_mesh, an ordinary FSDP step raises.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading (batch) axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def copied(tree: Any, shardings: Any) -> Any:
    """A copy in buffers that XLA allocated, placed by `shardings`. It is not safe to donate buffers that another library allocated."""
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
    """Raise ValueError, naming config.mesh.rules, for a rule that is not a pair (regular expression, axes of AXES)."""
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
    """The partition of one array: by the first rule whose regular expression matches within `name`, else by its shape.

    A rule names a mesh axis, or None, for each axis of the array. By its shape, an array of at least `min_size` elements is split along
    the largest axis that the size of `fsdp` divides. Smaller arrays are replicated: to gather them costs more than to hold them.
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
    """A NamedSharding for each leaf. The paths of optimizer moments and averages end like the path of their parameter, so they are
    split in the same way."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules, min_size)), tree
    )


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The rows of the global batch that this process holds -> global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def shard_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The whole global batch, which each process holds (evaluation) -> global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
        for name, value in batch.items()
    }


def to_host(tree: Any) -> Any:
    """Arrays on devices -> numpy. Where no process holds a whole array, it is gathered from all."""

    def fetch(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return processes.gather(leaf)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
