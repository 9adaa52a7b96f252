"""`python -m tests.training.run_tiny DIR`: the tiny run as a process of its own, to be killed."""

import sys

from ldm_jax.training.loop import train
from tests.training import tiny

train(tiny.config(images=int(sys.argv[2])), sys.argv[1], quiet=True)
