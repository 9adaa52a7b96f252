"""DiT and TextEncoder: what the equality with diffusers (tests/oracle/test_dit.py) does not see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.dit import DiT, masked_mean, stack_blocks, unstack_blocks
from ldm_jax.models.text import TextEncoder

# Compiling is all that these tests cost: tell LLVM not to try hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

R = np.random.RandomState(0)
X = R.randn(2, 8, 8, 4).astype(np.float32)
T = np.array([3.0, 700.0], np.float32)
TEXT = R.randn(2, 5, 12).astype(np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
SMALL = {"hidden_size": 16, "depth": 2, "num_heads": 2}
KINDS = {
    "label": ({"num_classes": 4}, {"label": np.array([1, 4], np.int32)}),
    "text": ({"text_dim": 12, "adaln": "single"}, {"text": TEXT, "text_mask": MASK}),
    "all": (
        {
            "num_classes": 4,
            "text_dim": 12,
            "qk_norm": True,
            "cross_norm": True,
            "pos_embed": "learned",
            "mlp_ratio": 2.0,
        },
        {"label": np.array([1, 4], np.int32), "text": TEXT, "text_mask": MASK},
    ),
}


@functools.cache
def random_params(kind, scale=0.2):
    """No parameter at zero, or most of the network would not show."""
    arguments, cond = KINDS[kind]
    shapes = jax.eval_shape(lambda: DiT(**SMALL, **arguments).init(jax.random.key(0), X, T, cond))["params"]
    r = np.random.RandomState(1)
    return jax.tree.map(lambda a: (scale * r.randn(*a.shape)).astype(np.float32), shapes)


def loss_and_gradient(module, params, cond):
    f = lambda p: jnp.mean((module.apply({"params": p}, X, T, cond) - X) ** 2)  # noqa: E731
    return jit(jax.value_and_grad(f))(params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_is_zero_and_still_learns(kind):
    arguments, cond = KINDS[kind]
    module = DiT(**SMALL, **arguments, out_channels=8)
    params = jit(module.init)(jax.random.key(0), X, T, cond)["params"]
    out = jit(module.apply)({"params": params}, X, T, cond)
    assert out.shape == (2, 8, 8, 8)
    assert (np.asarray(out) == 0).all()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    # Only the last layer has a gradient at first; once it has moved, every parameter has one.
    r = np.random.RandomState(2)
    jolt = jax.tree.map(lambda a: a + 0.02 * r.randn(*a.shape).astype(np.float32), params)
    gradient = jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, X, T, cond) ** 2)))(jolt)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("kind", "scan", "remat"), [("label", True, False), ("text", False, True), ("all", True, True)]
)
def test_scan_and_remat_change_nothing(kind, scan, remat):
    arguments, cond = KINDS[kind]
    params = random_params(kind)
    loss, gradient = loss_and_gradient(DiT(**SMALL, **arguments), params, cond)
    other = DiT(**SMALL, **arguments, scan_layers=scan, remat=remat)
    shapes = jax.eval_shape(lambda: other.init(jax.random.key(0), X, T, cond))["params"]
    others = stack_blocks(params) if scan else params
    assert jax.tree.map(jnp.shape, others) == jax.tree.map(jnp.shape, shapes)
    other_loss, other_gradient = loss_and_gradient(other, others, cond)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    if scan:
        other_gradient = unstack_blocks(other_gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-3), other_gradient, gradient)


def test_stacked_layers_are_drawn_apart():
    module = DiT(**SMALL, num_classes=4, scan_layers=True)
    params = jit(module.init)(jax.random.key(0), X, T, KINDS["label"][1])["params"]
    kernel = np.asarray(params["blocks"]["mlp"]["linear_1"]["kernel"])
    assert kernel.shape == (2, 16, 64)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_bf16_follows_f32():
    arguments, cond = KINDS["all"]
    params = random_params("all")
    f32 = jit(DiT(**SMALL, **arguments).apply)({"params": params}, X, T, cond)
    bf16 = jit(DiT(**SMALL, **arguments, dtype="bfloat16").apply)({"params": params}, X, T, cond)
    assert bf16.dtype == jnp.float32
    assert 1e-6 < np.abs(bf16 - f32).max() / np.abs(f32).max() < 0.05


def test_conditions_matter_and_padding_does_not():
    arguments, cond = KINDS["all"]
    params = random_params("all")
    apply = jit(lambda cond: DiT(**SMALL, **arguments).apply({"params": params}, X, T, cond))
    out = apply(cond)
    assert np.isfinite(out).all()
    assert np.abs(apply(cond | {"label": np.array([2, 4], np.int32)})[0] - out[0]).max() > 1e-3
    padded, seen = TEXT.copy(), TEXT.copy()
    padded[0, 3:], padded[1] = 50.0, -50.0
    seen[0, 2] += 1.0
    np.testing.assert_array_equal(apply(cond | {"text": padded}), out)
    assert np.abs(apply(cond | {"text": seen})[0] - out[0]).max() > 1e-3


def test_pooled_text_is_the_mean_of_what_is_seen():
    np.testing.assert_allclose(masked_mean(TEXT, MASK), np.stack([TEXT[0, :3].mean(0), np.zeros(12)]), atol=1e-6)
    np.testing.assert_allclose(masked_mean(TEXT, None), TEXT.mean(1), atol=1e-6)


def test_dropout_only_in_training():
    arguments, cond = KINDS["label"]
    module, params = DiT(**SMALL, **arguments, dropout=0.5), random_params("label")
    f = jit(
        lambda key, train: module.apply({"params": params}, X, T, cond, train=train, rngs={"dropout": key}),
        static_argnums=1,
    )
    plain = jit(DiT(**SMALL, **arguments).apply)({"params": params}, X, T, cond)
    np.testing.assert_allclose(f(jax.random.key(0), False), plain, atol=1e-5)
    a, b = f(jax.random.key(0), True), f(jax.random.key(1), True)
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(f(jax.random.key(0), True), a)


@pytest.mark.parametrize(
    ("arguments", "x", "cond", "message"),
    [
        ({"num_classes": 4}, X, {}, "cond lacks 'label'"),
        ({"text_dim": 12}, X, {"text_mask": MASK}, "cond lacks 'text'"),
        ({}, X, {"label": np.zeros(2, int)}, "cond has 'label'"),
        ({"num_classes": 4}, X, {"label": np.zeros(2, int), "text_mask": MASK}, "cond has 'text_mask'"),
        ({"text_dim": 13}, X, {"text": TEXT}, r"text is \(2, 5, 12\); expected \[B, L, 13\]"),
        ({"patch_size": 3}, X, {}, r"x is \(2, 8, 8, 4\)"),
        ({"in_channels": 3}, X, {}, r"expected \[B, H, W, 3\]"),
        ({"num_heads": 3}, X, {}, "hidden_size 16 is not a multiple of num_heads 3"),
        ({"adaln": "zero"}, X, {}, "adaln is 'zero'"),
        ({"pos_embed": "rope"}, X, {}, "pos_embed is 'rope'"),
        ({"attention": "flash"}, X, {}, "implementation is 'flash'"),
    ],
)
def test_mistakes_are_named(arguments, x, cond, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: DiT(**(SMALL | arguments)).init(jax.random.key(0), x, T, cond))


def test_learned_positions_are_for_one_grid():
    arguments, cond = KINDS["all"]
    with pytest.raises(ValueError, match="learned pos_embed is for 16 patches; x has 2 x 4"):
        jax.eval_shape(lambda: DiT(**SMALL, **arguments).apply({"params": random_params("all")}, X[:, :4], T, cond))


def test_text_encoder_is_blind_to_padding_and_finite_without_text():
    module = TextEncoder(vocab_size=20, length=8, width=16, heads=2)
    tokens = np.array([[3, 4, 5, 0, 0], [3, 4, 5, 6, 7], [0, 0, 0, 0, 0]], np.int32)
    params = jit(module.init)(jax.random.key(0), tokens)["params"]
    assert params["token"].shape == (20, 16)
    apply = jit(lambda tokens: module.apply({"params": params}, tokens))
    out = apply(tokens)
    assert out["text"].shape == (3, 5, 16)
    assert out["text"].dtype == jnp.float32
    np.testing.assert_array_equal(out["text_mask"], tokens != 0)
    assert np.isfinite(out["text"]).all()
    assert (np.asarray(out["text"])[~np.asarray(out["text_mask"])] == 0).all()
    np.testing.assert_allclose(apply(tokens[:, :3])["text"][0], out["text"][0, :3], atol=1e-5)
    # Tokenizers of other people pad with other numbers.
    other = jit(module.clone(pad_id=19).apply)({"params": params}, np.where(tokens == 0, 19, tokens))
    np.testing.assert_allclose(other["text"], out["text"], atol=1e-6)
    # Later tokens reach earlier ones, and places are told apart.
    assert np.abs(out["text"][0, 0] - out["text"][1, 0]).max() > 1e-4
    swapped = apply(tokens[:, [1, 0, 2, 3, 4]])["text"]
    assert np.abs(swapped[0, 1] - out["text"][0, 0]).max() > 1e-4
    gradient = jit(jax.grad(lambda p: module.apply({"params": p}, tokens)["text"].sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_text_encoder_names_mistakes():
    for module, tokens, message in (
        (TextEncoder(length=4), np.ones((2, 5), np.int32), r"tokens are \(2, 5\); expected \[B, L\] with L <= 4"),
        (TextEncoder(width=10, heads=4), np.ones((2, 5), np.int32), "width 10 is not a multiple of heads 4"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda module=module, tokens=tokens: module.init(jax.random.key(0), tokens))


@pytest.mark.parametrize("width", [16, 64])
def test_embed_std_zero_gives_conditions_of_one_size_at_any_width(width):
    """With DiT's 0.02 a narrow network starts almost deaf to t, label and text."""
    arguments, cond = KINDS["all"]
    size = {}
    for std in (0.02, 0.0):
        module = DiT(hidden_size=width, depth=1, num_heads=2, embed_std=std, **arguments)
        _, state = module.init_with_output(
            jax.random.key(0), X, T, cond, capture_intermediates=lambda m, _: m.name in ("time", "pooled")
        )
        size[std] = {k: float(jnp.std(v["__call__"][0])) for k, v in state["intermediates"].items()}
    assert all(0.15 < s < 1.5 for s in size[0.0].values()), size
    assert all(s < 0.05 for s in size[0.02].values()), size
