"""What the tests of data share."""

import pytest

from ldm_jax.data import SOURCES
from tests.data.sets import write, zipped


@pytest.fixture(params=["folder", "zip"])
def build(request, tmp_path):
    """files -> (split, **options) -> source, as a folder and as a zip file."""

    def make(files):
        make_set = {
            "folder": lambda: write(tmp_path / "set", files),
            "zip": lambda: zipped(tmp_path / "set.zip", files),
        }
        path = make_set[request.param]()
        return lambda split="train", **options: SOURCES[request.param](split=split, path=path, **options)

    return make
