"""The source behind `folder` and `zip`: the images of one split of an archive, decoded on demand."""

import concurrent.futures
import hashlib
import json
import logging

import numpy as np
from tqdm import tqdm

from ldm_jax.data.archive import Folder, Zip
from ldm_jax.data.decode import decode
from ldm_jax.data.layout import Splits, records, select
from ldm_jax.data.splits import canonical


class Files:
    """Images of one split: `self[i] -> {'image': u8[H, W, 3], 'label': i32[], 'text': str}`.

    An image of several captions has all of them as 'captions', and the first as 'text'; `several_captions` says whether any image has
    several. `split_sizes` counts the images of all splits, `left_out` counts by kind the files that are not read.
    `skip_broken` decodes every image once at construction and leaves out those that fail (`skipped` counts them), so
    that the rest does not depend on the order of reading. Without it, reading a broken image raises ValueError.
    """

    def __init__(
        self,
        archive: Folder | Zip,
        split: str,
        *,
        val_from_train: int = 0,
        num_classes: int | None = None,
        text_key: str = "",
        splits: Splits = None,
        skip_broken: bool = False,
    ):
        every = records(archive, text_key, splits)
        self.archive = archive
        chosen, self.split_sizes = select(every, split, str(archive.path), val_from_train)
        self.split = split if split in self.split_sizes else canonical(split)
        self.names, self.captions = [every.names[i] for i in chosen], [every.captions[i] for i in chosen]
        labels = every.labels[chosen]
        self.name = f"{archive.path.stem}/{split}"
        self.origin = f"{archive.path} ({every.layout})"
        self.class_names, self.left_out = every.class_names, every.left_out
        if num_classes is not None:
            wrong = np.flatnonzero(labels >= num_classes)
            if len(wrong):
                at = archive.where(self.names[wrong[0]])
                raise ValueError(f"{at}: label {labels[wrong[0]]} is out of range; expected 0..{num_classes - 1}")
            extra = tuple(str(i) for i in range(len(self.class_names), num_classes))
            self.class_names = (self.class_names + extra)[:num_classes]
        self.num_classes = len(self.class_names)
        self.labels = np.maximum(labels, 0)
        self.has_text = any(self.captions)
        self.several_captions = any(len(c) > 1 for c in self.captions)
        self.skipped = 0
        if skip_broken:
            self._leave_out_broken()

    @property
    def texts(self) -> list[str]:
        """The first caption of each image, '' where it has none."""
        return [c[0] if c else "" for c in self.captions]

    def _leave_out_broken(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            checks = pool.map(self._error, range(len(self)))
            errors = list(tqdm(checks, f"checking {self.name}", len(self), leave=False, unit="img", delay=5))
        keep = [i for i, error in enumerate(errors) if error is None]
        self.skipped = len(errors) - len(keep)
        if not keep:
            raise ValueError(f"{self.archive.path}: every image of split '{self.split}' is broken; first: {errors[0]}")
        if self.skipped:
            first = next(e for e in errors if e is not None)
            logging.warning(
                "%s: skipped %d broken of %d images; first: %s", self.name, self.skipped, len(errors), first
            )
            self.names = [self.names[i] for i in keep]
            self.captions = [self.captions[i] for i in keep]
            self.labels = self.labels[keep]

    def _error(self, i: int) -> str | None:
        try:
            self[i]
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def where(self, i: int) -> str:
        return self.archive.where(self.names[i])

    def fingerprint(self) -> str:
        """A sha256 that changes when an image, a label or a caption of this split changes; names of folders do not matter."""
        texts = [list(c) if len(c) > 1 else "".join(c) for c in self.captions]
        rows = zip(self.names, self.labels.tolist(), texts)
        lines = (json.dumps([name, self.archive.stamp(name), label, text]) for name, label, text in rows)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict:
        image, captions = decode(self.archive.read(self.names[i]), self.where(i)), self.captions[i]
        item = {"image": image, "label": self.labels[i], "text": captions[0] if captions else ""}
        return {**item, "captions": captions} if len(captions) > 1 else item
