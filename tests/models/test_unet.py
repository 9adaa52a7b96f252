"""The U-Net's own promises: options, conditions, errors. Its numbers are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import MODELS
from ldm_jax.models.unet import UNet

PLAIN = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
TEXT = {
    **PLAIN,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
    "transformer_layers_per_block": 2,
}
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
T = jnp.array([3.0, 500.0])
LABEL = {"label": jnp.array([1, 5])}
TEXTS = {"text": jax.random.normal(jax.random.key(1), (2, 4, 6))}


def init(module, cond):
    return jax.jit(module.init)(jax.random.key(2), X, T, cond)["params"]


def randomized(params):
    """Every parameter moved, so that the zero-initialized branches speak."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)])


def test_starts_at_zero_and_conditions_matter():
    module = MODELS["unet"](**PLAIN, num_class_embeds=5, null_class=True)
    params = init(module, LABEL)
    assert params["class_embedding"]["embedding"].shape == (6, 32)
    apply = jax.jit(lambda p, x, t, cond: module.apply({"params": p}, x, t, cond))
    assert not np.any(apply(params, X, T, LABEL))
    params = randomized(params)
    base = apply(params, X, T, LABEL)
    other = apply(params, X, T, {"label": jnp.array([1, 4])})
    np.testing.assert_allclose(base[0], other[0], atol=1e-6)
    assert np.abs(base[1] - other[1]).max() > 1e-3
    assert np.abs(apply(params, X, T + 100, LABEL) - base).max() > 1e-3


def test_scan_and_remat_change_nothing():
    plain, scanned = UNet(**TEXT), UNet(**TEXT, scan_layers=True, remat=True)
    params = randomized(init(plain, TEXTS))

    def stack(tree):
        if not isinstance(tree, dict):
            return tree
        tree = {k: stack(v) for k, v in tree.items()}
        if "transformer_blocks_0" in tree:
            blocks = [tree.pop("transformer_blocks_0"), tree.pop("transformer_blocks_1")]
            tree["transformer_blocks"] = jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)
        return tree

    def loss(module):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(module.apply({"params": p}, X, T, TEXTS)).mean()))

    value, grads = loss(plain)(params)
    value2, grads2 = loss(scanned)(stack(params))
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(stack(grads)), jax.tree.leaves(grads2), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-7)


def test_ncsnpp_starts_at_zero_and_makes_as_many_channels_as_it_is_asked():
    options = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    module = UNet(**{**PLAIN, **options, "out_channels": 5, "norm_num_groups": None})
    params = init(module, {})
    run = jax.jit(lambda p, x: module.apply({"params": p}, x, T, {}))
    assert run(params, X).shape == (2, 8, 8, 5)
    assert not np.any(run(params, X))
    # Of the skip path alone: everything else that reaches the output is zero still.
    moved = params | {"up_blocks_0": randomized(params["up_blocks_0"])}
    assert np.abs(run(moved, X)).max() > 1e-3


def test_masked_tokens_are_not_seen():
    module = UNet(**TEXT)
    params = randomized(init(module, TEXTS))
    apply = jax.jit(lambda cond: module.apply({"params": params}, X, T, cond))
    mask = jnp.array([[True, True, False, False], [True, True, True, True]])
    moved = {"text": TEXTS["text"].at[:, 2:].add(1.0), "text_mask": mask}
    a, b = apply({**TEXTS, "text_mask": mask}), apply(moved)
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)
    assert np.abs(a[1] - b[1]).max() > 1e-3


def test_bfloat16_compute_over_float32_parameters():
    module, low = UNet(**PLAIN), UNet(**PLAIN, dtype="bfloat16")
    params = randomized(init(low, {}))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    run = jax.jit(lambda p: (module.apply({"params": p}, X, T, {}), low.apply({"params": p}, X, T, {})))
    full, half = run(params)
    assert half.dtype == jnp.float32
    difference = np.abs(full - half).mean() / np.abs(full).mean()
    assert 1e-6 < difference < 0.05


def test_dropout_only_in_training():
    module = UNet(**PLAIN, dropout=0.5)
    params = randomized(init(module, {}))
    run = jax.jit(
        lambda key: module.apply({"params": params}, X, T, {}, train=True, rngs={"dropout": key}), static_argnums=()
    )
    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 1e-3
    still = jax.jit(lambda: module.apply({"params": params}, X, T, {}))()
    assert np.isfinite(still).all()


@pytest.mark.parametrize(
    ("options", "cond", "message"),
    [
        ({"num_class_embeds": 5}, {}, "lacks 'label'"),
        ({}, LABEL, "holds 'label'"),
        ({**TEXT}, {}, "lacks 'text'"),
        ({**TEXT}, {"text": jnp.ones((2, 4, 7))}, "7 channels, expected 6"),
        ({"in_channels": 4}, {}, "expected .B, H, W, 4."),
        ({"norm_num_groups": 3}, {}, "norm_num_groups 3 does not divide"),
        ({"down_block_types": ("DownBlock2D",)}, {}, "down_block_types has 1 entries: expected 2"),
        ({"up_block_types": ("UpBlock2D", "KUpBlock2D")}, {}, "'KUpBlock2D': expected one of"),
        ({"resnet_time_scale_shift": "ada"}, {}, "resnet_time_scale_shift is 'ada'"),
        ({"null_class": True}, {}, "null_class needs num_class_embeds"),
        ({"attention_head_dim": 5}, {}, "attention_head_dim 5 does not divide"),
        ({**TEXT, "time_cond_proj_dim": 4}, {**TEXTS, "guidance": jnp.ones((2, 5))}, "5 channels, expected 4"),
        ({}, {"guidance": jnp.ones((2, 5))}, "holds 'guidance'"),
        ({"norm_num_groups": None}, {}, "norm_num_groups is None: expected a number, unless all"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, {}, "none after another kind of block"),
        ({"up_block_types": ("SkipUpBlock2D", "UpBlock2D")}, {}, "or before one in up_block_types"),
        (
            {"down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D")},
            {},
            "'SimpleCrossAttnDownBlock2D': expected",
        ),
    ],
)
def test_errors(options, cond, message):
    module = UNet(**{**PLAIN, **options})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), X, T, cond)


def test_unknown_option():
    with pytest.raises(TypeError, match="widht"):
        UNet(widht=3)
