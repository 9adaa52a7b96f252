"""python -m tests.weights.load_in_process FOLDER: prints the peak of memory of loading it, and where it lies on two devices."""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax import weights


def status(key: str) -> int:
    """Bytes, of this process alone: getrusage's maximum begins with that of the process that started this one."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


folder = sys.argv[1]
name, module = weights.module_of(json.load(open(f"{folder}/config.json")))
weights.FORMATS[name].shapes(module)
jax.block_until_ready(jax.device_put(np.zeros(3)))
before = status("VmRSS")
_, params = weights.load(folder)
jax.block_until_ready(params)
peak = status("VmHWM") - before
del params

mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def shardings(path: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("fsdp") if path == "token_embedding/embedding" else PartitionSpec())


_, params = weights.load(folder, shardings=shardings)
table = params["token_embedding"]["embedding"]
shards = {str(shard.device.id): [list(shard.data.shape), float(shard.data.sum())] for shard in table.addressable_shards}
print(json.dumps({"peak": peak, "shards": shards, "devices": len(params["final_layer_norm"]["scale"].devices())}))
