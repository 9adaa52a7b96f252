"""CLIP against transformers' with the same random weights: every state, pooled and projected output to 1e-5; names and tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from ldm_jax import weights
from ldm_jax.models.clip import CLIP, CLIPText, CLIPVision
from ldm_jax.weights import clip, layout

pytestmark = pytest.mark.oracle

FORMATS = {
    "CLIPTextModel": clip.TEXT,
    "CLIPTextModelWithProjection": clip.TEXT_PROJECTION,
    "CLIPVisionModel": clip.VISION,
    "CLIPVisionModelWithProjection": clip.VISION_PROJECTION,
    "CLIPModel": clip.FULL,
}
TEXTS = {
    "old end, quick_gelu": {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "eos_token_id": 2,
        "projection_dim": 24,
    },
    "new end, gelu": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 120,
        "eos_token_id": 50,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
        "projection_dim": 40,
    },
    "short, one head": {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 51,
        "eos_token_id": 50,
        "max_position_embeddings": 10,
        "projection_dim": 16,
    },
}
VISIONS = {
    "quick_gelu": {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 24,
    },
    "gelu, a rest of the image": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 17,
        "patch_size": 5,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
        "projection_dim": 40,
    },
    "one patch, one channel": {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 6,
        "patch_size": 6,
        "num_channels": 1,
        "projection_dim": 16,
    },
}
# Rows end at 50, the largest token of the first two; what pads them is the end itself, a smaller token, a larger one.
TOKENS = np.array(
    [
        [7, 3, 31, 12, 50, 50, 50, 50, 50, 50],
        [7, 9, 50, 1, 1, 1, 1, 1, 1, 1],
        [7, 2, 44, 44, 8, 5, 50, 60, 60, 60],
    ]
)
MASK = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])


def config_of(name: str, text: dict, vision: dict):
    if name == "CLIPModel":
        return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    return transformers.CLIPTextConfig(**text) if "Text" in name else transformers.CLIPVisionConfig(**vision)


def build(name: str, text: dict = TEXTS["new end, gelu"], vision: dict = VISIONS["gelu, a rest of the image"]):
    """(torch's model, its state, our module, its parameters)."""
    torch.manual_seed(0)
    original = getattr(transformers, name)(config_of(name, text, vision)).eval()
    for parameter in original.parameters():
        # Norms start at one, biases at zero, most weights near it: random ones show a swap, and a head that matters.
        parameter.data += (0.05 if parameter.ndim < 2 else 0.2) * torch.randn_like(parameter)
    state = {key: value.detach().numpy() for key, value in original.state_dict().items()}
    module = FORMATS[name].module(original.config.to_dict())
    return original, state, module, read(name, module, state)


def read(name: str, module, state: dict) -> dict:
    return layout.read(FORMATS[name].table(module), FORMATS[name].shapes(module), layout.tensors(state))


def tokens_for(module: CLIPText) -> np.ndarray:
    return np.minimum(TOKENS, module.vocab_size - 1)


def pixels_for(module: CLIPVision, count: int = 2) -> np.ndarray:
    shape = (count, module.image_size, module.image_size, module.num_channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def same(ours, theirs, tolerance: float = 1e-5) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("options", TEXTS.values(), ids=TEXTS)
def test_text(options):
    original, _, module, params = build("CLIPTextModelWithProjection", text=options)
    tokens = tokens_for(module)
    ids = torch.tensor(tokens)
    apply = jax.jit(module.apply, static_argnames="skip")
    for mask in (None, MASK):
        got = apply({"params": params}, tokens, mask=mask)
        kwargs = {} if mask is None else {"attention_mask": torch.tensor(mask)}
        expected = original(ids, output_hidden_states=True, **kwargs)
        bare = original.text_model(ids, **kwargs)
        same(got.last_hidden_state, expected.last_hidden_state)
        same(got.pooled, bare.pooler_output)
        same(got.text_embeds, expected.text_embeds)
        assert len(got.hidden_states) == len(expected.hidden_states) == module.num_hidden_layers + 1
        for state, reference in zip(got.hidden_states, expected.hidden_states):
            same(state, reference)
    last = module.num_hidden_layers
    skipped = apply({"params": params}, tokens, skip=last, mask=MASK)
    same(skipped.last_hidden_state, original.text_model.final_layer_norm(expected.hidden_states[-(last + 1)]))
    same(skipped.pooled, bare.pooler_output)
    assert len(skipped.hidden_states) == last + 1


def test_the_end_of_a_text():
    """Rows whose largest token is not the end tell the two poolings apart."""
    for options, ends in ((TEXTS["old end, quick_gelu"], [4, 2, 7]), (TEXTS["new end, gelu"], [4, 2, 6])):
        _, _, module, params = build("CLIPTextModel", text=options)
        got = jax.jit(module.apply)({"params": params}, TOKENS)
        np.testing.assert_array_equal(got.pooled, got.last_hidden_state[np.arange(3), ends])
        assert got.text_embeds is None


@pytest.mark.parametrize("options", VISIONS.values(), ids=VISIONS)
def test_vision(options):
    original, _, module, params = build("CLIPVisionModelWithProjection", vision=options)
    pixels = pixels_for(module)
    got = jax.jit(module.apply)({"params": params}, pixels)
    expected = original(nchw(pixels), output_hidden_states=True)
    same(got.last_hidden_state, expected.last_hidden_state)
    same(got.pooled, original.vision_model(nchw(pixels)).pooler_output)
    same(got.image_embeds, expected.image_embeds)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for state, reference in zip(got.hidden_states, expected.hidden_states):
        same(state, reference)


@pytest.mark.parametrize("text, vision", list(zip(TEXTS.values(), VISIONS.values())), ids=TEXTS)
def test_both(text, vision):
    original, _, module, params = build("CLIPModel", text, vision)
    tokens, pixels = tokens_for(module.text), pixels_for(module.vision)

    @jax.jit
    def run(variables):
        sides = (
            module.apply(variables, tokens, MASK, method="embed_text"),
            module.apply(variables, pixels, method="embed_image"),
        )
        return module.apply(variables, tokens, pixels, MASK), *sides

    got, text_embeds, image_embeds = run({"params": params})
    expected = original(torch.tensor(tokens), nchw(pixels), attention_mask=torch.tensor(MASK))
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        same(getattr(got, name), getattr(expected, name))
    same(got.text.last_hidden_state, expected.text_model_output.last_hidden_state)
    same(text_embeds, expected.text_embeds)
    same(image_embeds, expected.image_embeds)


def test_gradients():
    original, _, module, params = build("CLIPModel")
    tokens, pixels = TOKENS, pixels_for(module.vision)
    weight = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    (original(torch.tensor(tokens), nchw(pixels)).logits_per_image * torch.tensor(weight)).sum().backward()
    expected = read("CLIPModel", module, {name: p.grad.numpy() for name, p in original.named_parameters()})

    def loss(params):
        return jnp.sum(module.apply({"params": params}, tokens, pixels).logits_per_image * weight)

    got = jax.jit(jax.grad(loss))(params)
    for (path, reference), gradient in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got)):
        # The bias of the keys moves every score of a query alike: its gradient is zero but for rounding.
        scale = max(np.linalg.norm(reference), 1e-3)
        assert np.linalg.norm(gradient - reference) < 1e-3 * scale, jax.tree_util.keystr(path)


def test_bfloat16():
    _, _, module, params = build("CLIPModel")
    tokens, pixels = TOKENS, pixels_for(module.vision)
    exact = jax.jit(module.apply)({"params": params}, tokens, pixels)
    low = module.clone(text=module.text.clone(dtype="bfloat16"), vision=module.vision.clone(dtype="bfloat16"))
    run = jax.jit(low.apply)
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for got in (run({"params": params}, tokens, pixels), run({"params": rounded}, tokens, pixels)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact)):
            assert a.dtype == jnp.float32 and np.abs(a - b).max() < 0.1 * np.abs(b).max()
        for a, b in ((got.text, exact.text), (got.vision, exact.vision)):
            assert np.abs(a.hidden_states[1] - b.hidden_states[1]).max() > 1e-3, "computed in f32"


@pytest.mark.parametrize("name", FORMATS)
def test_names_and_tensors(name, tmp_path):
    """What transformers writes is read, from under either prefix, and what is written is what transformers writes."""
    original, state, module, params = build(name)
    original.save_pretrained(tmp_path)
    back = layout.write(FORMATS[name].table(module), params)
    published = load_file(tmp_path / "model.safetensors")
    assert back.keys() == published.keys() == state.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, published[key], err_msg=key)
        assert value.shape == state[key].shape and value.flags.c_contiguous
    expected = FORMATS[name].shapes(module)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    assert weights.class_of(module) == name

    if name == "CLIPModel":
        state |= {f"{side}_model.embeddings.position_ids": np.arange(9)[None] for side in ("text", "vision")}
        assert_trees_equal(read(name, module, state), params)
        return
    side = "text_model." if "Text" in name else "vision_model."
    bare = {key.removeprefix(side): value for key, value in state.items()}
    prefixed = {key if "projection" in key else side + key: value for key, value in bare.items()}
    for spelling, ids in ((bare, "embeddings.position_ids"), (prefixed, f"{side}embeddings.position_ids")):
        assert_trees_equal(read(name, module, spelling | {ids: np.arange(9)[None]}), params)
    with pytest.raises(ValueError, match=r"1 not of this network: logit_scale"):
        read(name, module, state | {"logit_scale": np.zeros(())})


@pytest.mark.parametrize("name", FORMATS)
def test_folders_there_and_back(name, tmp_path):
    original, state, module, params = build(name)
    original.save_pretrained(tmp_path / "theirs")
    loaded, tree = weights.load(tmp_path / "theirs")
    assert loaded == module
    assert_trees_equal(tree, params)
    weights.save(tmp_path / "ours", loaded, tree)
    again, faults = type(original).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(faults.values()), faults
    for key, value in again.state_dict().items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)


def assert_trees_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", FORMATS)
def test_configs(name):
    """transformers builds the same network from the options that are written, and so do we."""
    config = config_of(name, TEXTS["new end, gelu"], VISIONS["gelu, a rest of the image"])
    module = FORMATS[name].module(config.to_dict())
    written = FORMATS[name].config(module)
    assert FORMATS[name].module(written) == module
    again = type(config)(**written).to_dict()
    expected = config.to_dict()
    if name != "CLIPModel":
        again = {"": again}
        expected = {"": expected}
    for part in again.keys() & {"", "text_config", "vision_config"}:
        # The towers of CLIPModel, and those without projection, do not look at a projection_dim of their own.
        unused = set() if name.endswith("WithProjection") else {"projection_dim"}
        assert {k: v for k, v in again[part].items() if k not in unused} == {
            k: v for k, v in expected[part].items() if k not in unused
        }
    assert again.get("projection_dim") == expected.get("projection_dim")


def test_defaults_are_the_published_ones():
    for name in FORMATS:
        config = config_of(name, {}, {}).to_dict() | {"projection_dim": 512}
        assert FORMATS[name].module({}) == FORMATS[name].module(config)


def test_old_configs():
    """transformers 4 wrote all that a model of text may have, and two copies of the parts of CLIPModel."""
    old = {
        "add_cross_attention": False,
        "architectures": ["CLIPTextModel"],
        "bad_words_ids": None,
        "dropout": 0.0,
        "exponential_decay_length_penalty": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "pruned_heads": {},
        "tf_legacy_loss": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "torchscript": False,
        "transformers_version": "4.24.0",
        "use_bfloat16": False,
        "_name_or_path": "openai/clip-vit-large-patch14",
    }
    options = TEXTS["old end, quick_gelu"]
    assert clip.TEXT.module(old | options) == clip.TEXT.module(options)
    assert clip.VISION.module(old | {"eos_token_id": None}) == clip.VISION.module({})

    config = {
        "text_config": options,
        "text_config_dict": {"hidden_size": 32},
        "vision_config": None,
        "vision_config_dict": {"patch_size": 14},
        "projection_dim": 20,
    }
    module = clip.FULL.module(config)
    theirs = transformers.CLIPConfig(**config)
    assert module.text == clip.TEXT.module(theirs.text_config.to_dict()).clone(projection_dim=20)
    assert module.vision == clip.VISION.module(theirs.vision_config.to_dict()).clone(projection_dim=20)


@pytest.mark.parametrize(
    "form, config, message",
    [
        (clip.TEXT, {"window": 3}, r"CLIPTextModel: option window \(here 3\) is unknown"),
        (clip.TEXT, {"hidden_act": "relu"}, r"hidden_act is 'relu', expected 'quick_gelu' or 'gelu'"),
        (clip.TEXT, {"pruned_heads": {"0": [1]}}, r"pruned_heads is \{'0': \[1\]\}"),
        (clip.TEXT, {"eos_token_id": [1, 2]}, r"eos_token_id is \(1, 2\), expected one whole number"),
        (clip.TEXT_PROJECTION, {"projection_dim": None}, r"projection_dim is None"),
        (clip.VISION, {"image_size": [224, 224]}, r"CLIPVisionModel: image_size is \(224, 224\)"),
        (clip.VISION_PROJECTION, {"vocab_size": 3}, r"WithProjection: option vocab_size"),
        (clip.FULL, {"text_config": {"rope": True}}, r"CLIPModel's text_config: option rope"),
        (clip.FULL, {"hidden_size": 3}, r"CLIPModel: option hidden_size"),
    ],
)
def test_what_is_refused(form, config, message):
    with pytest.raises(ValueError, match=message):
        form.module(config)


def test_wrong_inputs_are_named():
    text = CLIPText(vocab_size=9, hidden_size=6, num_attention_heads=3, num_hidden_layers=1, max_position_embeddings=4)
    vision = CLIPVision(hidden_size=6, num_attention_heads=4, num_hidden_layers=1, image_size=8, patch_size=4)
    tokens, pixels, key = np.zeros((2, 4), np.int32), np.zeros((2, 8, 8, 3), np.float32), jax.random.key(0)
    for fault, message in (
        (lambda: text.init(key, np.zeros((2, 5), np.int32)), r"tokens are \(2, 5\); expected \[B, 1..4\]"),
        (lambda: text.init(key, tokens.astype(np.float32)), r"tokens are float32"),
        (lambda: text.init(key, tokens, skip=2), r"skip is 2; expected 0..1"),
        (lambda: text.init(key, tokens, mask=np.ones((2, 3))), r"mask is \(2, 3\)"),
        (lambda: vision.init(key, pixels[:, :4]), r"pixel_values are \(2, 4, 8, 3\); expected \[B, 8, 8, 3\]"),
        (lambda: vision.init(key, pixels), r"hidden_size 6 is not a multiple of num_attention_heads 4"),
        (lambda: text.clone(hidden_act="relu").init(key, tokens), r"hidden_act is 'relu'"),
        (lambda: CLIP(text, vision).init(key, tokens, pixels), r"projection_dim of text and vision are \(None, None\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fault()
