"""A cache of latents: the posterior moments of a first stage, written by `ldm encode` and read as a source.

DIR/<split>/ holds mean.npy and logvar.npy f16[N, h, w, C] (unscaled; z = mean + exp(logvar / 2) eps), their
counterparts of the mirrored images mean_flipped.npy and logvar_flipped.npy where asked for, label.npy i32[N],
text.jsonl, statistics.npz (`mean`, `std` f32[C] of z over N, h, w, the noise included: z_white = (z - mean) / std) and
meta.json. A split is written in DIR/<split>.partial and renamed when whole: what bears its name is complete.
"""

import hashlib
import json
import os
import pathlib
import shutil

import numpy as np

from ldm_jax.data.archive import resolve

F16_MAX = float(np.finfo(np.float16).max)


def partial(folder: pathlib.Path) -> pathlib.Path:
    """Where a split is written before it is whole."""
    return folder.with_name(folder.name + ".partial")


class Writer:
    """Writes one split, batch by batch in order; goes on where an interrupted writer of the same `meta` stopped.

        with Writer(out, 'train', count=n, shape=(h, w, c), flipped=True, meta=meta) as writer:
            for batch in batches_from(writer.done):
                writer.append(mean, logvar, labels, texts, mean_flipped, logvar_flipped)

    Leaving the block whole renames the cache to its place; leaving it early (an error, Ctrl-C) keeps what was written
    for the next writer. `meta` describes what the latents are (`source`, `num_classes`, `class_names`, `checkpoint`,
    `resolution`, ...): any JSON. Raises ValueError if the split exists already, or its partial one has another meta.
    """

    def __init__(
        self, out: str | os.PathLike, split: str, *, count: int, shape: tuple[int, int, int], flipped: bool, meta: dict
    ):
        self.final = pathlib.Path(out).absolute() / split
        self.folder = partial(self.final)
        if self.final.exists():
            raise ValueError(f"{self.final}: exists already; remove it to encode anew")
        self.count, self.shape, self.flipped = count, tuple(shape), flipped
        own = {"count": count, "shape": list(shape), "flipped": flipped, "dtype": "float16", "split": split}
        self.meta = json.loads(json.dumps({**meta, **own}))
        self.names = ["mean", "logvar"] + (["mean_flipped", "logvar_flipped"] if flipped else [])
        self.done, self.texts = 0, []
        if self.folder.exists():
            self._resume()
        else:
            self._create()

    def _create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.arrays = {n: self._map(n, "w+", np.float16, (self.count, *self.shape)) for n in self.names}
        self.arrays["label"] = self._map("label", "w+", np.int32, (self.count,))
        (self.folder / "text.jsonl").touch()
        self._json("progress.json", {"done": 0})
        self._json("meta.json", {**self.meta, "complete": False})  # last: with it the folder is one to go on from

    def _resume(self) -> None:
        if not (self.folder / "meta.json").exists():
            shutil.rmtree(self.folder)
            self._create()
            return
        old = json.loads((self.folder / "meta.json").read_text())
        old.pop("complete")
        differs = [k for k in sorted(set(old) | set(self.meta)) if old.get(k) != self.meta.get(k)]
        if differs:
            k = differs[0]
            raise ValueError(
                f"{self.folder}: an unfinished cache of another kind ({k}: {old.get(k)!r}, now {self.meta.get(k)!r}); "
                "remove it to encode anew"
            )
        self.arrays = {n: self._map(n, "r+") for n in [*self.names, "label"]}
        self.done = json.loads((self.folder / "progress.json").read_text())["done"]
        with open(self.folder / "text.jsonl", encoding="utf-8") as file:
            self.texts = [json.loads(line) for line in file][: self.done]

    def _map(self, name: str, mode: str, dtype=None, shape=None) -> np.memmap:
        path = self.folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, mode=mode, dtype=dtype, shape=shape)
        if mode == "w+" and hasattr(os, "posix_fallocate"):
            # A full disk is an error here; met later, through the map of a sparse file, it kills the process (SIGBUS).
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return array

    def _json(self, name: str, content) -> None:
        temporary = self.folder / f"{name}.new"
        temporary.write_text(json.dumps(content))
        os.replace(temporary, self.folder / name)

    def append(self, mean, logvar, labels, texts=None, mean_flipped=None, logvar_flipped=None) -> None:
        """The next rows: moments f32 or f16[n, h, w, C], labels i32[n], texts a list of n (None = no captions).

        Raises ValueError for another shape, too many rows, or a value that float16 cannot hold.
        """
        n = len(labels)
        rows = slice(self.done, self.done + n)
        moments = {"mean": mean, "logvar": logvar, "mean_flipped": mean_flipped, "logvar_flipped": logvar_flipped}
        texts = [""] * n if texts is None else list(texts)
        if rows.stop > self.count or len(texts) != n:
            raise ValueError(f"{self.folder}: {n} rows and {len(texts)} texts after {self.done} of {self.count}")
        for name in self.names:
            values = np.asarray(moments[name], np.float32) if moments[name] is not None else np.empty(0)
            if values.shape != (n, *self.shape):
                raise ValueError(f"{self.folder}: {name} has shape {values.shape}; expected {(n, *self.shape)}")
            if not np.abs(values).max(initial=0) <= F16_MAX:
                raise ValueError(f"{self.folder}: {name} in rows {rows.start}..{rows.stop - 1} does not fit float16")
            self.arrays[name][rows] = values
        self.arrays["label"][rows] = labels
        self.texts += texts
        self.done += n

    def flush(self) -> None:
        """Makes what was appended so far survive a kill; called at the end, and as often as one likes in between."""
        for array in self.arrays.values():
            array.flush()
        temporary = self.folder / "text.jsonl.new"
        temporary.write_text("".join(json.dumps(t) + "\n" for t in self.texts), encoding="utf-8")
        os.replace(temporary, self.folder / "text.jsonl")
        self._json("progress.json", {"done": self.done})

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.flush()
        if kind is not None:
            return
        if self.done != self.count:
            raise ValueError(f"{self.folder}: only {self.done} of {self.count} rows were written")
        mean, std = statistics(self.arrays["mean"], self.arrays["logvar"])
        np.savez(self.folder / "statistics.npz", mean=mean, std=std, count=self.count)
        self._json("meta.json", {**self.meta, "complete": True, "has_text": any(self.texts)})
        (self.folder / "progress.json").unlink()
        self.arrays.clear()
        os.replace(self.folder, self.final)


def statistics(means: np.ndarray, logvars: np.ndarray, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel (mean, std) f32[C] of z = mean + exp(logvar / 2) eps over [N, h, w, C], summed in float64, two passes."""
    size = means[..., 0].size
    chunks = [slice(i, i + chunk) for i in range(0, len(means), chunk)]
    mean = sum(means[c].astype(np.float64).sum((0, 1, 2)) for c in chunks) / size
    spread = sum(np.square(means[c].astype(np.float64) - mean).sum((0, 1, 2)) for c in chunks) / size
    noise = sum(np.exp(logvars[c].astype(np.float64)).sum((0, 1, 2)) for c in chunks) / size
    return mean.astype(np.float32), np.sqrt(spread + noise).astype(np.float32)


class Latents:
    """`self[i] -> {'mean', 'logvar': f16[h, w, C], 'label', 'text'}`, and 'mean_flipped', 'logvar_flipped' if stored.

    `mean` and `std` f32[C] are the whitening statistics of this split, `meta` what the writer said.
    """

    is_latent = True

    def __init__(self, folder: pathlib.Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.name = f"{folder.parent.name}/{folder.name}"
        self.has_flipped = meta["flipped"]
        self.may_flip = meta.get("may_flip", True)
        self.shape = tuple(meta["shape"])
        self.class_names = tuple(meta.get("class_names", ()))
        self.num_classes = int(meta.get("num_classes", len(self.class_names)))
        self.has_text = meta["has_text"]
        self._keys = ["mean", "logvar"] + (["mean_flipped", "logvar_flipped"] if self.has_flipped else [])
        with np.load(folder / "statistics.npz") as saved:
            self.mean, self.std = saved["mean"], saved["std"]
        with open(folder / "text.jsonl", encoding="utf-8") as file:
            self.texts = [json.loads(line) for line in file]
        self._open()

    def _open(self) -> None:
        self._arrays = {k: np.load(self.folder / f"{k}.npy", mmap_mode="r") for k in self._keys}
        self._labels = np.load(self.folder / "label.npy")
        for name, array in [*self._arrays.items(), ("label", self._labels), ("text", self.texts)]:
            if len(array) != self.meta["count"]:
                raise ValueError(f"{self.folder}: {name} has {len(array)} rows, meta.json says {self.meta['count']}")

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_arrays", "_labels")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def where(self, i: int) -> str:
        return f"{self.folder}[{i}]"

    def fingerprint(self) -> str:
        """A sha256 of what the writer said, the statistics, the labels and 16 of the latents."""
        digest = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode())
        for part in (self.mean, self.std, self._labels):
            digest.update(part.tobytes())
        for i in np.linspace(0, len(self) - 1, 16).astype(int):
            digest.update(self._arrays["mean"][i].tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.meta["count"]

    def __getitem__(self, i: int) -> dict:
        moments = {k: np.asarray(a[i]) for k, a in self._arrays.items()}
        return {**moments, "label": self._labels[i], "text": self.texts[i]}


def latents(split: str = "train", *, path: str) -> Latents:
    """The latents of `split` in the cache folder `path` (as it stands, or inside $LDM_DATA).

    Raises FileNotFoundError if there is none, ValueError if it is unfinished or damaged.
    """
    root = resolve(path)
    folder = root / split
    if not folder.is_dir():
        if partial(folder).is_dir():
            raise ValueError(
                f"{partial(folder)}: unfinished latent cache; run the same `ldm encode` again to finish it"
            )
        known = ", ".join(sorted(p.parent.name for p in root.glob("*/meta.json"))) or "none"
        raise ValueError(f"{root}: no latents of split '{split}'; there are: {known}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a latent cache, or a damaged one ({error})") from error
    if not meta.get("complete"):
        raise ValueError(f"{folder}: unfinished latent cache; remove it and run `ldm encode` again")
    try:
        return Latents(folder, meta)
    except (OSError, EOFError, KeyError) as error:
        raise ValueError(f"{folder}: damaged latent cache ({error})") from error
