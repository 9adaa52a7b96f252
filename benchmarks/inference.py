"""Stable Diffusion 1.5's networks (random weights, full size): load, one U-Net step, one 512 pixel decode, against diffusers.

    python benchmarks/inference.py [--runs 3] [--dtype float32] [--only memory,unet,decode]

unet: a batch of 2 (guidance) of 64 x 64 latents with 77 tokens; decode: one latent to 512 x 512 pixels; both sides carry the weights
of one folder, written here by diffusers. memory: a process for each side that loads the folder and makes one U-Net step and one
decode: seconds to load, and the peak (VmHWM). How it is measured: side_by_side.py. Prints JSON and writes
benchmarks/results/inference.json. `--model tiny` tries the script itself.
"""

import json
import os
import pathlib
import re
import tempfile
import time

# The heap as `ldm generate` has it: side_by_side would keep it.
os.environ.setdefault("MALLOC_MMAP_MAX_", "65536")

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from side_by_side import CORES, alternate

from ldm_jax import weights
from ldm_jax.kernels import heap

SIZES = {
    "sd15": {"side": 64, "tokens": 77, "unet": {"cross_attention_dim": 768}, "vae": {}},
    "tiny": {
        "side": 16,
        "tokens": 7,
        "unet": {"cross_attention_dim": 32, "block_out_channels": (32, 64, 64, 64), "attention_head_dim": 4},
        "vae": {"block_out_channels": (32, 32, 32, 32)},
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


def write(folder: pathlib.Path, size: str) -> None:
    """diffusers' own folders of both networks, random weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=SIZES[size]["side"], **SIZES[size]["unet"]).save_pretrained(folder / "unet")
    AutoencoderKL(**VAE | SIZES[size]["vae"]).save_pretrained(folder / "vae")


def data(size: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random, side = np.random.default_rng(0), SIZES[size]["side"]
    x = random.normal(size=(2, side, side, 4)).astype(np.float32)
    width = SIZES[size]["unet"]["cross_attention_dim"]
    text = random.normal(size=(2, SIZES[size]["tokens"], width)).astype(np.float32)
    return x, np.full(2, 500.0, np.float32), text


class Ours:
    def __init__(self, folder: pathlib.Path, size: str, dtype: str):
        begin = time.perf_counter()
        (unet, self.unet_params), (vae, self.vae_params) = (weights.load(folder, n, dtype) for n in ("unet", "vae"))
        jax.block_until_ready((self.unet_params, self.vae_params))
        self.load_seconds = time.perf_counter() - begin
        x, t, text = map(jnp.asarray, data(size))
        self.x, self.t, self.cond = x, t, {"text": text}
        self.predict = heap.settled(jax.jit(lambda p, x, t, cond: unet.apply({"params": p}, x, t, cond)))
        self.draw = heap.settled(jax.jit(lambda p, z: vae.apply({"params": p}, z, method="decode")))

    def unet(self) -> np.ndarray:
        return np.asarray(self.predict(self.unet_params, self.x, self.t, self.cond))

    def decode(self) -> np.ndarray:
        return np.asarray(self.draw(self.vae_params, self.x[:1]))


class Theirs:
    def __init__(self, folder: pathlib.Path, size: str, dtype: str):
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel

        torch.set_num_threads(CORES)
        self.torch = torch
        begin = time.perf_counter()
        options = {"torch_dtype": getattr(torch, dtype)}
        self.net = UNet2DConditionModel.from_pretrained(folder / "unet", **options).eval()
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", **options).eval()
        self.load_seconds = time.perf_counter() - begin
        x, t, text = data(size)
        self.x = torch.tensor(x.transpose(0, 3, 1, 2)).to(options["torch_dtype"])
        self.t, self.text = torch.tensor(t), torch.tensor(text).to(options["torch_dtype"])

    def unet(self) -> np.ndarray:
        with self.torch.inference_mode():
            return self.net(self.x, self.t, self.text).sample.float().numpy().transpose(0, 2, 3, 1)

    def decode(self) -> np.ndarray:
        with self.torch.inference_mode():
            return self.vae.decode(self.x[:1]).sample.float().numpy().transpose(0, 2, 3, 1)


def timed(folder: pathlib.Path, size: str, dtype: str, what: str, runs: int) -> dict:
    ours, theirs = Ours(folder, size, dtype), Theirs(folder, size, dtype)
    a, b = getattr(ours, what)(), getattr(theirs, what)()
    difference = float(np.abs(a - b).max() / np.abs(b).max())
    assert dtype != "float32" or difference < 1e-3, difference
    result = alternate({"ours": getattr(ours, what), "torch": getattr(theirs, what)}, runs)
    median = {kind: {side: v["median"] for side, v in result[kind].items()} for kind in ("wall_s", "cpu_s")}
    ratios = {f"{kind[:-2]}_ratio": median[kind]["ours"] / median[kind]["torch"] for kind in median}
    return {"dtype": dtype, "relative_difference": difference, **result, **ratios}


def peak() -> float:
    """Peak MiB of this process alone: ru_maxrss would begin with that of the parent, which may have written the folder."""
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024


def child(side: str, folder: pathlib.Path, size: str, dtype: str) -> dict:
    """What one side alone needs: seconds to load, peak MiB after loading and after one step and one decode."""
    if side == "import_torch":
        import diffusers.models.autoencoders
        import diffusers.models.unets  # noqa: F401
    if side.startswith("import"):
        return {"mib": peak()}
    run = (Ours if side == "ours" else Theirs)(folder, size, dtype)
    loaded = peak()
    for _ in range(2):
        run.unet()
        run.decode()
    return {"load_s": run.load_seconds, "loaded_mib": loaded, "mib": peak()}


def memory(folder: pathlib.Path, words: tuple[str, ...]) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        side_by_side._child(__file__, words, "ours", cache)  # compiles: every run but the first has it from the cache
        sides = {
            s: side_by_side._child(__file__, words, s, cache) for s in ("ours", "torch", "import_jax", "import_torch")
        }
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 2**20
    return {
        **sides,
        "weights_mib": size,
        "ratio": sides["ours"]["mib"] / sides["torch"]["mib"],
        "loading_over_weights": (sides["ours"]["loaded_mib"] - sides["import_jax"]["mib"]) / size,
    }


def main() -> None:
    parser = side_by_side.arguments(__doc__, "memory,unet,decode")
    parser.set_defaults(runs=3)
    parser.add_argument("--model", choices=SIZES, default="sd15")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="where the networks lie, or are put (default: removed afterwards)"
    )
    o = parser.parse_args()
    if o.child:
        print(json.dumps(child(o.child, o.folder, o.model, o.dtype)))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = o.folder or pathlib.Path(made)
        if not (folder / "unet").exists():
            write(folder, o.model)
        words = ("--model", o.model, "--dtype", o.dtype, "--folder", str(folder))
        measures = {
            "memory": lambda: memory(folder, words),
            "unet": lambda: timed(folder, o.model, o.dtype, "unet", o.runs),
            "decode": lambda: timed(folder, o.model, o.dtype, "decode", o.runs),
        }
        side_by_side.measure("inference" if o.model == "sd15" else f"inference_{o.model}", measures, o.only)


if __name__ == "__main__":
    main()
