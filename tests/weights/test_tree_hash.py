"""Digests that stand in checkpoints, caches and reports do not change."""

import jax.numpy as jnp
import numpy as np

from ldm_jax.weights.tree_hash import tree_sha256

TREE = {
    "block_1": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float16)},
    "block": {"scale": jnp.ones((), jnp.bfloat16)},
    "block_10": {"n": np.arange(3, dtype=np.int64)[::-1]},
    "lists": [np.zeros(2), np.ones(2, np.int32)],
}


def test_stored_digests_stay():
    assert tree_sha256(TREE) == "80bfffc92f0dea6727137666db9fbb95b9f7a0988a3c761715a9a6544d830bfc"
    facts = "218710e243bc6c5614c5cd1168bf83c6dc480a43f49cb7e28f12f6d0678e99ce"
    assert tree_sha256(TREE, described=False) == facts
    assert tree_sha256({}) != tree_sha256({}, head="options") != tree_sha256(TREE, head="options")


def test_every_name_type_shape_and_value_counts():
    seen = {tree_sha256(TREE)}
    for block in (
        {"kernel": TREE["block_1"]["kernel"] + 1e-6},
        {"kernel": TREE["block_1"]["kernel"].reshape(3, 2)},
        {"kernel": TREE["block_1"]["kernel"].view(np.int32)},
        {"kernels": TREE["block_1"]["kernel"]},
    ):
        seen.add(tree_sha256(TREE | {"block_1": {"bias": TREE["block_1"]["bias"]} | block}))
    assert len(seen) == 5
