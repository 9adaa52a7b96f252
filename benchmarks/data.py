"""Decoded, batched images a second that arrive on the device, beside a torch DataLoader over the same files.

    python benchmarks/data.py [--sets shapes,cifar10,caltech101] [--seconds 4] [--repeats 5] [--out FILE.json]

Each row is the median over alternating runs of the pipeline as training uses it: zip member -> decode -> crop -> flip ->
batch -> `jax.device_put`, waited for. `cache` decodes once into one array first (not timed). The peer is what a torch user
writes: a map-style Dataset over the same zip (Pillow decode, the same crop and flip), DataLoader with as many worker
processes as there are cores; it is left out where torch is not installed, and for `shapes`, which it has no twin of. The
share of a training step that is spent waiting for data is in the training log itself (`data_wait`).
"""

import argparse
import io
import itertools
import json
import os
import pathlib
import platform
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
from PIL import Image

from ldm_jax.data import SOURCES, TOKENIZERS, train_batches
from ldm_jax.data.preprocess import crop_image

SETS = {
    "shapes": {"name": "shapes", "tokenizer": True, "flip": False},
    "cifar10": {"name": "zip", "path": "cifar10_jpeg.zip", "val_from_train": 500, "native": 32},
    "caltech101": {"name": "zip", "path": "caltech101_128.zip", "native": 128},
}
RESOLUTIONS = (32, 128)


def ours(spec: dict, resolution: int, batch_size: int, cache: bool) -> Iterator:
    block = {k: v for k, v in spec.items() if k not in ("name", "native", "tokenizer", "flip")}
    block |= {"resolution": resolution} if spec["name"] == "shapes" else {}
    return train_batches(
        SOURCES[spec["name"]](split="train", **block),
        batch_size=batch_size,
        seed=0,
        resolution=resolution,
        crop="adm",
        flip=spec.get("flip", True),
        tokenizer=TOKENIZERS["bytes"]() if spec.get("tokenizer") else None,
        cache=cache,
    )


class Peer:
    """A map-style data set as a torch user writes it."""

    def __init__(self, path: str, val_from_train: int, resolution: int):
        source = SOURCES["zip"](split="train", path=path, val_from_train=val_from_train)
        self.path, self.names, self.labels = source.archive.path, source.names, source.labels.tolist()
        self.resolution, self.file = resolution, None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int):
        import torch

        self.file = self.file or zipfile.ZipFile(self.path)
        image = np.asarray(Image.open(io.BytesIO(self.file.read(self.names[i]))).convert("RGB"))
        image = crop_image(image, self.resolution, "adm")
        image = image[:, ::-1] if torch.rand(()) < 0.5 else image
        return torch.from_numpy(image.copy()), self.labels[i]


def peer(spec: dict, resolution: int, batch_size: int) -> Iterator | None:
    if spec["name"] != "zip":
        return None
    try:
        import torch
    except ImportError:
        return None
    loader = torch.utils.data.DataLoader(
        Peer(spec["path"], spec.get("val_from_train", 0), resolution),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        persistent_workers=True,
        multiprocessing_context="spawn",  # forking a process that runs JAX's threads can hang
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def rate(batches: Iterator, put: Callable, batch_size: int, seconds: float) -> float:
    """Images a second over `seconds`, once the threads or workers run."""
    for _ in range(3):
        put(next(batches))
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        put(next(batches))
        count += batch_size
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the figures")
    options = parser.parse_args()

    def to_device(batch):
        jax.block_until_ready(jax.device_put(batch))

    def nothing(batch):
        pass

    runs, figures = {}, []
    for name in options.sets.split(","):
        for resolution in RESOLUTIONS:
            spec = SETS[name]
            runs[name, resolution, "ldm_jax"] = ours(spec, resolution, options.batch, False), to_device
            if resolution <= spec.get("native", 0):  # enlarged images are not worth their memory
                runs[name, resolution, "ldm_jax cache"] = ours(spec, resolution, options.batch, True), to_device
            other = peer(spec, resolution, options.batch)
            if other is not None:
                runs[name, resolution, "torch"] = other, nothing
            group = [k for k in runs if k[:2] == (name, resolution)]
            rates = {k: [] for k in group}
            for _ in range(options.repeats):
                for k in group:  # alternating, so that another load on the machine hits all alike
                    rates[k].append(rate(*runs[k], options.batch, options.seconds))
            for k in group:
                low, middle, high = min(rates[k]), statistics.median(rates[k]), max(rates[k])
                row = {"set": name, "resolution": resolution, "pipeline": k[2], "images_per_second": round(middle)}
                figures.append(row | {"lowest": round(low), "highest": round(high)})
                print(
                    f"{name:12s} {resolution:4d} px  {k[2]:14s} {middle:8.0f} images/s  ({low:.0f} to {high:.0f})",
                    flush=True,
                )
                del runs[k]  # its threads and workers stop before the next set runs
    if options.out:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
        machine["device"] = jax.devices()[0].device_kind
        content = {"machine": machine, "batch": options.batch, "repeats": options.repeats, "rows": figures}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
