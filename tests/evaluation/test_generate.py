"""Balances of labels."""

import numpy as np
import pytest

from ldm_jax.evaluation import generate


class Source:
    """Items of class 0, 0, 0, 1, 2, 2 as a source has them."""

    classes = (0, 0, 0, 1, 2, 2)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"label": np.int32(self.classes[i])}


def test_label_balances():
    def count(balance, training=None):
        return np.bincount(generate.balanced(balance, 600, 3, 0, training), minlength=3).tolist()

    assert count("equal") == [200, 200, 200]
    assert count("dataset", Source()) == [300, 100, 200]
    assert generate.balanced("dataset", 3, 3, 0, Source()).tolist() == [0, 0, 2], "at even distances"
    drawn = count("random")
    assert sum(drawn) == 600 and drawn != [200, 200, 200] and min(drawn) > 150
    assert generate.balanced("random", 9, 3, 1).tolist() != generate.balanced("random", 9, 3, 0).tolist()
    with pytest.raises(ValueError, match="'even' is unknown; there are equal, random, dataset"):
        generate.balanced("even", 9, 3, 0)
