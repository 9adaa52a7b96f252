"""Any TFDS data set that is prepared as array_record, read by `tfds.data_source` without TensorFlow."""

import hashlib
import json
import logging

import numpy as np

from ldm_jax.data import captions
from ldm_jax.data.archive import resolve
from ldm_jax.data.decode import decode


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


class Tfds:
    """Images of one split of a TFDS data set; `indices` picks some of its records (None = all)."""

    def __init__(self, records, name: str, image: str, label: str, text: str, indices: np.ndarray | None):
        self.records, self.name, self.indices = records, name, indices
        self._image, self._label, self._text = image, label, text
        names = getattr(records.dataset_info.features[label], "names", None) if label else ()
        if names is None:
            raise ValueError(f"{name}: feature '{label}' is no ClassLabel; label='' leaves the images unlabelled")
        self.class_names = tuple(names)
        self.num_classes = len(self.class_names)
        self.origin = f"tfds {records.dataset_info.full_name}"
        self.has_text = bool(text)
        # The declaration says whether the feature is a list of texts; no record is read.
        self.several_captions = bool(text) and hasattr(records.dataset_info.features[text], "feature")

    def where(self, i: int) -> str:
        return f"{self.name}[{i}]"

    def fingerprint(self) -> str:
        """A sha256 of the split's name and version, the number of its images, and 16 of them with their captions."""
        info = self.records.dataset_info
        digest = hashlib.sha256(f"{info.full_name} {self.name} {len(self)}".encode())
        for i in np.linspace(0, len(self) - 1, 16).astype(int):
            item = self[i]
            digest.update(item["image"].tobytes() + bytes([item["label"] % 256]))
            if self._text:
                digest.update(json.dumps(item.get("captions", item["text"])).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.records) if self.indices is None else len(self.indices)

    def __getitem__(self, i: int) -> dict:
        row = self.records[int(i if self.indices is None else self.indices[i])]
        image, label, text = row[self._image], row.get(self._label, 0), row.get(self._text, "")
        if isinstance(image, bytes):
            image = decode(image, self.where(i))
        if self.num_classes and not 0 <= int(label) < self.num_classes:
            raise ValueError(f"{self.where(i)}: label {label} is out of range; expected 0..{self.num_classes - 1}")
        texts = captions.read(_as_text(text, self.where(i)), self.where(i))
        item = {"image": image, "label": np.int32(label), "text": texts[0] if texts else ""}
        return {**item, "captions": texts} if len(texts) > 1 else item


def _as_text(value, where: str):
    """A text feature's value: bytes as text, an array or a list of them as a list."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_as_text(v, where) for v in value]
    return captions.as_text(value, where) if isinstance(value, bytes) else value


def _class_tail(records, label: str, k: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(all other records, the last k records of each class), in the order of the feature 'id' where there is one."""
    rows = [(r.get("id", b"%09d" % i), int(r[label]), i) for i, r in enumerate(records[n] for n in range(len(records)))]
    tail: list[int] = []
    for value in sorted({r[1] for r in rows}):
        members = [r[2] for r in sorted(rows) if r[1] == value]
        if len(members) <= k:
            raise ValueError(f"{name}: val_from_train={k}, but class {value} has {len(members)} images")
        tail += members[-k:]
    mask = np.zeros(len(rows), bool)
    mask[tail] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def tfds(
    split: str = "train",
    *,
    dataset: str,
    data_dir: str | None = None,
    splits: dict[str, str] | None = None,
    image: str = "image",
    label: str = "label",
    text: str = "",
    val_from_train: int = 0,
) -> Tfds:
    """The images of `split` of a prepared TFDS data set.

    Args:
        split: 'train', 'val', 'test', or a name of TFDS ('validation', 'train[:90%]').
        dataset: TFDS name, 'cifar10' or 'cifar10:3.0.2'.
        data_dir: where it was prepared (also inside $LDM_DATA); default: that of TFDS.
        splits: our name -> TFDS's, e.g. {'train': 'train[:90%]', 'val': 'train[90%:]'}.
        image, label, text: feature names; '' = none.
        val_from_train: k > 0 makes 'val' of the last k training records of each class, by 'id'.

    Raises ValueError if the data set, the split or a feature is not there, or is not array_record.
    """
    import tensorflow_datasets

    name = f"tfds/{dataset}/{split}"
    folder = None if data_dir is None else str(resolve(data_dir))
    name_there = (splits or {}).get(split, split)
    if val_from_train and name_there == "val":
        name_there = (splits or {}).get("train", "train")
    # TFDS logs a warning of several lines for each file system that it cannot import.
    logging.getLogger("absl").setLevel(logging.ERROR)
    decoders = {image: tensorflow_datasets.decode.SkipDecoding()}
    try:
        builder = tensorflow_datasets.builder(dataset, data_dir=folder, file_format="array_record")
    except Exception as error:  # TFDS raises many types of errors, and lists all its data sets in them
        raise ValueError(
            f"{name}: no such data set in {folder or 'the default data_dir'}: {_one_line(error)}"
        ) from error
    if name_there == "val" and "val" not in builder.info.splits and "validation" in builder.info.splits:
        name_there = "validation"
    for feature in (image, label, text):
        if feature and feature not in builder.info.features:
            raise ValueError(f"{name}: no feature '{feature}'; there are {', '.join(builder.info.features)}")
    if not builder.info.splits:
        raise ValueError(f"{name}: is not prepared as array_record in {builder.data_path}")
    try:
        records = builder.as_data_source(split=name_there, decoders=decoders)
    except Exception as error:
        names = ", ".join(builder.info.splits)
        raise ValueError(f"{name}: no split '{name_there}'; there are {names}: {_one_line(error)}") from error
    indices = None
    if val_from_train and split in ("train", "val"):
        rest, tail = _class_tail(records, label, val_from_train, name)
        indices = rest if split == "train" else tail
    return Tfds(records, name, image, label, text, indices)
