"""The classifier learns, and fails early on wrong shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.models import MODELS
from ldm_jax.models.classifier import Classifier


def test_learns_three_textures():
    module = MODELS["classifier"](num_classes=3, widths=(8, 16), norm_num_groups=4)
    random = np.random.default_rng(0)
    label = random.integers(0, 3, 96)
    stripes = np.indices((8, 8)).astype(np.float32) % 2 * 2 - 1
    textures = np.stack([stripes[0], stripes[1], stripes[0] * stripes[1]])[..., None].repeat(3, -1)
    x = (textures[label] * random.choice([-1, 1], (96, 1, 1, 1)) + random.normal(size=(96, 8, 8, 3))).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), x[:1])["params"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits, _ = module.apply({"params": params}, x[:48])
            return optax.softmax_cross_entropy_with_integer_labels(logits, label[:48]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(60):
        params, state = step(params, state)
    logits, features = jax.jit(module.apply)({"params": params}, x[48:])
    assert (np.argmax(logits, -1) == label[48:]).mean() > 0.8
    assert features.shape == (48, 32) and features.dtype == jnp.float32


def test_errors():
    with pytest.raises(ValueError, match="multiples of 8"):
        jax.eval_shape(Classifier().init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    with pytest.raises(ValueError, match="norm_num_groups 5 does not divide"):
        jax.eval_shape(Classifier(norm_num_groups=5).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
