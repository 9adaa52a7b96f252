"""The weights of models.inception, from torch-fidelity's file or another file with the same names.

    ours                      theirs
    <layer>/conv/kernel       <layer>.conv.weight (OIHW -> HWIO) * s,   s = bn.weight / sqrt(bn.running_var + 1e-3)
    <layer>/conv/bias         bn.bias - bn.running_mean * s
    fc_kernel, fc_bias        fc.weight transposed, fc.bias

where <layer> = Conv2d_1a_3x3, Mixed_5b.branch1x1, ... has the same name on both sides. The file is not part of this project. It is
looked for in this order: an explicit path; the path in the environment variable LDM_INCEPTION; the user's cache, where `download`
puts it.
"""

import hashlib
import os
import pathlib
import shutil
import tempfile
import urllib.error
import urllib.request
from typing import Any

import jax
import numpy as np

from ldm_jax import models
from ldm_jax.models.inception import InceptionV3
from ldm_jax.weights import files

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
# By torch.hub's convention the name of the file ends in the first eight hex digits of its sha256.
SHA256_PREFIX = "6726825d"
VARIABLE = "LDM_INCEPTION"
PER_LAYER = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def cached_path() -> pathlib.Path:
    """The path to which `download` writes: $XDG_CACHE_HOME (or ~/.cache) / ldm_jax / the name of the file."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "ldm_jax" / URL.rpartition("/")[2]


def download(url: str = URL, path: str | pathlib.Path | None = None) -> pathlib.Path:
    """Fetch the published file (95 MB) to `path` (default: `cached_path()`). No other function here uses the network.

    Raises ValueError, and leaves no file, if it cannot be fetched or if its sha256 does not begin as its name says.
    """
    path = cached_path() if path is None else pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        partial = pathlib.Path(file.name)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                shutil.copyfileobj(answer, file)
            file.flush()
            digest = sha256(partial)
            if not digest.startswith(SHA256_PREFIX):
                raise ValueError(f"{url}: its sha256 is {digest}, expected one that begins with {SHA256_PREFIX}")
            partial.replace(path)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ValueError(f"{url}: cannot be fetched ({error}); {HOW}") from None
        finally:
            partial.unlink(missing_ok=True)
    return path


def sha256(path: str | pathlib.Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


HOW = (
    f"fetch {URL} (its sha256 begins with {SHA256_PREFIX}) and pass its path or set {VARIABLE} to it; "
    "or measure with the features of a classifier of your own, as fd_classifier"
)


def find(path: str | pathlib.Path | None = None) -> pathlib.Path:
    """The file of weights: `path`, else $LDM_INCEPTION, else the downloaded one. ValueError, which says how to get one, if none is
    there."""
    for source, candidate in (("path", path), (VARIABLE, os.environ.get(VARIABLE))):
        if candidate:
            if not pathlib.Path(candidate).is_file():
                raise ValueError(f"Inception weights ({source}): no file {candidate}; {HOW}")
            return pathlib.Path(candidate)
    if cached_path().is_file():
        return cached_path()
    raise ValueError(f"FID needs the weights of Inception-V3 (2015-12-05), which are not here: {HOW}")


def from_torch(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """torch-fidelity's state dict -> the parameters of InceptionV3. Batch normalisation is folded in float64.

    Raises ValueError naming an entry that is missing, unknown, of the wrong shape, or not finite.
    """
    shapes = models.shapes(InceptionV3(("logits",)))["params"]
    layers = [".".join(e.key for e in path[:-2]) for path, _ in jax.tree_util.tree_leaves_with_path(shapes) if path[2:]]
    expected = {f"{layer}.{name}" for layer in layers for name in PER_LAYER} | {"fc.weight", "fc.bias"}
    names = {name for name in state if not name.endswith("num_batches_tracked")}
    if missing := sorted(expected - names):
        raise ValueError(f"Inception weights: {missing[0]} is missing, and {len(missing) - 1} more entries")
    if extra := sorted(names - expected):
        raise ValueError(f"Inception weights: {extra[0]} and {len(extra) - 1} more entries belong to another network")

    def leaf(path: tuple, shape_only: jax.ShapeDtypeStruct) -> np.ndarray:
        *layer, kind = (entry.key for entry in path)
        if not layer:
            value = state[kind.replace("_", ".").replace("kernel", "weight")].T
        else:
            weight, gain, bias, mean, var = (state[f"{'.'.join(layer[:-1])}.{name}"] for name in PER_LAYER)
            scale = gain / np.sqrt(var.astype(np.float64) + 1e-3)
            value = weight.transpose(2, 3, 1, 0) * scale if kind == "kernel" else bias - mean * scale
        if value.shape != shape_only.shape:
            raise ValueError(
                f"Inception weights: {'/'.join(layer)} {kind} is {value.shape}, expected {shape_only.shape}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"Inception weights: {'/'.join(layer)} {kind} is not finite")
        return np.asarray(value, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def load(path: str | pathlib.Path | None = None) -> tuple[dict[str, Any], str]:
    """(the parameters of InceptionV3, the sha256 of their file). See `find` for where the file is looked for.

    The file is .safetensors, or one of torch.save, which is read without executing it.
    """
    path = find(path)
    state = {name: tensor.read() for name, tensor in files.open_file(path).items()}
    return from_torch(state), sha256(path)
