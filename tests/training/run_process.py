"""`python -m tests.training.run_process DIR IMAGES [evaluate] PORT RANK`: the tiny run as one of two processes, and its evaluation."""

import json
import pathlib
import sys

import jax

from ldm_jax.training.loop import train
from tests.training import evaluated, tiny

workdir, images, *more, port, rank = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
config = tiny.config(images=int(images)).unlock()
config.mesh.update(data=1, fsdp=2, min_size=64)
train(config.lock(), workdir, quiet=True)
if "evaluate" in more:
    found = evaluated.figures(pathlib.Path(workdir), pathlib.Path(workdir) / "evaluated", rank)
    (pathlib.Path(workdir) / f"{rank}.json").write_text(json.dumps(found))
