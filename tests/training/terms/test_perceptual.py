"""Perceptual distances: of a classifier, and of the two files of LPIPS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import MODELS
from ldm_jax.training import frozen_networks, spaces
from ldm_jax.training.task import Context
from ldm_jax.training.terms import perceptual
from ldm_jax.training.terms.term import Seen

X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3)), jnp.float32)


def test_the_distance_of_a_classifier():
    network = MODELS["classifier"](num_classes=4, widths=(4, 8), norm_num_groups=2)
    params = network.init(jax.random.key(0), X)["params"]
    order = []

    def layers(x):
        activations = perceptual.activations(network, params, x)
        order.extend(activations)
        return activations

    shapes = jax.eval_shape(layers, X)
    sizes = [shapes[name].shape[1:] for name in order]
    assert len(sizes) == 6 and sizes[0] == (4, 4, 4) and sizes[-1] == (2, 2, 8), "the deepest is the last"
    distance = jax.jit(lambda x, y: perceptual.classifier_distance(network, params, x, y))
    np.testing.assert_allclose(distance(X, X), 0, atol=1e-12)
    np.testing.assert_allclose(distance(X, -X), distance(-X, X), rtol=1e-5)


def test_the_two_files_of_lpips_are_handed_on(monkeypatch):
    class Squares:
        def apply(self, variables, x, y):
            return (variables["params"] * (x - y) ** 2).mean((1, 2, 3))

    monkeypatch.setattr(
        frozen_networks.lpips, "load", lambda *files: (Squares(), {"a.pth,b.pth": 3.0}[",".join(files)])
    )
    term = perceptual.make(Context(space=spaces.images(8), load=frozen_networks.load), name="lpips:a.pth,b.pth")
    assert term.weight == 1.0
    seen = Seen(np.ones((2, 1, 1, 3)), y=np.zeros((2, 1, 1, 3)))
    assert term.loss(None, term.frozen, seen).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "block, said",
    [
        ({"name": "vgg:a"}, "task.perceptual.name is 'vgg:a'"),
        ({"name": "lpips:a.pth"}, "expected lpips:VGG16.pth,HEADS.pth or classifier:DIR"),
        ({"name": "classifier:DIR", "weight": 0}, "task.perceptual.weight is 0"),
    ],
)
def test_what_is_off_in_the_block_is_named(block, said):
    with pytest.raises(ValueError, match=said):
        perceptual.make(Context(), **block)
