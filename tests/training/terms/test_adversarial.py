"""The terms of the adversarial term, each against its formula written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import MODELS
from ldm_jax.training.task import Context
from ldm_jax.training.terms import adversarial
from ldm_jax.training.terms.term import balanced

REAL, FAKE = np.random.default_rng(0).normal(0, 2, (2, 3, 4, 5, 1)).astype(np.float32)


def test_losses_at_known_logits():
    np.testing.assert_allclose(
        adversarial.LOSSES["hinge"](REAL, FAKE),
        (np.maximum(0, 1 - REAL).mean() + np.maximum(0, 1 + FAKE).mean()) / 2,
        rtol=1e-6,
    )
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    cross_entropy = -(np.log(sigmoid(REAL)).mean() + np.log(1 - sigmoid(FAKE)).mean()) / 2
    for name in ("vanilla", "non_saturating"):
        np.testing.assert_allclose(adversarial.LOSSES[name](REAL, FAKE), cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(
        adversarial.generator_loss("non_saturating", FAKE), -np.log(sigmoid(FAKE)).mean(), rtol=1e-5
    )
    for name in ("hinge", "vanilla"):
        np.testing.assert_allclose(adversarial.generator_loss(name, FAKE), -FAKE.mean(), rtol=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_gradients_within_its_bounds():
    a, b = jnp.full((2, 3), 2.0), jnp.full((2, 3), 0.5)
    np.testing.assert_allclose(balanced(a, b), 4.0, rtol=1e-3)
    assert balanced(1e3 * a, 0 * b) == 1e4
    assert balanced(0 * a, b) == 0


def test_r1_is_the_squared_slope_of_an_image_whatever_the_number_of_patches():
    w = jnp.asarray([1.0, -2.0, 0.5])
    x = jnp.zeros((2, 4, 4, 3))

    def one(x):
        return jnp.sum(x @ w, axis=(1, 2))[:, None, None, None]

    def four(x):
        return jnp.broadcast_to(one(x), (2, 2, 2, 1))

    for logits in (one, four):
        np.testing.assert_allclose(adversarial.slope(logits, x), 16 * 5.25, rtol=1e-6)


def test_lecam_holds_each_side_to_the_running_mean_of_the_other():
    anchors = adversarial.Anchors(jnp.float32(0.5), jnp.float32(-1.0))
    expected = (np.maximum(0, REAL + 1.0) ** 2).mean() + (np.maximum(0, 0.5 - FAKE) ** 2).mean()
    np.testing.assert_allclose(adversarial.lecam_error(REAL, FAKE, anchors), expected, rtol=1e-5)
    for _ in range(500):
        anchors = adversarial.follow(anchors, REAL, FAKE)
    np.testing.assert_allclose(anchors, (REAL.mean(), FAKE.mean()), atol=0.02)


def test_the_penalty_of_r1_has_a_slope_in_the_parameters():
    def penalty(w):
        return adversarial.slope(lambda x: jnp.tanh(x @ w[:, None]), jnp.ones((1, 2, 2, 3)))

    w, step = jnp.asarray([0.3, -0.1, 0.2]), 1e-3
    numeric = [(penalty(w.at[i].add(step)) - penalty(w.at[i].add(-step))) / (2 * step) for i in range(3)]
    np.testing.assert_allclose(jax.grad(penalty)(w), numeric, rtol=1e-2)


@pytest.mark.parametrize(
    "block, said",
    [
        ({"loss": "wgan"}, "task.adversarial.loss is 'wgan'; there are hinge"),
        ({"norm": "layer"}, "task.adversarial.norm is 'layer'"),
        ({"norm": "batch", "r1": 1.0}, "r1 is 1.0 with norm 'batch'"),
        ({"adaptive": "no"}, "task.adversarial.adaptive is 'no'"),
        ({"weight": -1.0}, "task.adversarial.weight is -1.0"),
        ({"start_images": "soon"}, "task.adversarial.start_images is 'soon'"),
    ],
)
def test_what_is_off_in_the_block_is_named(block, said):
    context = Context(MODELS["autoencoder_tiny"](), optimizer=lambda **overrides: None)
    with pytest.raises(ValueError, match=said):
        adversarial.make(context, **block)
