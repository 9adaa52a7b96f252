"""Two tasks of one `srun` find each other by `jax.distributed.initialize()` alone and add up across processes."""

import jax

jax.distributed.initialize()

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
mine = np.full((jax.local_device_count(),), 10.0 ** jax.process_index(), np.float32)
whole = jax.make_array_from_process_local_data(rows, mine)
total = jax.shard_map(
    lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
)
total = float(jnp.squeeze(jax.jit(total)(whole)))
# One write: two processes share this terminal, and print() would let their pieces mix.
print(f"process {jax.process_index()} of {jax.process_count()}: psum {total}\n", end="", flush=True)
