"""The U-Net against diffusers' UNet2DConditionModel and UNet2DModel, with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from ldm_jax import weights
from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.denoiser import make_denoiser
from ldm_jax.diffusion.loss import diffusion_loss
from ldm_jax.models.unet import UNet
from ldm_jax.training.time_input import suited

pytestmark = pytest.mark.oracle

CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "layers_per_block": 1,
}
SD1 = {**CROSS, "block_out_channels": (4, 8), "cross_attention_dim": 8, "attention_head_dim": 2}
# Attention here has 32 groups whatever the options, so that its level has at least 32 channels.
NCSNPP = {
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 2**0.5,
    "norm_eps": 1e-6,
}
# name -> (original class, shared options, options of the original alone, options of ours alone)
CONFIGS = {
    "sd1": (UNet2DConditionModel, SD1),
    "inpaint": (UNet2DConditionModel, SD1 | {"in_channels": 9}),
    "instruct_pix2pix": (UNet2DConditionModel, SD1 | {"in_channels": 8}),
    "depth": (
        UNet2DConditionModel,
        SD1 | {"in_channels": 5, "attention_head_dim": (2, 4), "use_linear_projection": True, "act_fn": "swish"},
    ),
    "lcm": (UNet2DConditionModel, SD1 | {"time_cond_proj_dim": 6}),
    "unclip": (
        UNet2DConditionModel,
        SD1 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
    ),
    "sd2": (
        UNet2DConditionModel,
        {
            **CROSS,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 12,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "layers_per_block": 2,
            "transformer_layers_per_block": 2,
            "downsample_padding": 0,
            "freq_shift": 1,
            "flip_sin_to_cos": False,
        },
    ),
    "sdxl": (
        UNet2DConditionModel,
        {
            **CROSS,
            "block_out_channels": (4, 8),
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 8,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "encoder_hid_dim": 6,
        },
    ),
    "sdxl_refiner": (
        UNet2DConditionModel,
        {
            "block_out_channels": (4, 8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 2,
            "layers_per_block": 1,
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": 12,
            "use_linear_projection": True,
            "transformer_layers_per_block": 2,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 72,
        },
    ),
    "class_conditional": (
        UNet2DConditionModel,
        {
            **CROSS,
            "block_out_channels": (4, 8),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "num_class_embeds": 5,
            "class_embeddings_concat": True,
            "only_cross_attention": (True, True),
            "mid_block_scale_factor": 2.0,
        },
    ),
    "no_text": (
        UNet2DConditionModel,
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "norm_num_groups": 2,
            "layers_per_block": (1, 2),
            "attention_head_dim": 4,
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 6,
            "time_embedding_type": "fourier",
        },
        {"cross_attention_dim": 8},
        {"mid_block_layers": 0},
    ),
    "adm": (
        UNet2DModel,
        {
            "block_out_channels": (8, 16),
            "in_channels": 3,
            "out_channels": 6,
            "layers_per_block": 1,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "num_class_embeds": 10,
        },
    ),
    "ddpm": (
        UNet2DModel,
        {
            "block_out_channels": (4, 8, 8),
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "attention_head_dim": None,
            "norm_num_groups": 2,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "add_attention": False,
        },
    ),
    "fourier": (
        UNet2DModel,
        {
            "block_out_channels": (8, 8),
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "attention_head_dim": 4,
            "norm_num_groups": 2,
        },
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "fourier_log"},
    ),
    "ncsnpp": (
        UNet2DModel,
        NCSNPP
        | {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "norm_num_groups": None,
            "attention_head_dim": None,
        },
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "fourier_log"},
    ),
    "ncsnpp_deep": (
        UNet2DModel,
        NCSNPP
        | {
            "block_out_channels": (8, 32, 32),
            "layers_per_block": 2,
            "down_block_types": ("SkipDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "resnet_time_scale_shift": "scale_shift",
            "num_class_embeds": 5,
        },
    ),
    "ncsnpp_mixed": (
        UNet2DModel,
        NCSNPP
        | {
            "block_out_channels": (8, 16, 16),
            "layers_per_block": 1,
            "down_block_types": ("SkipDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 4,
        },
    ),
}


def build(name: str, **options):
    """(torch module, our module, our parameters) with random weights everywhere."""
    kind, shared, theirs, ours = (*(CONFIGS | DEEP_CONFIGS)[name], {}, {})[:4]
    torch.manual_seed(0)
    original = kind(**shared, **theirs).eval()
    for parameter in original.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    state = {k: v.detach().numpy() for k, v in original.state_dict().items()}
    module = UNet(**shared, **ours, **options)
    return original, module, weights.from_state(module, state)


def inputs(name: str, height: int = 8, width: int = 16):
    """x, t, cond in numpy, and the keyword arguments of the torch module that mean the same."""
    kind, shared = (CONFIGS | DEEP_CONFIGS)[name][:2]
    random = np.random.default_rng(0)
    x = random.normal(size=(3, height, width, shared.get("in_channels", 4))).astype(np.float32)
    t = np.array([0.3, 2.5, 9.0] if name in ("fourier", "ncsnpp") else [0, 17, 999], np.float32)
    cond, keywords = {}, {}
    if any("Cross" in block for block in shared["down_block_types"]):
        cond["text"] = random.normal(size=(3, 5, shared.get("encoder_hid_dim", shared["cross_attention_dim"])))
        cond["text"] = cond["text"].astype(np.float32)
        cond["text_mask"] = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
        keywords["encoder_hidden_states"] = torch.tensor(cond["text"])
        if "only_cross_attention" in shared:
            # The original forgets the text's mask in attn1 there; ours applies it, so all tokens are visible here.
            cond["text_mask"][:] = True
        keywords["encoder_attention_mask"] = torch.tensor(cond["text_mask"])
    elif kind is UNet2DConditionModel:
        keywords["encoder_hidden_states"] = torch.zeros(3, 1, 8)
    if "num_class_embeds" in shared:
        cond["label"] = np.array([0, 4, 2], np.int32)
        keywords["class_labels"] = torch.tensor(cond["label"])
    elif "class_embed_type" in shared:
        cond["label"] = random.normal(size=(3, 6)).astype(np.float32)
        keywords["class_labels"] = torch.tensor(cond["label"])
    if "addition_embed_type" in shared:
        # The refiner has an aesthetic score in the place of the target size: five numbers.
        ids = 5 if name == "sdxl_refiner" else 6
        cond["pooled"] = random.normal(size=(3, 32)).astype(np.float32)
        cond["time_ids"] = random.integers(0, 512, (3, ids)).astype(np.float32)
        keywords["added_cond_kwargs"] = {
            "text_embeds": torch.tensor(cond["pooled"]),
            "time_ids": torch.tensor(cond["time_ids"]),
        }
    if "time_cond_proj_dim" in shared:
        cond["guidance"] = random.normal(size=(3, shared["time_cond_proj_dim"])).astype(np.float32)
        keywords["timestep_cond"] = torch.tensor(cond["guidance"])
    return x, t, cond, keywords


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal(name):
    original, ours, params = build(name)
    x, t, cond, keywords = inputs(name)
    with torch.no_grad():
        expected = original(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), **keywords).sample.permute(0, 2, 3, 1)
    got = jax.jit(ours.apply)({"params": params}, x, t, cond)
    assert np.abs(expected.numpy()).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)
    back = weights.to_state(ours, params)
    state = original.state_dict()
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value.numpy(), key)


DEEP = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}
DEEP |= {"down_block_types": ("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",)}
DEEP |= {"up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3}
DEEP_CONFIGS = {
    "deep": (UNet2DConditionModel, SD1 | DEEP),
    "deep, padded right and below": (UNet2DConditionModel, SD1 | DEEP | {"downsample_padding": 0}),
    "two blocks": (UNet2DConditionModel, SD1 | {"transformer_layers_per_block": 2}),
}


@pytest.mark.parametrize(
    ("name", "size"),
    [("deep", (15, 25)), ("deep", (9, 1)), ("deep, padded right and below", (15, 22)), ("sdxl", (5, 14))],
)
def test_sizes_that_do_not_halve(name, size):
    """Of a U-Net that halves three times: 15 becomes 8, 4, 2 (or 7, 3, 1), and is doubled back to 4, 8, 15."""
    original, ours, params = build(name)
    x, t, cond, keywords = inputs(name, *size)
    with torch.no_grad():
        expected = original(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), **keywords).sample.permute(0, 2, 3, 1)
    np.testing.assert_allclose(jax.jit(ours.apply)({"params": params}, x, t, cond), expected, atol=1e-4)


def test_a_missing_guidance_adds_nothing():
    original, ours, params = build("lcm")
    x, t, cond, keywords = inputs("lcm")
    del cond["guidance"], keywords["timestep_cond"]
    with torch.no_grad():
        expected = original(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), **keywords).sample.permute(0, 2, 3, 1)
    got = jax.jit(ours.apply)({"params": params}, x, t, cond)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CONFIGS["ncsnpp"][1] | {"in_channels": 1}, r"channels are \(1, 3\), expected 3 and 3 with UNet2DModel's Skip"),
        (
            CONFIGS["ncsnpp"][1] | {"time_embedding_type": "fourier", "mid_block_layers": 0},
            "contains 'SkipDownBlock2D', which that class cannot",
        ),
        (
            CONFIGS["no_text"][1] | {"attention_head_dim": (4, 8), "mid_block_layers": 0},
            r"attention_head_dim is \(4, 8\), expected one number",
        ),
    ],
)
def test_what_no_published_class_computes_is_not_written(options, message):
    module = UNet(**options)
    with pytest.raises(ValueError, match=message):
        weights.FORMATS[weights.class_of(module)].config(module)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("sdxl", {"scan_layers": True, "remat": True}), ("ncsnpp", {})])
def test_gradients_equal(name, options):
    original, ours, params = build(name, **options)
    x, t, cond, keywords = inputs(name)
    original(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), **keywords).sample.square().mean().backward()
    # The frequencies of the time embedding have no gradient.
    grads = {
        k: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for k, p in original.named_parameters()
    }
    expected = weights.from_state(ours, grads)
    got = jax.jit(jax.grad(lambda p: jnp.square(ours.apply({"params": p}, x, t, cond)).mean()))(params)
    # A bias of all keys changes no attention: its gradient is rounding alone.
    floor = 1e-3 * max(np.abs(e).max() for e in jax.tree.leaves(expected))
    for (path, e), g in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        assert np.abs(g - e).max() < 1e-4 * max(np.abs(e).max(), floor), jax.tree_util.keystr(path)


def test_ncsnpp_on_ve_sees_what_the_published_one_sees():
    """sigma, from a process whose networks else see its logarithm: the score is diffusers' score, and the loss is finite."""
    original, module, params = build("ncsnpp")
    compiled = jax.jit(module.apply)  # the program of test_outputs_equal

    def apply(params, x, t, cond):
        return compiled({"params": params}, x, t, cond)

    process = suited(P.ve(), module)
    x, _, _, _ = inputs("ncsnpp")
    t = np.float32([0.0, 0.4, 1.0])
    sigma = np.asarray(process.sigma(t))
    with torch.no_grad():
        score = (
            original(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(sigma)).sample.numpy().transpose(0, 2, 3, 1)
        )
    clean = make_denoiser(apply, params, process, "score")(x, t)
    expected = -score * sigma[:, None, None, None]
    np.testing.assert_allclose(clean.eps, expected, atol=2e-5 * np.abs(expected).max())
    loss, _ = diffusion_loss(apply, params, process, "score", jnp.asarray(x), {}, jax.random.key(0))
    assert np.isfinite(loss).all()


def test_a_process_that_does_not_feed_what_the_network_takes_is_refused():
    takes_sigma, takes_logs, takes_any = (
        UNet(time_embedding_type=name) for name in ("fourier_log", "fourier", "positional")
    )
    for name, make in P.PROCESSES.items():
        process = make()
        assert suited(process, takes_any) is process
        if name in ("ve", "edm"):
            t = jnp.asarray([0.0, 0.3, 1.0])
            np.testing.assert_array_equal(suited(process, takes_sigma).time_input(t), process.sigma(t))
        else:
            with pytest.raises(ValueError, match=r"time_embedding_type='fourier_log': .*expected ve or edm"):
                suited(process, takes_sigma)
        if name in ("ve", "edm", "trig"):
            assert suited(process, takes_logs) is process
        else:
            with pytest.raises(ValueError, match=r"too far apart for config.model.time_embedding_type='fourier'"):
                suited(process, takes_logs)
