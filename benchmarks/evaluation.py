"""Images a second through FID, inception score and KID in one pass, beside torch-fidelity: the same images, random Inception weights.

    make test-metrics                                          # the environment that has torch-fidelity
    PYTHONPATH=. .venv-metrics/bin/python benchmarks/evaluation.py [--num 512] [--side 64] [--runs 3] \\
        [--only features,figures,layers]

Each side is handed two sets of u8 images in memory and a file of weights, which it has read before it is timed. features: the network
alone, over the first set. figures: both sets, up to the three figures, which must agree; of them FID is some ten seconds whatever the
number of images. torch-fidelity keeps no cache; ours keeps features of a subset on disk, as `ldm evaluate` does. layers: convolutions
of the network one by one, XLA's own beside kernels/conv.py's. Timed runs alternate in one process, with as many threads as there are
cores (side_by_side.py). Prints JSON and writes benchmarks/results/evaluation.json. Take multiples of 64: ours fills the last batch up.
"""

import contextlib
import functools
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from side_by_side import CORES, alternate

from ldm_jax.evaluation import features, frechet, images, inception_score, kid, one_pass, statistics
from ldm_jax.kernels import conv

SEED = 2020
# Side of the images, kernel, stride, width of the padding.
LAYERS = {
    "Conv2d_1a": (299, (3, 3, 3, 32), 2, 0),
    "Conv2d_2a": (149, (3, 3, 32, 32), 1, 0),
    "Conv2d_2b": (147, (3, 3, 32, 64), 1, 1),
    "Conv2d_4a": (73, (3, 3, 80, 192), 1, 0),
    "Mixed_5d.branch_pool": (35, (1, 1, 288, 64), 1, 0),
    "Mixed_5d.branch5x5_2": (35, (5, 5, 48, 64), 1, 2),
    "Mixed_6a.branch3x3": (35, (3, 3, 288, 384), 2, 0),
    "Mixed_7a.branch3x3_2": (17, (3, 3, 192, 320), 2, 0),
}


def torch_fidelity():
    """torch_fidelity, whose torchvision may lack its compiled part: no operator of it is called here."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torch_fidelity

            return torch_fidelity, library
        except RuntimeError as error:
            name = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if name is None:
                raise
            library.define(f"{name[1]}(Tensor a, Tensor b, float c) -> Tensor")
            for module in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", "torch_fidelity")]:
                del sys.modules[module]


def write_weights(path: pathlib.Path) -> None:
    """Random Inception weights whose activations stay near 1, under torch-fidelity's names."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Unloaded(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    torch.save({}, path)
    state = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if name.endswith(("conv.weight", "fc.weight")):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bn.bias", "running_mean", "fc.bias")):
            value.normal_(0, 0.1, generator=generator)
    torch.save(state, path)


def pictures(seed: int, num: int, side: int) -> np.ndarray:
    """Coloured waves with noise, u8[num, side, side, 3]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    a, b, c = random.uniform(-1, 1, (3, num, 1, 1, 3))
    wave = np.sin(6 * (a * x[..., None] + b * y[..., None] + c)) * 90 + 128
    return np.clip(wave + random.normal(0, 25, wave.shape), 0, 255).astype(np.uint8)


class Ours:
    def __init__(self, weights: pathlib.Path, sets: list[np.ndarray], folder: pathlib.Path):
        self.networks = {"inception": features.inception(str(weights))}
        self.sets, self.folder = [self.as_images(pixels) for pixels in sets], folder

    @staticmethod
    def as_images(pixels: np.ndarray) -> images.Images:
        def batches():
            return ({"image": pixels[start : start + 64]} for start in range(0, len(pixels), 64))

        return images.Images(batches, len(pixels), {})

    def features(self) -> None:
        for batch in self.sets[0].batches():
            self.networks["inception"].outputs(batch["image"])

    def figures(self) -> dict[str, float]:
        takes = [("moments", "inception", "features"), ("subset", "inception", "features")]
        seen = []
        for here, more in zip(self.sets, ([("all", "inception", "logits")], [])):
            seen.append(one_pass.collect(here, self.networks, takes + more, cap=10_000, folder=self.folder))
        a, b = (statistics.gaussian(s.moments["inception", "features"]) for s in seen)
        x, y = (s.rows["subset", "inception", "features"] for s in seen)
        return {
            "fid": frechet.distance(a.mean, a.covariance, b.mean, b.covariance),
            "is": inception_score.inception_score(seen[0].rows["all", "inception", "logits"], seed=SEED).mean,
            "kid": kid.kid(x, y, subset_size=min(1000, len(x)), seed=SEED).mean,
        }


class Theirs:
    def __init__(self, weights: pathlib.Path, sets: list[np.ndarray]):
        import torch

        torch.set_num_threads(CORES)
        fidelity, _ = torch_fidelity()
        tensors = [torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()) for pixels in sets]
        self.torch, self.batches = torch, tensors[0].split(64)
        self.extractor = fidelity.utils.create_feature_extractor(
            "inception-v3-compat",
            ["logits_unbiased", "2048"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=str(weights),
        )
        # Ours has read its weights before it is timed, too.
        fidelity.metrics.create_feature_extractor = lambda *args, **kwargs: self.extractor
        self.run = functools.partial(
            fidelity.calculate_metrics,
            input1=Pictures(tensors[0]),
            input2=Pictures(tensors[1]),
            isc=True,
            fid=True,
            kid=True,
            kid_subset_size=min(1000, len(sets[0])),
            rng_seed=SEED,
            batch_size=64,
            cuda=False,
            cache=False,
            verbose=False,
            save_cpu_ram=True,
            feature_extractor_weights_path=str(weights),
        )

    def features(self) -> None:
        with self.torch.no_grad():
            for batch in self.batches:
                self.extractor(batch)

    def figures(self) -> dict[str, float]:
        with contextlib.redirect_stderr(None):
            figures = self.run()
        names = ("frechet_inception_distance", "inception_score_mean", "kernel_inception_distance_mean")
        return {short: figures[name] for short, name in zip(("fid", "is", "kid"), names)}


def Pictures(tensor):
    """A torch Dataset of single images."""
    from torch.utils.data import Dataset

    class Tensor(Dataset):
        def __len__(self):
            return len(tensor)

        def __getitem__(self, i):
            return tensor[i]

    return Tensor()


def layer(side: int, shape: tuple[int, ...], stride: int, padding: int, runs: int, batch: int = 32) -> dict:
    """Seconds of one of LAYERS for `batch` images."""
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((batch, side, side, shape[2]), shape))
    ways = {
        "xla": functools.partial(conv._direct, stride, ((padding, padding),) * 2),
        "ours": lambda x, kernel: conv.conv2d(x, kernel, stride, padding),
    }
    sides = {way: functools.partial(jax.jit(convolve), x, kernel) for way, convolve in ways.items()}
    expected, computed = (run() for run in sides.values())
    np.testing.assert_allclose(computed, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    timed = alternate({way: lambda run=run: run().block_until_ready() for way, run in sides.items()}, runs)
    return {"images": batch, **timed}


def main() -> None:
    parser = side_by_side.arguments(__doc__, "features,figures")
    parser.add_argument("--num", type=int, default=512, help="images a set (512)")
    parser.add_argument("--side", type=int, default=64, help="their side in pixels (64)")
    args = parser.parse_args()
    torch_fidelity()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_weights(folder / "random.pth")
        pixels = [pictures(seed, args.num, args.side) for seed in (0, 1)]
        sides = {"ours": Ours(folder / "random.pth", pixels, folder), "torch": Theirs(folder / "random.pth", pixels)}

        def rates(what: str, count: int) -> dict:
            result = alternate({side: getattr(of, what) for side, of in sides.items()}, args.runs)
            rate = {side: count / seconds["median"] for side, seconds in result["wall_s"].items()}
            ratio = rate["ours"] / rate["torch"]
            return {"images": count, "side": args.side, "images_per_second": rate, "ratio": ratio, **result}

        def figures() -> dict:
            figures = {side: of.figures() for side, of in sides.items()}
            for figure, value in figures["ours"].items():
                assert np.isclose(value, figures["torch"][figure], rtol=1e-3), figures
            return {"figures": figures} | rates("figures", 2 * args.num)

        parts = {
            "features": lambda: rates("features", args.num),
            "figures": figures,
            "layers": lambda: {name: layer(*what, args.runs) for name, what in LAYERS.items()},
        }
        side_by_side.measure("evaluation", parts, args.only)


if __name__ == "__main__":
    main()
