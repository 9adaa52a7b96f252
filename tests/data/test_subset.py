"""Parts of a source: evenly spread, because files are ordered by class."""

import numpy as np

from ldm_jax.data import SOURCES
from ldm_jax.data.subset import Subset, spread


def test_spread_items_are_even_and_keep_what_the_source_says():
    source = SOURCES["shapes"](split="val", size=10)
    part = spread(source, 4)
    assert len(part) == 4 and part.num_classes == source.num_classes and part.has_text
    for i, j in enumerate((0, 2, 5, 7)):
        assert part[i]["text"] == source[j]["text"] and np.array_equal(part[i]["image"], source[j]["image"])
        assert part.where(i) == source.where(j)
    assert spread(source, 10) is source and spread(source, 99) is source


def test_a_subset_is_what_was_asked_for():
    source = SOURCES["shapes"](split="val", size=10)
    assert [Subset(source, range(3, 6))[i]["text"] for i in range(3)] == [source[i]["text"] for i in range(3, 6)]
