"""What images are compared with: moments and features of real ones, measured once and kept in files.

A file's name is the sha256 of all that it depends on: the data, the feature network's weights, what was taken and of how many images.
Published statistics (ADM's npz with mu, sigma, mu_s, sigma_s; pytorch-fid's) take the place of images for FID and sFID. An npz that
holds images (arr_0) is measured like a split.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.evaluation import images as sources
from ldm_jax.evaluation import npz, one_pass, statistics
from ldm_jax.evaluation.features import Extractor
from ldm_jax.kernels import processes
from ldm_jax.runs import checkpoint
from ldm_jax.training.experiment import Experiment


class Reference(NamedTuple):
    """moments[network, output], and rows[how, network, output] f[n, ...] as memory-mapped arrays.

    `count` is the number of images that they were computed from (0: the file does not say); they lie in `files`.
    """

    moments: dict[tuple[str, str], statistics.Gaussian]
    rows: dict[one_pass.Take, np.ndarray]
    count: int
    files: list[pathlib.Path]

    @property
    def sha256(self) -> str:
        """The sha256 of each of the files, separated by commas."""
        return ",".join(checkpoint.sha256(path) for path in self.files)


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    """An npy file that appears whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.save(file, array)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> Any:
    """The statistics (.npz) or the rows (.npy) in `path`; None where there are none, or they are damaged."""
    try:
        return statistics.read(path) if path.suffix == ".npz" else np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return None


def _origin(take: one_pass.Take, images: sources.Images, networks: Mapping[str, Extractor], cap: int) -> dict[str, Any]:
    """All that a file with this take of these images depends on. ValueError for labels that the images do not have."""
    how, network, output = take
    origin = dict(images.made_by.get("data") or {"file": checkpoint.sha256(pathlib.Path(images.made_by["images"]))})
    if network:
        origin |= {"extractor": networks[network].name, "weights": networks[network].sha256}
    elif output not in images.holds:
        raise ValueError(f"the reference, {images.made_by['images']}, does not say the {output} of its images")
    if (how, output) != ("moments", "features"):
        origin |= {"take": how, "output": output}
    if how == "subset":
        origin["cap"] = min(cap, images.count)
    return origin


def measure(
    images: sources.Images,
    takes: Iterable[one_pass.Take],
    networks: Mapping[str, Extractor],
    *,
    cap: int,
    folder: pathlib.Path,
    say: str = "",
) -> Reference:
    """The `takes` (one_pass.py) of real images, read from `folder`, or measured in one pass and written there.

    All processes call this together and share the folder; process 0 writes. `cap` and `say` as in one_pass.collect. ValueError where
    labels are asked for of images without.
    """
    takes = sorted(takes)
    origins = {take: _origin(take, images, networks, cap) for take in takes}
    files = {}
    for take in takes:
        path = statistics.reference_path(folder, origins[take])
        files[take] = path if take[0] == "moments" else path.with_suffix(".npy")
    values = {take: _read(path) for take, path in files.items()}
    # Process 0's answer: all processes run a network together, and another process may look after process 0 has written the file.
    present = processes.from_first(np.array([values[take] is not None for take in takes]))
    if missing := [take for take, is_present in zip(takes, present) if not is_present]:
        seen = one_pass.collect(images, networks, missing, cap=cap, folder=folder, say=say)
        for take in missing if processes.is_first() else ():
            if take[0] == "moments":
                statistics.write(files[take], statistics.gaussian(seen.moments[take[1:]]), origins[take])
            else:
                _save(files[take], seen.rows[take])
        processes.wait("the reference is written")
        values |= {take: _read(files[take]) for take in missing}
    return Reference(
        {take[1:]: value for take, value in values.items() if take[0] == "moments"},
        {take: value for take, value in values.items() if take[0] != "moments"},
        images.count,
        list(files.values()),
    )


def _check_published(path: pathlib.Path, value: statistics.Gaussian, output: str, extractor: Extractor) -> None:
    """Raise ValueError where a file's statistics are not those of this network."""
    made_with = statistics.read_fingerprint(path)
    if made_with.get("weights", extractor.sha256) != extractor.sha256:
        raise ValueError(
            f"--reference={path} holds features of {made_with['extractor']} {made_with['weights'][:12]}; these are of "
            f"{extractor.name} {extractor.sha256[:12]}"
        )
    if not made_with and extractor.name != "inception":
        raise ValueError(
            f"--reference={path} does not say whose features it holds; expected inception's, not {extractor.name}'s"
        )
    if output == "features" and len(value.mean) != extractor.dim:
        raise ValueError(f"--reference={path} holds {len(value.mean)} features; {extractor.name} has {extractor.dim}")


def _published(path: pathlib.Path, takes: Iterable[one_pass.Take], networks: Mapping[str, Extractor]) -> Reference:
    """Statistics that a file holds. ValueError where they are of another network, or where `takes` asks for other things."""
    moments = {}
    for how, network, output in sorted(takes):
        if how != "moments" or output not in ("features", "spatial"):
            raise ValueError(
                f"--reference={path} holds moments, and {output} ({how}) are wanted of it: give split:NAME"
            )
        moments[network, output] = statistics.read(path, spatial=output == "spatial")
        _check_published(path, moments[network, output], output, networks[network])
    return Reference(moments, {}, max(m.n for m in moments.values()), [path])


def open_reference(
    reference: str,
    config: Experiment,
    takes: Iterable[one_pass.Take],
    networks: Mapping[str, Extractor],
    *,
    cap: int,
    folder: pathlib.Path,
    say: str = "",
) -> Reference:
    """The `takes` of 'split:NAME' of the run's data, or of an npz of statistics or of images.

    Raises FileNotFoundError, or ValueError for a file that does not hold what `takes` asks for.
    """
    if reference.startswith("split:"):
        real = sources.real(config, reference.removeprefix("split:"))
        return measure(real, takes, networks, cap=cap, folder=folder, say=say)
    path, takes = pathlib.Path(reference), tuple(takes)
    if not npz.holds(path, "arr_0"):
        return _published(path, takes, networks)
    # ADM's files have moments of a whole data set and 10,000 of its images: whatever else is measured, FID is of the moments.
    stated = [take for take in takes if npz.holds(path, "mu") and take[:2] == ("moments", "inception")]
    published = _published(path, stated, networks) if stated else None
    rest = [take for take in takes if take not in stated]
    if not rest:
        return published
    measured = measure(sources.from_file(path), rest, networks, cap=cap, folder=folder, say=say)
    if published is None:
        return measured
    return measured._replace(moments=measured.moments | published.moments, files=[path, *measured.files])
