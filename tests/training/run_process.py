"""`python -m tests.training.run_process NEW OLD PORT RANK`: one of two processes that train and evaluate, and go on with a run."""

import json
import pathlib
import sys

import jax
import numpy as np

from ldm_jax.kernels import processes
from ldm_jax.training.loop import train
from tests.training import evaluated, tiny

new, old, port, rank = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
first = rank == "0"
assert (
    processes.is_first() == first and processes.from_first(first) is True and processes.from_first(not first) is False
)
shared = processes.from_first(np.array([int(rank), 7]))
assert shared.tolist() == [0, 7] and shared.dtype == int
assert processes.any_process(first) and processes.any_process(not first) and not processes.any_process(False)
processes.wait("the test of agreement")
config = tiny.config().unlock()
config.mesh.update(data=1, fsdp=2, min_size=64)
train(config.lock(), new, quiet=True)
row = evaluated.figures(pathlib.Path(new), pathlib.Path(new) / "evaluated", rank)
(pathlib.Path(new) / f"{rank}.json").write_text(json.dumps(row))
train(config, old, quiet=True)
