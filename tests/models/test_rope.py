"""Rotary embedding: it is a rotation, and only differences of positions show. (Against diffusers: tests/oracle/test_rope.py.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.dit import DiT
from ldm_jax.models.rope import axial_angles, grid_positions, rotate

R = np.random.RandomState(0)


def test_positions_run_row_by_row():
    np.testing.assert_array_equal(grid_positions(2, 3), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])


def test_products_depend_on_the_difference_of_positions_alone():
    q, k = (R.randn(1, 1, 1, 16).astype(np.float32) for _ in range(2))
    at = lambda x, row, column: rotate(jnp.asarray(x), axial_angles(np.array([[row, column]]), (8, 8), 100.0))  # noqa: E731
    product = lambda a, b: float(jnp.sum(at(q, *a) * at(k, *b)))  # noqa: E731
    assert product((0, 0), (2, 3)) == pytest.approx(product((4, 1), (6, 4)), rel=1e-5)
    assert product((0, 0), (2, 3)) != pytest.approx(product((0, 0), (3, 2)), rel=1e-2)
    assert float(jnp.linalg.norm(at(q, 5, 7))) == pytest.approx(float(np.linalg.norm(q)), rel=1e-6)


@pytest.mark.parametrize("parts", [(8,), (8, 7), (8, 0)])
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(ValueError, match="parts are"):
        axial_angles(grid_positions(2, 2), parts, 100.0)


def test_rope_alone_tells_a_dit_where_patches_lie():
    """Without any position the output rolls with the input; with rope alone it no longer does."""
    module = DiT(patch_size=1, hidden_size=8, depth=1, num_heads=2, in_channels=2, pos_embed="learned", rope_theta=1.0)
    x, t = R.randn(1, 4, 4, 2).astype(np.float32), np.array([3.0], np.float32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, t))["params"]
    params = jax.tree.map(lambda a: (0.5 * R.randn(*a.shape)).astype(np.float32), shapes)
    params["position"] = np.zeros_like(params["position"])
    apply = lambda y, net: np.asarray(net.apply({"params": params}, y, t))  # noqa: E731
    rolled, still = np.roll(x, (1, 2), (1, 2)), module.clone(rope_theta=0.0)
    np.testing.assert_allclose(apply(rolled, still), np.roll(apply(x, still), (1, 2), (1, 2)), atol=1e-5)
    # Angles are whole radians, not quarter turns: positions show, so the output does not simply roll with the input.
    assert np.abs(apply(rolled, module) - np.roll(apply(x, module), (1, 2), (1, 2))).max() > 1e-2


def test_heads_that_cannot_be_cut_are_named():
    module = DiT(patch_size=1, hidden_size=12, depth=1, num_heads=2, rope_theta=100.0)
    with pytest.raises(ValueError, match="multiple of 4 channels"):
        module.init(jax.random.key(0), np.zeros((1, 4, 4, 4), np.float32), np.zeros(1, np.float32))
