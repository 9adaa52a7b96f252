"""One training step of a U-Net of 9.0M parameters on 32 x 32 x 3 against diffusers' UNet2DModel in torch.

    python benchmarks/training_unet.py [--runs 5] [--batch 64] [--only memory,compile,time,parts]

`parts` times single 3 x 3 convolutions and the two gradients of each: ours, XLA's own, torch's. How it is measured:
side_by_side.py. Prints JSON and writes benchmarks/results/training_unet.json.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from side_by_side import CORES, Ours, Theirs, alternate

from ldm_jax import weights
from ldm_jax.kernels.conv import conv2d
from ldm_jax.models.unet import UNet

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64, 128, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "attention_head_dim": 64,
    "norm_num_groups": 32,
}
# pixels a side, channels in, channels out
CONVOLUTIONS = ((32, 3, 64), (32, 64, 64), (32, 128, 64), (32, 64, 3), (16, 128, 128), (8, 256, 256))


def data(batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x, target = random.normal(size=(2, batch, 32, 32, 3)).astype(np.float32)
    return x, random.uniform(0, 999, batch).astype(np.float32), target


def ours(batch: int, params: dict | None = None) -> Ours:
    x, t, target = data(batch)
    return Ours(UNet(**CONFIG), (x, t), target, params)


def theirs(batch: int) -> Theirs:
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    x, t, target = data(batch)
    return Theirs(UNet2DModel(sample_size=32, **CONFIG), (x, t), target)


def step_time(batch: int, runs: int) -> dict:
    torch_side = theirs(batch)
    params = weights.from_state(UNet(**CONFIG), torch_side.arrays())
    return side_by_side.step_time(ours(batch, params), torch_side, runs)


def parts(batch: int, runs: int) -> dict:
    """Forward, input gradient and kernel gradient of single 3 x 3 convolutions: ours, XLA's own, torch's."""
    import torch

    torch.set_num_threads(CORES)

    def xla(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dims)

    def backward(tx, tg, tk, of_x: bool, of_kernel: bool):
        ones, mask = [1, 1], [of_x, of_kernel, False]
        return torch.ops.aten.convolution_backward(tg, tx, tk, None, ones, ones, ones, False, [0, 0], 1, mask)

    def jitted(f, *arrays):
        arrays = tuple(map(jnp.asarray, arrays))
        f = jax.jit(f)
        return lambda: jax.block_until_ready(f(*arrays))

    def gradient(f, argument):
        return lambda x, k, g: jax.vjp(f, x, k)[1](g)[argument]

    results = {}
    for size, c, o in CONVOLUTIONS:
        random = np.random.default_rng(0)
        x, g = (random.normal(size=(batch, size, size, n)).astype(np.float32) for n in (c, o))
        kernel = random.normal(size=(3, 3, c, o)).astype(np.float32)
        tx, tg = (torch.tensor(a).permute(0, 3, 1, 2).contiguous() for a in (x, g))
        tk = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous()
        ours_forward = jax.jit(lambda x, k: conv2d(x, k, 1, 1))

        products = {
            "forward": {
                "ours": jitted(ours_forward, x, kernel),
                "xla": jitted(xla, x, kernel),
                "torch": lambda tx=tx, tk=tk: torch.nn.functional.conv2d(tx, tk, padding=1),
            },
            "input_gradient": {
                "ours": jitted(gradient(ours_forward, 0), x, kernel, g),
                "xla": jitted(gradient(xla, 0), x, kernel, g),
                "torch": lambda tx=tx, tg=tg, tk=tk: backward(tx, tg, tk, True, False),
            },
            "kernel_gradient": {
                "ours": jitted(gradient(ours_forward, 1), x, kernel, g),
                "xla": jitted(gradient(xla, 1), x, kernel, g),
                "torch": lambda tx=tx, tg=tg, tk=tk: backward(tx, tg, tk, False, True),
            },
        }
        for product, sides in products.items():
            result = alternate(sides, runs)
            for measure in ("wall_s", "cpu_s"):
                median = {side: values["median"] for side, values in result[measure].items()}
                results.setdefault(f"{size}x{size} {c}->{o} {product}", {})[measure] = median
    return results


def main() -> None:
    parser = side_by_side.arguments(__doc__, "memory,compile,time,parts")
    parser.add_argument("--batch", type=int, default=64)
    o = parser.parse_args()
    if o.child:
        print(json.dumps(side_by_side.run_child(o.child, lambda: ours(o.batch), lambda: theirs(o.batch))))
        return
    words = ("--batch", str(o.batch))
    measures = {
        "memory": lambda: side_by_side.memory(__file__, words),
        "compile": lambda: side_by_side.compile_time(__file__, words),
        "time": lambda: step_time(o.batch, o.runs),
        "parts": lambda: parts(o.batch, o.runs),
    }
    side_by_side.measure("training_unet", measures, o.only)


if __name__ == "__main__":
    main()
