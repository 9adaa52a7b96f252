import pytest

from ldm_jax.sweeps import chain, fixed, product, sweep, zipit


def test_product_varies_the_last_list_fastest():
    assert product(sweep("a.b", [1, 2]), sweep("c", ["x", "y"]), fixed("d", None)) == [
        {"a.b": 1, "c": "x", "d": None},
        {"a.b": 1, "c": "y", "d": None},
        {"a.b": 2, "c": "x", "d": None},
        {"a.b": 2, "c": "y", "d": None},
    ]
    assert product() == [{}]
    assert product(sweep("a", []), sweep("b", [1])) == []


def test_zipit_and_chain():
    pairs = zipit(sweep("depth", [2, 4]), sweep("images", [10, 20]))
    assert pairs == [{"depth": 2, "images": 10}, {"depth": 4, "images": 20}]
    assert chain(pairs, fixed("depth", 8), []) == [*pairs, {"depth": 8}]
    assert len(product(pairs, sweep("lr", [0.1, 0.2, 0.3]))) == 6


def test_the_lists_are_not_shared():
    base = fixed("a", 1)
    product(base, sweep("b", [1]))[0]["a"] = 2
    chain(base)[0]["a"] = 3
    assert base == [{"a": 1}]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"'lr' is set by two"):
        product(sweep("lr", [1]), sweep("lr", [2]))
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        zipit(sweep("a", [1, 2]), sweep("b", [1, 2, 3]))
