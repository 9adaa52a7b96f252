"""Folders that diffusers writes load to its numbers, and folders that ldm_jax writes load in diffusers to the same bits."""

import functools
import inspect
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel, PixArtTransformer2DModel, VQModel

from ldm_jax import weights
from tests.oracle import test_autoencoder_kl as vaes
from tests.oracle import test_dit as dits
from tests.oracle import test_unet as unets

pytestmark = pytest.mark.oracle

# Of those in test_unet.py, the ones to run; the others must become the module that is run there.
RUN = ("sd1", "sd2", "sdxl", "class_conditional", "adm", "ddpm")
build = functools.cache(unets.build)
# Where the network does not matter, the one that is traced fastest.
small = functools.cache(lambda: vaes.pair(vaes.CONFIGS["no_attention"]))


def state_of(model) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def bit_equal(model, other) -> None:
    theirs, ours = model.state_dict(), other.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype and torch.equal(value, ours[name]), name


def there_and_back(model, folder):
    """(module, params) of what `model` saved; they are saved again, and that folder must hold the same numbers and options."""
    model.save_pretrained(folder / "theirs")
    module, params = weights.load(folder / "theirs")
    weights.save(folder / "ours", module, params)
    again = type(model).from_pretrained(folder / "ours")
    bit_equal(model, again)
    assert weights.module_of(json.loads((folder / "ours" / "config.json").read_text()))[1] == module
    published, written = ({k: v for k, v in m.config.items() if not k.startswith("_")} for m in (model, again))
    # sample_size: a fact. interpolation_scale, use_additional_conditions: None there stands for what is written.
    unequal = {"sample_size", "interpolation_scale", "use_additional_conditions"}
    if not any("Cross" in block for block in published.get("down_block_types", ())):
        unequal.add("cross_attention_dim")
    for option in published.keys() - unequal:
        assert json.dumps(published[option]) == json.dumps(written[option]), option
    return module, params


@pytest.mark.parametrize("name", RUN)
def test_unets(name, tmp_path):
    model, _, _ = build(name)
    module, params = there_and_back(model, tmp_path)
    x, t, cond, keywords = unets.inputs(name)
    with torch.no_grad():
        expected = model(dits.nchw(x), torch.tensor(t), **keywords).sample.permute(0, 2, 3, 1)
    got = jax.jit(module.apply)({"params": params}, x, t, cond)
    assert np.abs(expected.numpy()).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("name", unets.CONFIGS)
def test_options_of_unets(name):
    kind, shared, theirs, ours = (*unets.CONFIGS[name], {}, {})[:4]
    expected, published = unets.UNet(**shared, **ours), dict(kind(**shared, **theirs).config)
    form = weights.FORMATS[kind.__name__]
    module = form.module(published)
    assert weights.class_of(module) == weights.class_of(expected) == kind.__name__
    # What a network without text has no use for, and our module leaves open.
    unused = {} if weights.unet.crosses(module) else {"cross_attention_dim": None}
    assert module.copy(**unused) == expected.copy(**unused)
    for option, value in form.config(module).items():
        assert json.dumps(published[option]) == json.dumps(value), option


@pytest.mark.parametrize("name", vaes.CONFIGS)
def test_autoencoders(name, tmp_path):
    config = vaes.CONFIGS[name]
    model, _, _ = vaes.pair(config)
    model.register_to_config(scaling_factor=1.5035, shift_factor=0.0609)
    module, params = there_and_back(model, tmp_path)
    assert (module.scaling_factor, module.shift_factor) == (1.5035, 0.0609)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, config.get("in_channels", 3))).astype(np.float32)
    with torch.no_grad():
        expected = model(dits.nchw(x)).sample.permute(0, 2, 3, 1)
    got, _ = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("kind", [VQModel, AutoencoderTiny])
def test_other_autoencoders(kind, tmp_path):
    """Their forwards are in test_vq.py and test_autoencoder_tiny.py."""
    config = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 3, "num_vq_embeddings": 16}
    if kind is AutoencoderTiny:
        config = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
        config |= {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1), "latent_magnitude": 2}
    model = kind(**config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    module, _ = there_and_back(model, tmp_path)
    assert weights.class_of(module) == kind.__name__


@pytest.mark.parametrize("early", [False, True], ids=["", "before diffusers 0.29"])
def test_transformers(early, tmp_path):
    def load(model, name):
        # Its own tensors for every block, as diffusers has them once they are loaded.
        untied = type(model).from_config(model.config)
        untied.load_state_dict(model.state_dict())
        module, params = there_and_back(untied, tmp_path / name)
        if not early:
            return module, params
        file = tmp_path / name / "theirs" / "config.json"
        config = json.loads(file.read_text())
        # The class that both were, and the options of it that published files hold.
        more = {"num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
        file.write_text(json.dumps(config | more | {"_class_name": "Transformer2DModel"}))
        assert type(type(model).from_pretrained(file.parent)) is type(model)
        return weights.load(file.parent)

    model, _, _ = dits.make_dit("learned variance")
    module, params = load(model, "dit")
    x, t, label, _, _ = dits.inputs(module, (8, 8))
    theirs = model(dits.nchw(x), torch.tensor(t), torch.tensor(label).long()).sample
    dits.same(dits.ours(module, params, x, t, {"label": label}), theirs)
    model, _, _ = dits.make_pixart("scaled positions")
    module, params = load(model, "pixart")
    x, t, _, text, mask = dits.inputs(module, (8, 8))
    words = {"encoder_hidden_states": torch.tensor(text), "encoder_attention_mask": torch.tensor(mask).float()}
    theirs = model(dits.nchw(x), timestep=torch.tensor(t), **words).sample
    dits.same(dits.ours(module, params, x, t, {"text": text, "text_mask": mask}), theirs)


def assert_same_tree(ours, expected) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype and np.array_equal(a, b), jax.tree_util.keystr(path)


@pytest.mark.parametrize("how", ["safetensors", "shards", "bin", "bin shards", "variant", "a file"])
def test_every_kind_of_file(how, tmp_path):
    model, _, params = small()
    options = {"max_shard_size": "5KB"} if "shards" in how else {}
    options |= {"safe_serialization": False} if "bin" in how else {}
    options |= {"variant": "fp16"} if how == "variant" else {}
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*-of-*"))) > 2) == ("shards" in how)
    path = tmp_path / "diffusion_pytorch_model.safetensors" if how == "a file" else tmp_path
    _, got = weights.load(path)
    assert_same_tree(got, params)


@pytest.mark.parametrize("shards", [False, True])
def test_diffusers_reads_what_is_written_in_shards_and_over_an_earlier_save(shards, tmp_path):
    model, module, params = small()
    for size in (5_000, 5_000_000_000) if shards else (5_000_000_000, 5_000):
        weights.save(tmp_path / "a", module, params, max_shard_size=size, facts={"sample_size": 32})
        again = type(model).from_pretrained(tmp_path / "a")
        bit_equal(model, again)
        assert again.config.sample_size == 32
    assert (len(list((tmp_path / "a").iterdir())) == 2) == shards
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path):
    model, _, params = small()
    half = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
    torch_half = type(model).from_config(model.config)
    torch_half.load_state_dict(model.state_dict())
    torch_half.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    module, loaded = weights.load(tmp_path / "theirs")
    assert_same_tree(loaded, half)
    assert module.dtype == "float32"
    weights.save(tmp_path / "ours", module, loaded)
    bit_equal(torch_half, type(model).from_pretrained(tmp_path / "ours", torch_dtype=getattr(torch, dtype)))
    # Cast on the way, in both directions.
    model.save_pretrained(tmp_path / "whole")
    module, cast = weights.load(tmp_path / "whole", dtype=dtype)
    assert_same_tree(cast, half)
    assert module.dtype == dtype
    _, up = weights.load(tmp_path / "theirs", dtype="float32")
    assert_same_tree(up, jax.tree.map(lambda x: x.astype(np.float32), half))


def test_a_network_in_bfloat16_computes_about_the_same(tmp_path):
    model, _, _ = build("sd1")
    model.save_pretrained(tmp_path)
    module, params = weights.load(tmp_path, dtype="bfloat16")
    x, t, cond, keywords = unets.inputs("sd1")
    with torch.no_grad():
        expected = model(dits.nchw(x), torch.tensor(t), **keywords).sample.permute(0, 2, 3, 1).numpy()
    got = jax.jit(module.apply)({"params": params}, x, t, cond)
    assert got.dtype == jnp.float32
    # bf16 has 8 bits: about 0.4 % a rounding.
    assert 1e-4 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


def test_layers_that_are_scanned(tmp_path):
    model, _, plain = build("sd2")
    model.save_pretrained(tmp_path)
    module, params = weights.load(tmp_path, options={"scan_layers": True})
    layers = params["mid_block"]["attentions_0"]["transformer_blocks"]["ff_in"]["kernel"]
    for k in range(2):
        one = plain["mid_block"]["attentions_0"][f"transformer_blocks_{k}"]["ff_in"]["kernel"]
        assert np.array_equal(layers[k], one)
    x, t, cond, keywords = unets.inputs("sd2")
    with torch.no_grad():
        expected = model(dits.nchw(x), torch.tensor(t), **keywords).sample.permute(0, 2, 3, 1)
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x, t, cond), expected, atol=1e-4)
    back = weights.to_state(module, params)
    for name, value in state_of(model).items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_a_scanned_dit():
    model, module, _ = dits.make_dit("patches of 1")
    module = module.copy(scan_layers=True)
    params = weights.from_state(module, state_of(model))
    x, t, label, _, _ = dits.inputs(module, (4, 4))
    theirs = model(dits.nchw(x), torch.tensor(t), torch.tensor(label).long()).sample
    dits.same(dits.ours(module, params, x, t, {"label": label}), theirs)
    back = weights.to_state(module, params)
    for name, value in state_of(model).items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_old_spellings():
    model, module, params = vaes.pair(vaes.CONFIGS["sd"])
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def before_0_18(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
        for new, spelling in old.items():
            if f"attentions.0.{new}." in name:
                # Some of these files hold a linear map of pixels as a convolution.
                return name.replace(new, spelling), value[..., None, None] if value.ndim == 2 else value
        return name, value

    state = dict(before_0_18(k, v) for k, v in state_of(model).items())
    assert any("proj_attn" in name for name in state)
    assert_same_tree(weights.from_state(module, state), params)

    model, module, params = build("fourier")
    state = state_of(model)
    state["time_proj.W"] = state["time_proj.weight"]
    for name in [n for n in state if "samplers.0.conv." in n]:
        state[name.replace("conv", "Conv2d_0")] = state[name]
    assert_same_tree(weights.from_state(module, state), params)
    name = "up_blocks.0.upsamplers.0.Conv2d_0.weight"
    with pytest.raises(ValueError, match=rf"{name} differs from up_blocks.0.upsamplers.0.conv.weight"):
        weights.from_state(module, state | {name: state[name] + 1})
    for name in [n for n in state if "samplers.0.conv." in n] + ["time_proj.weight"]:
        del state[name]
    assert_same_tree(weights.from_state(module, state), params)


REFUSED = {
    "UNet2DConditionModel": {
        "center_input_sample": True,
        "encoder_hid_dim_type": "image_proj",
        "num_attention_heads": 4,
        "dual_cross_attention": True,
        "class_embed_type": "learned",
        "addition_embed_type": "text",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 2.0,
        "time_embedding_type": "learned",
        "time_embedding_act_fn": "silu",
        "timestep_post_act": "silu",
        "attention_type": "gated",
        "cross_attention_norm": "layer_norm",
        "cross_attention_dim": [8, 16],
        "transformer_layers_per_block": [[1, 2], 1],
        "down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["SkipUpBlock2D", "UpBlock2D"],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "act_fn": "gelu",
        "resnet_time_scale_shift": "spatial",
        "an_option_of_tomorrow": 1,
    },
    "UNet2DModel": {
        "center_input_sample": True,
        "time_embedding_type": "learned",
        "class_embed_type": "projection",
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_type": "fir",
        "cross_attention_dim": 8,
    },
    "AutoencoderKL": {"down_block_types": ["DownEncoderBlock2D", "Unknown"], "double_z": True},
    "DiTTransformer2DModel": {
        "activation_fn": "geglu",
        "attention_bias": False,
        "norm_type": "ada_norm",
        "norm_elementwise_affine": True,
        "cross_attention_dim": 4,
        "num_vector_embeds": 10,
    },
    "PixArtTransformer2DModel": {
        "use_additional_conditions": True,
        "cross_attention_dim": 4,
        "caption_channels": None,
        "attention_type": "gated",
        "double_self_attention": True,
    },
    "Transformer2DModel": {"norm_type": "layer_norm"},
}


BASE = {
    "UNet2DConditionModel": unets.CONFIGS["sd1"][1],
    "UNet2DModel": unets.CONFIGS["fourier"][1],
    "AutoencoderKL": {
        "block_out_channels": (8, 8),
        "norm_num_groups": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "DiTTransformer2DModel": {"num_layers": 1},
    "PixArtTransformer2DModel": {"num_layers": 1, "sample_size": 64, "caption_channels": 8},
    "Transformer2DModel": {"num_layers": 1, "norm_type": "ada_norm_zero"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_options_that_are_not_understood_are_named(kind):
    form = weights.FORMATS[kind]
    form.shapes(form.module(BASE[kind]))
    for option, value in REFUSED[kind].items():
        with pytest.raises(ValueError, match=option):
            # Some options are refused by the module, when it is first traced.
            form.shapes(form.module(BASE[kind] | {option: value}))


def test_every_published_option_is_known():
    """Each argument of the torch class is mapped, fixed or unused, and is what it is there where a file does not say."""
    for kind in (
        unets.UNet2DConditionModel,
        unets.UNet2DModel,
        AutoencoderKL,
        DiTTransformer2DModel,
        PixArtTransformer2DModel,
        VQModel,
        AutoencoderTiny,
    ):
        needed = {"caption_channels": 8, "sample_size": 64} if kind is PixArtTransformer2DModel else {}
        signature = inspect.signature(kind.__init__).parameters
        published = {option: p.default for option, p in signature.items() if option != "self"}
        form = weights.FORMATS[kind.__name__]
        assert form.module(published | needed) == form.module(needed), kind


def test_what_no_class_expresses_is_refused(tmp_path):
    _, unet, params = build("no_text")
    with pytest.raises(ValueError, match=r"mid_block_layers is 1.*UNet2DConditionModel.*expected 0"):
        weights.save(tmp_path / "a", unet.copy(mid_block_layers=1), params)
    with pytest.raises(ValueError, match="downsample_type is 'resnet'"):
        weights.save(tmp_path / "a", unet.copy(downsample_type="resnet"), params)
    with pytest.raises(ValueError, match="mid_block_layers is 2"):
        weights.save(tmp_path / "a", unets.UNet(**unets.CONFIGS["adm"][1], mid_block_layers=2), params)
    _, dit, params = dits.make_dit("patches of 1")
    for option, value in {"qk_norm": True, "time_shift": 0.0, "pos_base": 0.0, "mlp_ratio": 2.0}.items():
        with pytest.raises(ValueError, match=option):
            weights.save(tmp_path / "a", dit.copy(**{option: value}), params)
    with pytest.raises(ValueError, match="expected a module of type"):
        weights.save(tmp_path / "a", torch.nn.Identity(), params)
    assert not list(tmp_path.iterdir())


def test_a_null_class_is_counted_in_the_published_table(tmp_path):
    _, module, params = build("adm")
    module = module.copy(num_class_embeds=9, null_class=True)
    weights.save(tmp_path / "a", module, params)
    assert unets.UNet2DModel.from_pretrained(tmp_path / "a").class_embedding.num_embeddings == 10
    loaded, _ = weights.load(tmp_path / "a")
    assert (loaded.num_class_embeds, loaded.null_class) == (10, False)


def test_a_fault_says_where(tmp_path):
    model, _, _ = build("sd1")
    model.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"dual_cross_attention": True}))
    with pytest.raises(
        ValueError, match=r"b/config\.json: UNet2DConditionModel: dual_cross_attention is True, expected False"
    ):
        weights.load(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(ValueError, match=r"b: of \d+ tensors that the network has: \d+ missing: .*, and \d+ more"):
        weights.load(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 16}))
    with pytest.raises(ValueError, match=r"of another shape: .*attn2\.to_k\.weight \[8, 8\] \(expected \[8, 16\]\)"):
        weights.load(tmp_path / "b")
