"""`python -m tests.training.run_process DIR IMAGES PORT RANK`: the tiny run as one of two processes."""

import sys

import jax

from ldm_jax.training.loop import train
from tests.training import tiny

workdir, images, port, rank = sys.argv[1], *map(int, sys.argv[2:])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
config = tiny.config(images=images).unlock()
config.mesh.update(data=1, fsdp=2, min_size=64)
train(config.lock(), workdir, quiet=True)
