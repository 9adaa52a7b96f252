"""One training a folder: two processes that train in one folder would overwrite each other's checkpoints."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def only_one(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a run while the block runs. Makes the folder. Raises ValueError when another process holds the lock."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{workdir} is in use by another training process") from None
        yield
