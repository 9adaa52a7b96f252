"""Seconds until a training step is compiled, for the network of each CPU config: with an empty cache, and with a warm one.

    python benchmarks/compile.py [--only cifar10_classifier,cifar10_vae,cifar10_ldm_dit,cifar10_ldm_unet]

Each is a process of its own (forward, backward and AdamW at the config's batch size). Prints JSON and writes
benchmarks/results/compile.json. The larger networks stand in training_dit.py and training_unet.py.
"""

import json

import numpy as np
import side_by_side
from side_by_side import Ours

from ldm_jax.config import config_file
from ldm_jax.training import experiment

CONFIGS = "cifar10_classifier,cifar10_vae,cifar10_ldm_dit,cifar10_ldm_unet"


def ours(of: experiment.Experiment) -> Ours:
    rows, side, module = of.train.batch_size, of.input.resolution, of.network
    if of.task.name != "diffusion":
        target = np.zeros((rows, 10) if of.task.name == "classifier" else (rows, side, side, 3), np.float32)
        return Ours(module, (np.zeros((rows, side, side, 3), np.float32),), target)
    x = np.zeros((rows, side // 4, side // 4, module.in_channels), np.float32)
    return Ours(module, (x, np.zeros(rows, np.float32), {"label": np.zeros(rows, np.int32)}), x)


def main() -> None:
    parser = side_by_side.arguments(__doc__, CONFIGS)
    o = parser.parse_args()
    if o.child:
        config = experiment.parse(config_file.load(f"configs/{o.child}.py"))
        print(json.dumps(side_by_side.run_child("compile", lambda: ours(config), None)))
        return
    names = CONFIGS.split(",")
    parts = {name: lambda name=name: side_by_side.compile_time(__file__, (), name) for name in names}
    side_by_side.measure("compile", parts, o.only)


if __name__ == "__main__":
    main()
