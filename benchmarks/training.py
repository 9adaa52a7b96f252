"""Both training benchmarks, one after the other: a DiT-S/2 and a U-Net of 9M parameters against diffusers' in torch.

    python benchmarks/training.py [--runs 5] [--only memory,compile,time]

What each does stands in training_dit.py and training_unet.py, which take more options.
"""

import argparse
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="alternating runs of each side (5)")
    parser.add_argument("--only", default="memory,compile,time", help="what to measure (memory,compile,time)")
    options = parser.parse_args()
    codes = [
        subprocess.call([sys.executable, HERE / name, "--runs", str(options.runs), "--only", options.only])
        for name in ("training_dit.py", "training_unet.py")
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
