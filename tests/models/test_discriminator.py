"""The plan of the published PatchGAN, and when its state changes. Its numbers are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.discriminator import NORMS, PatchDiscriminator


def test_published_structure():
    """2,768,705 parameters on pairs of images (Isola et al.), of which the other three channels are 3,072."""
    shapes = jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 2_768_705 - 3 * 64 * 16
    module = PatchDiscriminator(2, norm="none")
    x = jax.random.normal(jax.random.key(1), (1, 96, 96, 3))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    assert jax.eval_shape(module.apply, variables, x).shape == (1, 10, 10, 1)
    seen = jax.jit(jax.grad(lambda x: module.apply(variables, x)[0, 5, 5, 0]))(x)
    rows, columns = (np.flatnonzero(np.abs(seen).sum(axes)) for axes in ((0, 2, 3), (0, 1, 3)))
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == 70


@pytest.mark.parametrize("norm", NORMS)
def test_state_changes_in_training_alone(norm):
    module = PatchDiscriminator(4, 1, norm)
    x = 1.0 + jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = jax.jit(module.init, static_argnums=2)(jax.random.key(0), x, True)
    assert ("state" in variables) == (norm in ("batch", "spectral"))
    if norm == "batch":
        start = variables["state"]["norm_1"]
        assert not start["mean"].any() and np.all(start["var"] == 1)

    @jax.jit
    def run(variables):
        evaluated, same = module.apply(variables, x, mutable=["state"])
        trained, new = module.apply(variables, x, train=True, mutable=["state"])
        return evaluated, same, trained, new, module.apply(variables, x, train=True)

    evaluated, same, trained, new, unstored = run(variables)
    state = variables.get("state", {})
    jax.tree.map(np.testing.assert_array_equal, same.get("state", {}), state)
    np.testing.assert_array_equal(trained, unstored)
    changed = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True)]
    # A kernel of one output has one singular value.
    assert changed == {"batch": [True] * 2, "spectral": [True] * 4 + [False] * 2}.get(norm, [])
    assert np.allclose(evaluated, trained, atol=1e-6) == (not changed)


def test_spectral_kernels_start_near_norm_one():
    module = PatchDiscriminator(8, 1, "spectral")
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))
    for name, params in variables["params"].items():
        matrix = np.asarray(params["kernel"]).reshape(-1, params["kernel"].shape[-1]).T
        u, v = (variables["state"][name]["vectors"][k] for k in "uv")
        assert 1 <= np.linalg.norm(matrix, 2) / (u @ matrix @ v) + 1e-6 < 1.1


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_low_precision_computes_what_full_does(norm):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    module = PatchDiscriminator(4, 1, norm)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    both = (module, module.copy(dtype="bfloat16"))
    full, low = jax.jit(lambda v: [m.apply(v, x, train=True) for m in both])(variables)
    assert low.dtype == jnp.float32 and 1e-6 < np.abs(full - low).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"norm": "layer"}, (1, 32, 32, 3), "norm is 'layer', expected one of batch, spectral, group, none"),
        ({"layers": 0}, (1, 32, 32, 3), "layers is 0, expected at least 1"),
        ({}, (1, 32, 23, 3), r"x is \(1, 32, 23, 3\), expected \[B, H, W, C\] with H and W at least 24"),
        ({"layers": 1}, (8, 8, 3), "with H and W at least 6"),
    ],
)
def test_errors(options, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(PatchDiscriminator(**options).init, jax.random.key(0), jnp.zeros(shape))
