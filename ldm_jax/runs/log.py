"""The record of a run: metrics.jsonl (one JSON object a line), TensorBoard events beside it, and a progress bar.

The JSONL file is the record; on resume it is rewound to the checkpoint, so that no step stands twice.
"""

import json
import math
import pathlib
import socket
import sys
import time
from typing import Any

from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from ldm_jax.runs.checkpoint import write_text


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def rewind(path: pathlib.Path, step: int) -> None:
    """Drop training lines past `step` (what a crash left behind the checkpoint). Evaluations of earlier steps stay."""
    if path.exists():
        rows = [row for row in read_metrics(path) if row.get("step", 0) <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append(path: pathlib.Path, row: dict[str, Any]) -> None:
    """One JSON line more."""
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


class EventFile:
    """TensorBoard events through tensorboard's own record writer, which needs no TensorFlow."""

    def __init__(self, folder: pathlib.Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self.file = open(folder / name, "wb")
        self.writer = RecordWriter(self.file)
        self._event(file_version="brain.Event:2")
        # START tells TensorBoard to forget what an earlier process wrote past this step.
        self._event(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _event(self, **fields: Any) -> None:
        self.writer.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        summary = summary_pb2.Summary()
        for name, value in values.items():
            summary.value.add(tag=name, simple_value=value)
        self._event(step=step, summary=summary)
        self.file.flush()

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        with Image.open(path) as picture:
            width, height = picture.size
        summary = summary_pb2.Summary()
        value = summary.value.add(tag=name)
        value.image.encoded_image_string, value.image.height, value.image.width = path.read_bytes(), height, width
        value.image.colorspace = 3
        self._event(step=step, summary=summary)
        self.file.flush()

    def close(self) -> None:
        self.writer.close()


class Log:
    """Everything a run says about itself. On processes other than 0 it says nothing."""

    def __init__(
        self, workdir: pathlib.Path, *, main: bool, step: int, total_images: int, images: int, quiet: bool = False
    ):
        self.main, self.path = main, workdir / "metrics.jsonl"
        self.bar = self.events = None
        if main:
            rewind(self.path, step)
            self.events = EventFile(workdir / "events", step)
            self.bar = tqdm(
                total=total_images,
                initial=images,
                unit="img",
                unit_scale=True,
                dynamic_ncols=True,
                disable=quiet,
                smoothing=0.1,
            )

    def write(self, step: int, images: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same to TensorBoard, and the bar moved on."""
        if not self.main:
            return
        append(self.path, {"step": step, "images": images, **values})
        self.events.scalars(step, {k: v for k, v in values.items() if isinstance(v, float)})
        self.bar.set_postfix_str(f"loss {values.get('loss', math.nan):.4f}", refresh=False)
        self.bar.update(images - self.bar.n)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """A PNG, to TensorBoard."""
        if self.main:
            self.events.image(step, name, path)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.events.close()
