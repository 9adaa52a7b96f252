"""The parts of Inception in which TensorFlow's graph differs from other libraries', each on numbers worked out by
hand.
"""

import jax
import numpy as np
import pytest

from ldm_jax.models import inception


def test_resize_has_no_half_pixel_centre():
    """Pixel i of the output reads the input at i * in / out: the first one is the first, the last ones repeat the
    edge.
    """
    ramp = np.arange(4, dtype=np.float32)[None, :, None, None] * np.ones((1, 1, 4, 1), np.float32)
    resize = jax.jit(inception.resize, static_argnums=1)
    np.testing.assert_allclose(resize(ramp, 8)[0, :, 0, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    across = resize(ramp.transpose(0, 2, 1, 3), 6)
    np.testing.assert_allclose(across[0, 2, :, 0], np.minimum(np.arange(6) * 2 / 3, 3), rtol=1e-6)
    np.testing.assert_allclose(resize(ramp, 2)[0, :, 0, 0], [0, 2])
    image = np.random.default_rng(0).normal(size=(2, 299, 299, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize(image, 299), image)


def test_preprocess_range():
    images = np.array([0, 128, 255], np.uint8)[:, None, None, None] * np.ones((1, 5, 7, 3), np.uint8)
    out = np.asarray(jax.jit(inception.preprocess)(images))
    assert out.shape == (3, 299, 299, 3)
    np.testing.assert_array_equal(out.reshape(3, -1), np.array([[-1], [0], [127 / 128]]) * np.ones((1, 299 * 299 * 3)))


def test_average_pool_does_not_count_its_padding():
    ones = np.ones((1, 4, 5, 2), np.float32)
    np.testing.assert_array_equal(jax.jit(inception.average_pool)(ones), ones)


def test_features_by_name():
    shapes = jax.eval_shape(
        inception.InceptionV3(tuple(inception.FEATURES)).init_with_output,
        jax.random.key(0),
        np.zeros((2, 8, 8, 3), np.uint8),
    )[0]
    assert {name: leaf.shape for name, leaf in shapes.items()} == {n: (2, d) for n, d in inception.FEATURES.items()}
    early = jax.eval_shape(inception.InceptionV3(("192",)).init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8))
    assert sorted(early["params"]) == [f"Conv2d_{n}" for n in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    with pytest.raises(ValueError, match=r"unknown Inception features \['pool3'\]"):
        jax.eval_shape(inception.InceptionV3(("pool3",)).init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8))


def test_products_are_in_full_precision_on_an_accelerator(monkeypatch):
    """The default there is a reduced one, which shows in FID."""
    network, images = inception.InceptionV3(("logits",)), np.zeros((1, 8, 8, 3), np.uint8)
    params = jax.eval_shape(network.init, jax.random.key(0), images)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    precisions = {"conv_general_dilated": [], "dot_general": []}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in precisions:
                precisions[equation.primitive.name].append(equation.params["precision"])
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(inner, "eqns"):
                    visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(network.apply)(params, images).jaxpr)
    assert len(precisions["conv_general_dilated"]) + len(precisions["dot_general"]) == 95
    assert {*precisions["conv_general_dilated"], *precisions["dot_general"]} == {(jax.lax.Precision.HIGHEST,) * 2}
