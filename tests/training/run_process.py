"""`python -m tests.training.run_process DIR IMAGES [evaluate] PORT RANK`: the tiny run as one of two processes, and its evaluation."""

import json
import pathlib
import sys

import jax
import numpy as np

from ldm_jax.kernels import processes
from ldm_jax.training.loop import train
from tests.training import evaluated, tiny

workdir, images, *more, port, rank = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
first = rank == "0"
assert (
    processes.is_first() == first and processes.from_first(first) is True and processes.from_first(not first) is False
)
shared = processes.from_first(np.array([int(rank), 7]))
assert shared.tolist() == [0, 7] and shared.dtype == int
assert processes.any_process(first) and processes.any_process(not first) and not processes.any_process(False)
processes.wait("the test of agreement")
config = tiny.config(images=int(images)).unlock()
config.mesh.update(data=1, fsdp=2, min_size=64)
train(config.lock(), workdir, quiet=True)
if "evaluate" in more:
    found = evaluated.figures(pathlib.Path(workdir), pathlib.Path(workdir) / "evaluated", rank)
    (pathlib.Path(workdir) / f"{rank}.json").write_text(json.dumps(found))
