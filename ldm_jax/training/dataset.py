"""What is trained on, in words: where it is from, its splits, classes and captions, and what lies there and is not read."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ldm_jax.data.tokenize import lost
from ldm_jax.runs import checkpoint
from ldm_jax.training.experiment import Experiment

LISTED = 12  # classes and kinds of files that are named one by one
LOOKED_AT = 1000  # captions that are held against the tokenizer


def lines(experiment: Experiment, train: Any, tune: Any) -> list[str]:
    """One line about the sources of the roles 'train' and 'tune', and a second where something was left out."""
    classes = f"{train.num_classes} classes" if train.num_classes else "no classes"
    out = [f"data: {_origin(train)}: {_splits(experiment, train, tune)}; {classes}; {_captions(train)}"]
    left = [f"{count} {kind}" for kind, count in _shown(getattr(train, "left_out", {}))]
    left += [
        f"{images.skipped} broken images of {role}"
        for role, images in (("train", train), ("tune", tune))
        if getattr(images, "skipped", 0)
    ]
    return out + ([f"data: left out: {', '.join(left)}"] if left else [])


def details(experiment: Experiment, train: Any, tune: Any) -> list[str]:
    """The `lines` with the images of each class, examples of captions and what the tokenizer loses of them."""
    out = lines(experiment, train, tune)
    labels, tune_labels = getattr(train, "labels", None), getattr(tune, "labels", None)
    if train.num_classes and labels is not None:
        counts = np.bincount(labels, minlength=train.num_classes)
        checks = np.zeros_like(counts) if tune_labels is None else np.bincount(tune_labels, minlength=train.num_classes)
        rows = [f"{n} {a} + {b}" for n, a, b in zip(train.class_names, counts, checks)]
        more = f", ... and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
        out.append(f"classes (train + tune): {', '.join(rows[:LISTED])}{more}")
        if more:
            order = np.argsort(counts, kind="stable")
            low, high = order[0], order[-1]
            out.append(
                f"images a class: {counts[low]} ({train.class_names[low]}) to {counts[high]} ({train.class_names[high]})"
            )
    if train.has_text:
        texts = list(_first_texts(train, LOOKED_AT))
        out += [f"caption: {text[:300]}" for text in texts[:: max(1, len(texts) // 3)][:3]]
        if experiment.tokenizer is not None:
            out += [f"warning: {line}" for line in lost(experiment.tokenizer, texts, "captions")]
    return out


def labels_of(images: Any) -> list[str]:
    """What stands below the picture of each item: the name of its class, and its first caption."""
    out = []
    for i in range(len(images)):
        item = images[i]
        name = images.class_names[int(item["label"])] if images.num_classes else ""
        out.append(": ".join(part for part in (name, item["text"]) if part))
    return out


def _origin(images: Any) -> str:
    return getattr(images, "origin", images.name)


def _shown(counts: dict[str, int]) -> list[tuple[str, int]]:
    """(kind, count) of the most frequent kinds, and the others as one."""
    rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    rest = sum(count for _, count in rows[LISTED:])
    return rows[:LISTED] + ([("of other kinds", rest)] if rest else [])


def _splits(experiment: Experiment, train: Any, tune: Any) -> str:
    """'train 100 images, tune on val 10; also there: test 10'."""
    same = " (the same images)" if experiment.split.tune == experiment.split.train else ""
    text = f"{experiment.split.train} {len(train)} images, tune on {experiment.split.tune} {len(tune)}{same}"
    others = dict(getattr(train, "split_sizes", {}))
    for images in (train, tune):
        others.pop(getattr(images, "split", ""), None)
    return text + ("; also there: " + ", ".join(f"{s} {n}" for s, n in sorted(others.items())) if others else "")


def _captions(images: Any) -> str:
    if not images.has_text:
        return "no captions"
    each = getattr(images, "captions", None)
    if each is None:
        return "several captions an image" if getattr(images, "several_captions", False) else "captions"
    some, several = sum(bool(c) for c in each), [len(c) for c in each if len(c) > 1]
    of = "all images" if some == len(each) else f"{some} of {len(each)} images"
    more = f", several of {len(several)} (up to {max(several)}; one is drawn each time)" if several else ""
    return f"captions of {of}{more}"


def _first_texts(images: Any, count: int) -> Iterator[str]:
    """Captions at even distances, without decoding images where that can be had."""
    each = getattr(images, "captions", None)
    size = len(images)
    for i in range(0, size, max(1, size // count)):
        text = "".join(each[i][:1]) if each is not None else images[i]["text"]
        if text:
            yield text


def write(workdir: pathlib.Path, train: Any, tune: Any) -> None:
    """DIR/dataset.json: what drawing needs of the data, so that a run is drawn from without its data at hand."""
    prompts = [tune[i]["text"] for i in range(min(64, len(tune)))] if tune.has_text else []
    row = {"num_classes": train.num_classes, "class_names": list(train.class_names), "prompts": prompts}
    # Broken images that were left out: without this a validation on fewer images than expected would not be seen.
    row["skipped"] = {"train": getattr(train, "skipped", 0), "tune": getattr(tune, "skipped", 0)}
    checkpoint.write_text(workdir / "dataset.json", json.dumps(row, indent=1) + "\n")
