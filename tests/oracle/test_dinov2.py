"""DINOv2 against transformers' with the same random weights: every state, at several sizes, to 1e-5; gradients; names and tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file

from ldm_jax import weights
from ldm_jax.evaluation import features, fid
from ldm_jax.models.dinov2 import Dinov2, bicubic
from ldm_jax.weights import dinov2
from tests.pipelines.published import stir

pytestmark = pytest.mark.oracle

PLAIN, REGISTERS = transformers.Dinov2Model, transformers.Dinov2WithRegistersModel
CONFIGS = {
    "gelu": (
        PLAIN,
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 20,
            "patch_size": 4,
        },
    ),
    "SwiGLU, one channel, no mask token, a rest of the image": (
        PLAIN,
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 3,
            "num_channels": 1,
            "image_size": 17,
            "patch_size": 5,
            "qkv_bias": False,
            "use_swiglu_ffn": True,
            "use_mask_token": False,
            "layer_norm_eps": 1e-3,
        },
    ),
    "four registers": (
        REGISTERS,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": 30,
            "patch_size": 5,
            "layerscale_value": 0.5,
        },
    ),
    "one register, SwiGLU": (
        REGISTERS,
        {
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "mlp_ratio": 2,
            "image_size": 12,
            "patch_size": 3,
            "num_register_tokens": 1,
            "qkv_bias": False,
            "use_swiglu_ffn": True,
        },
    ),
}
# As learned, enlarged, and reduced in one direction; whole patches and a rest.
SIZES = (1, 1), (1.6, 2.1), (0.5, 1.7)


@functools.cache
def build(name: str):
    torch.manual_seed(0)
    kind, options = CONFIGS[name]
    return stir(kind(kind.config_class(**options)))


def twin(model, state: dict):
    """A new model like `model`, with the tensors `state`."""
    anew = type(model)(model.config).eval()
    anew.load_state_dict(state)
    return anew


def pixels_for(module: Dinov2, size=(1, 1)) -> np.ndarray:
    height, width = (int(module.image_size * k) for k in size)
    return np.random.default_rng(0).normal(size=(2, height, width, module.num_channels)).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def same(ours, theirs, tolerance: float = 1e-5) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_states(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    module, params = weights.load(tmp_path)
    apply = jax.jit(module.apply)
    for size in SIZES:
        pixels = pixels_for(module, size)
        got, expected = apply({"params": params}, pixels), model(nchw(pixels), output_hidden_states=True)
        same(got.last_hidden_state, expected.last_hidden_state)
        same(got.pooled, expected.pooler_output)
        assert len(got.hidden_states) == len(expected.hidden_states) == module.num_hidden_layers + 1
        for state, reference in zip(got.hidden_states, expected.hidden_states):
            same(state, reference)
    if module.use_mask_token:
        mask = np.random.default_rng(1).random((2, (module.image_size // module.patch_size) ** 2)) < 0.4
        pixels = pixels_for(module)
        expected = model(nchw(pixels), bool_masked_pos=torch.tensor(mask))
        same(apply({"params": params}, pixels, mask).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("name", ["gelu", "one register, SwiGLU"])
def test_gradients(name, tmp_path):
    model = twin(build(name), build(name).state_dict())
    model.save_pretrained(tmp_path / "weights")
    module, params = weights.load(tmp_path / "weights")
    pixels = pixels_for(module, (1.5, 0.6))
    expected = model(nchw(pixels)).last_hidden_state
    weight = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weight)).sum().backward()
    slopes = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    twin(model, slopes).save_pretrained(tmp_path / "slopes")
    _, slopes_of_torch = weights.load(tmp_path / "slopes")

    got = jax.jit(jax.grad(lambda p: jnp.vdot(module.apply({"params": p}, pixels).last_hidden_state, weight)))(params)
    for (path, reference), slope in zip(jax.tree_util.tree_leaves_with_path(slopes_of_torch), jax.tree.leaves(got)):
        # The bias of the keys moves every score of a query alike: its gradient is zero but for rounding.
        assert np.linalg.norm(slope - reference) < 1e-3 * max(np.linalg.norm(reference), 1e-2), path


@pytest.mark.parametrize("length, n", [(37, 16), (37, 57), (5, 7)])
def test_positions_as_published(length, n):
    """The code that DINOv2 came with names a scale, n + 0.1 patches for `length`, in place of a size."""
    grid = np.random.default_rng(0).normal(size=(length, length, 3)).astype(np.float32)
    scale = (n + 0.1) / length
    theirs = torch.nn.functional.interpolate(nchw(grid[None]), scale_factor=scale, mode="bicubic")[0]
    matrix = bicubic(length, n, 0.1)
    ours = np.einsum("ri,ijd,cj->drc", matrix, grid, matrix)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)
    assert np.abs(ours - np.einsum("ri,ijd,cj->drc", bicubic(length, n), grid, bicubic(length, n))).max() > 1e-3

    module = Dinov2(4, 1, 1, 1, image_size=length, patch_size=1, interpolate_offset=0.1)
    got = module.apply({}, jnp.asarray(grid), n, n, method="_resized")
    np.testing.assert_allclose(got.transpose(2, 0, 1), ours, atol=1e-5)


def test_bfloat16(tmp_path):
    build("gelu").save_pretrained(tmp_path)
    module, params = weights.load(tmp_path)
    low, rounded = weights.load(tmp_path, dtype="bfloat16")
    pixels = pixels_for(module)
    exact = jax.jit(module.apply)({"params": params}, pixels)
    got = jax.jit(low.apply)({"params": rounded}, pixels)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact)):
        assert a.dtype == jnp.float32 and 1e-4 < np.abs(a - b).max() < 0.1 * np.abs(b).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_folders_there_and_back(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "theirs")
    module, params = weights.load(tmp_path / "theirs")
    weights.save(tmp_path / "ours", module, params)
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
    again, faults = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(faults.values()), faults
    for key, value in again.state_dict().items():
        np.testing.assert_array_equal(value, model.state_dict()[key], err_msg=key)
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    differing = {k for k, v in again.config.to_dict().items() if v != model.config.to_dict()[k]}
    assert differing <= {"_name_or_path"}
    assert weights.load(tmp_path / "ours")[0] == module


def test_published_configs():
    """What the files of the published networks hold, and the defaults of what they leave out."""
    old = {
        "apply_layernorm": True,
        "architectures": ["Dinov2Model"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "out_features": ["stage40"],
        "out_indices": [40],
        "reshape_hidden_states": True,
        "stage_names": ["stem", "stage1"],
        "torch_dtype": "float32",
        "transformers_version": "4.31.0.dev0",
    }
    giant = {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "image_size": 518}
    assert dinov2.PLAIN.module(old | giant | {"use_swiglu_ffn": True}) == Dinov2(
        1536, 40, 24, image_size=518, use_swiglu_ffn=True
    )
    for form, kind in ((dinov2.PLAIN, PLAIN), (dinov2.REGISTERS, REGISTERS)):
        assert form.module({}) == form.module(kind.config_class().to_dict())


@pytest.mark.parametrize(
    "form, config, message",
    [
        (dinov2.PLAIN, {"window": 3}, r"Dinov2Model: option window \(here 3\) is unknown"),
        (dinov2.PLAIN, {"num_register_tokens": 4}, r"Dinov2Model: option num_register_tokens"),
        (dinov2.PLAIN, {"hidden_act": "relu"}, r"hidden_act is 'relu', expected 'gelu'"),
        (dinov2.PLAIN, {"patch_size": [14, 7]}, r"patch_size is \(14, 7\), expected one whole number"),
        (dinov2.REGISTERS, {"use_mask_token": False}, r"Dinov2WithRegistersModel: option use_mask_token"),
        (dinov2.REGISTERS, {"num_register_tokens": None}, r"num_register_tokens is None"),
    ],
)
def test_what_is_refused(form, config, message):
    with pytest.raises(ValueError, match=message):
        form.module(config)


def test_wrong_inputs_are_named(tmp_path):
    module = Dinov2(6, 1, 4, image_size=8, patch_size=4)
    pixels, key = np.zeros((2, 8, 8, 3), np.float32), jax.random.key(0)
    fit = module.clone(num_attention_heads=3)
    for fault, message in (
        (lambda: module.init(key, pixels), r"hidden_size 6 is not a multiple of num_attention_heads 4"),
        (lambda: fit.init(key, pixels[..., :1]), r"pixel_values are \(2, 8, 8, 1\); expected \[B, H, W, 3\]"),
        (lambda: fit.init(key, pixels[:, :3]), r"expected \[B, H, W, 3\] with H, W >= 4"),
        (lambda: fit.init(key, pixels, np.ones((2, 3), bool)), r"mask is \(2, 3\); expected \(2, 4\)"),
        (
            lambda: fit.clone(use_mask_token=False).init(key, pixels, np.ones((2, 4), bool)),
            r"expected none, for use_mask_token is False",
        ),
        (
            lambda: weights.save(tmp_path, fit.clone(interpolate_offset=0.1), {}),
            r"interpolate_offset is 0.1; expected 0, as in transformers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fault()


def test_features(tmp_path):
    """Of bytes: Pillow's resize, ImageNet's statistics, transformers' class token; positions of 224 pixels need no resizing."""
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    model = stir(PLAIN(transformers.Dinov2Config(**options)))
    model.save_pretrained(tmp_path)
    extractor = features.named(f"dinov2:{tmp_path}")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = model(nchw(((np.stack(large) / 255 - mean) / deviation).astype(np.float32))).pooler_output
    assert (extractor.name, extractor.dim, extractor.resolution) == ("dinov2", 16, 224)
    same(extractor.apply(images), expected)
    assert fid.figure_name(extractor.name) == "fd_dinov2"

    # Positions of another grid are stretched as they were when figures were published.
    wide = PLAIN(transformers.Dinov2Config(**options | {"image_size": 518, "patch_size": 14}))
    stir(wide).save_pretrained(tmp_path / "wide")
    module, params = weights.load(tmp_path / "wide")
    pixels = ((np.stack(large[:1]) / 255 - mean) / deviation).astype(np.float32)
    exact = module.clone(interpolate_offset=0.1).apply({"params": params}, pixels).pooled
    got = features.dinov2(tmp_path / "wide", batch=1).apply(images[:1])
    np.testing.assert_allclose(got, exact, atol=1e-5)
    assert np.abs(got - module.apply({"params": params}, pixels).pooled).max() > 1e-4
