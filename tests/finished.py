"""Finished runs by their config: each is trained once in a worker of the tests, and a test that needs one gets a copy."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.training import loop


@functools.cache
def _store() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()  # removed when the worker ends


def finished(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """A run of `config` in `workdir`, as `loop.train` leaves it, and what that returns."""
    kept = pathlib.Path(_store().name) / hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()
    result = kept.with_suffix(".json")
    if not result.exists():
        result.write_text(json.dumps(loop.train(config, kept, quiet=True)))
    shutil.copytree(kept, workdir, dirs_exist_ok=True)
    return json.loads(result.read_text())
