"""The classifier of noisy data: it begins without an opinion, takes the time, pools any resolution, and fails early on wrong shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import models
from ldm_jax.models.noisy_classifier import NoisyClassifier

OPTIONS = {"num_classes": 3, "block_out_channels": (8, 16), "attention_head_dim": 8, "norm_num_groups": 4}


def test_logits_depend_on_the_time_and_fit_any_resolution():
    module = NoisyClassifier(**OPTIONS, layers_per_block=1, attention_levels=1)
    params = jax.jit(lambda key: models.init(module, key))(jax.random.key(0))["params"]
    x, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 3)), jnp.asarray([10.0, 900.0])
    np.testing.assert_array_equal(module.apply({"params": params}, x, t), np.zeros((2, 3)))
    keys = iter(jax.random.split(jax.random.key(2), 200))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    apply = jax.jit(lambda x, t: module.apply({"params": params}, x, t))
    assert np.all(np.abs(apply(x, t) - apply(x, t[::-1])) > 1e-4)
    assert module.apply({"params": params}, jnp.concatenate([x, x], 1), t).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "shape", "said"),
    [
        ({}, (1, 5, 4, 3), "multiples of 2"),
        ({}, (1, 4, 4, 4), r"expected \[B, H, W, 3\]"),
        ({"norm_num_groups": 3}, (1, 4, 4, 3), "norm_num_groups 3 does not divide block_out_channels 8"),
        ({"attention_head_dim": 5}, (1, 4, 4, 3), "attention_head_dim 5 does not divide 16"),
    ],
)
def test_errors(options, shape, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(NoisyClassifier(**OPTIONS | options).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(1))
