"""Single files in the latent-diffusion layout against diffusers' own converters, and at the published sizes."""

import inspect

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as original
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm_jax import weights
from ldm_jax.weights import layout, single_file, torch_pickle

pytestmark = pytest.mark.oracle

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def levels(*crossed: bool) -> dict:
    """Block types of a U-Net: for each level from the finest, whether it attends to text."""
    kinds = [CROSS if c else PLAIN for c in crossed]
    return {"down_block_types": [k[0] for k in kinds], "up_block_types": [k[1] for k in kinds[::-1]]}


SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
# The published configs, written out: what is measured from shapes must come to these.
UNETS = {
    "sd1": {
        **levels(True, True, True, False),
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
        "sample_size": 64,
    },
    "sd2": {
        **levels(True, True, True, False),
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "transformer_layers_per_block": 1,
        "use_linear_projection": True,
        "sample_size": 96,
    },
    "sdxl": {
        **levels(False, True, True),
        **SIZES,
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
    "sdxl_refiner": {
        **levels(False, True, True, False),
        **SIZES,
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "attention_head_dim": [6, 12, 24, 24],
        "transformer_layers_per_block": 4,
        "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2560,
        "sample_size": 128,
    },
}
TINY = {
    "sd1": {"block_out_channels": [4, 8, 12, 12], "cross_attention_dim": 6, "attention_head_dim": 2},
    "sd2": {"block_out_channels": [4, 8, 12, 12], "cross_attention_dim": 6, "attention_head_dim": [1, 2, 3, 3]},
    "sdxl": {"block_out_channels": [4, 8, 12], "transformer_layers_per_block": [1, 2, 3]},
    "sdxl_refiner": {"block_out_channels": [4, 8, 12, 12], "transformer_layers_per_block": 2},
}
TINY["sdxl"] |= {"cross_attention_dim": 6, "attention_head_dim": [1, 2, 3], "projection_class_embeddings_input_dim": 24}
TINY["sdxl_refiner"] |= {"cross_attention_dim": 6, "attention_head_dim": 2, "projection_class_embeddings_input_dim": 20}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
CHANNELS = {"": 4, "_inpaint": 9, "_pix2pix": 8, "_depth": 5}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLIP_L = {**TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"hidden_act": "quick_gelu"}
CLIP_H = {**TEXT, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_H |= {"hidden_act": "gelu"}
CLIP_G = {**TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_G |= {"hidden_act": "gelu", "projection_dim": 1280}
ENCODERS = {
    "sd1": {"text_encoder": CLIP_L},
    "sd2": {"text_encoder": CLIP_H},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "sdxl_refiner": {"text_encoder_2": CLIP_G},
}
TINY_TEXT = {"vocab_size": 20, "max_position_embeddings": 7, "hidden_size": 8, "intermediate_size": 12}
TINY_TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 6}
TINY_TEXT |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def random(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_unet(kind: str, channels: int = 4) -> UNet2DConditionModel:
    options = UNETS[kind] | TINY[kind]
    options |= {"addition_time_embed_dim": 4} if "addition_embed_type" in options else {}
    return random(UNet2DConditionModel(**options, in_channels=channels, norm_num_groups=2))


def tiny_vae() -> AutoencoderKL:
    return random(AutoencoderKL(**VAE | {"block_out_channels": [4, 8, 12, 12]}, norm_num_groups=2))


def tiny_text(projected: bool, seed: int = 0, **options) -> CLIPTextModel:
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return random(cls(CLIPTextConfig(**TINY_TEXT | options)), seed)


def component(model: torch.nn.Module) -> tuple[dict, dict[str, layout.Tensor]]:
    """What `join` takes of a torch model."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return config, layout.tensors({name: value.numpy() for name, value in model.state_dict().items()})


def tiny(kind: str) -> dict[str, tuple[dict, dict[str, layout.Tensor]]]:
    """Every component of a tiny model of this kind."""
    family = next(f for f in sorted(UNETS, key=len, reverse=True) if kind.startswith(f))
    models = {"unet": tiny_unet(family, CHANNELS[kind[len(family) :]]), "vae": tiny_vae()}
    for seed, name in enumerate(ENCODERS[family]):
        models[name] = tiny_text(name == "text_encoder_2", seed)
    return {name: component(model) for name, model in models.items()}


def prefixed(tensors: dict) -> dict:
    """CLIPTextModel's names as published: transformers 5 leaves text_model. out of this class alone."""
    return {
        n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}": t for n, t in tensors.items()
    }


def arrays(tensors: dict[str, layout.Tensor]) -> dict[str, np.ndarray]:
    """Read, and held to the shape and dtype that were announced."""
    values = {name: tensor.read() for name, tensor in tensors.items()}
    for name, value in values.items():
        assert (value.shape, value.dtype) == (tuple(tensors[name].shape), tensors[name].dtype), name
        assert value.flags.c_contiguous, name
    return values


def as_torch(tensors: dict[str, layout.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.copy()) for name, value in arrays(tensors).items()}


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sdxl_refiner", "sd1_inpaint", "sd1_pix2pix", "sd2_depth"])
def test_diffusers_converters_read_what_join_writes(kind):
    parts = tiny(kind)
    state = as_torch(single_file.join(parts, kind))
    same(original.convert_ldm_unet_checkpoint(dict(state), parts["unet"][0]), arrays(parts["unet"][1]))
    same(original.convert_ldm_vae_checkpoint(dict(state), parts["vae"][0]), arrays(parts["vae"][1]))
    if "text_encoder" in parts and not kind.startswith("sd2"):
        same(original.convert_ldm_clip_checkpoint(state), arrays(prefixed(parts["text_encoder"][1])))
    for name, prefix in (
        ("text_encoder", "cond_stage_model.model."),
        ("text_encoder_2", "conditioner.embedders.1.model."),
        ("text_encoder_2", "conditioner.embedders.0.model."),
    ):
        if f"{prefix}positional_embedding" in state:
            split = single_file.split(single_file.join(parts, kind), kind)[name][1]
            thirds = [tensor.read() for n, tensor in split.items() if "q_proj" in n]
            assert all(third.base is None for third in thirds)  # or each would keep its whole in memory
            model = tiny_text(name == "text_encoder_2")
            same(original.convert_open_clip_checkpoint(model, state, prefix), arrays(prefixed(parts[name][1])))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sdxl_refiner", "sd1_inpaint", "sd1_pix2pix", "sd2_depth"])
def test_there_and_back(kind):
    parts = tiny(kind)
    state = single_file.join(parts, kind)
    back = single_file.split(state, kind)
    assert back.keys() == {*parts, "scheduler"}
    for name, (_, tensors) in parts.items():
        same(arrays(back[name][1]), arrays(prefixed(tensors) if name.startswith("text") else tensors))
    same(arrays(single_file.join(back, kind)), arrays(state))


def on_meta(family: str, channels: int) -> dict[str, tuple[dict, dict[str, layout.Tensor]]]:
    """The published model, of which only names and shapes exist."""
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**UNETS[family], in_channels=channels),
            "vae": AutoencoderKL(**VAE),
        }
        for name, options in ENCODERS[family].items():
            cls = CLIPTextModelWithProjection if "projection_dim" in options else CLIPTextModel
            models[name] = cls(CLIPTextConfig(**options))

    def never() -> np.ndarray:
        raise AssertionError("a tensor was read")

    parts = {}
    for name, model in models.items():
        config = ENCODERS[family].get(name) or dict(model.config)
        shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        parts[name] = (config, {n: layout.Tensor(s, np.dtype(np.float16), never) for n, s in shapes.items()})
    return parts


SD1 = {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.transformer.text_model.": 196}
SD2 = {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.model.": 23 * 12 + 4}
SDXL = {"conditioner.embedders.0.transformer.text_model.": 196, "conditioner.embedders.1.model.": 32 * 12 + 5}
SDXL |= {"model.diffusion_model.": 1680, "first_stage_model.": 248}
REFINER = {"model.diffusion_model.": 1220, "first_stage_model.": 248, "conditioner.embedders.0.model.": 32 * 12 + 5}


# Where the doubling convolutions lie, behind the attention if there is one; diffusers' converter takes either place.
DOUBLING = {"sd1": ("2.1", "5.2", "8.2"), "sdxl": ("2.2", "5.2"), "sdxl_refiner": ("2.1", "5.2", "8.2")}
DOUBLING["sd2"] = DOUBLING["sd1"]


@pytest.mark.parametrize(
    "kind, counts, theirs",
    [
        ("sd1", SD1, "v1"),
        ("sd1_inpaint", SD1, "inpainting"),
        ("sd1_pix2pix", SD1, "instruct-pix2pix"),
        ("sd2", SD2, "v2"),
        ("sd2_inpaint", SD2, "inpainting_v2"),
        ("sd2_depth", SD2, "v2"),
        ("sdxl", SDXL, "xl_base"),
        ("sdxl_inpaint", SDXL, "xl_inpaint"),
        ("sdxl_refiner", REFINER, "xl_refiner"),
    ],
)
def test_published_sizes(kind, counts, theirs):
    family = single_file.KINDS[kind].family
    channels = single_file.KINDS[kind].channels
    parts = on_meta(family, channels)
    state = single_file.join(parts, kind)
    assert {p: sum(name.startswith(p) for name in state) for p in counts} == counts
    assert sum(counts.values()) == len(state)
    doubling = tuple(f"model.diffusion_model.output_blocks.{n}.conv.weight" for n in DOUBLING[family])
    assert doubling == tuple(n for n in state if "output_blocks" in n and n.endswith("conv.weight"))
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert original.infer_diffusers_model_type({n: torch.empty(s, device="meta") for n, s in shapes.items()}) == theirs
    assert single_file.identify(shapes) == kind

    back = single_file.split(state, prediction="v_prediction" if kind == "sd2" else None)
    unet = UNETS[family] | {"layers_per_block": 2, "in_channels": channels, "out_channels": 4}
    if kind == "sd2_inpaint" or kind == "sd2_depth":
        unet["sample_size"] = 64
    assert back["unet"][0] == unet | {"_class_name": "UNet2DConditionModel"}
    scale, size = (0.13025 if family.startswith("sdxl") else 0.18215), 8 * unet["sample_size"]
    assert back["vae"][0] == VAE | {"_class_name": "AutoencoderKL", "scaling_factor": scale, "sample_size": size}
    for name in ENCODERS[family]:
        expected = ENCODERS[family][name] | {
            "architectures": ["CLIPTextModelWithProjection" if name == "text_encoder_2" else "CLIPTextModel"],
            "model_type": "clip_text_model",
        }
        assert back[name][0] == expected
    for name, (_, tensors) in parts.items():
        expected = prefixed(tensors) if name.startswith("text") else tensors
        assert {n: t.shape for n, t in back[name][1].items()} == {n: t.shape for n, t in expected.items()}


def old_attention(name):
    for new, old in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        name = name.replace(f"mid.attn_1.{new}.", f"mid.attn_1.{old}.")
    return name


def test_files_as_they_occur(tmp_path, capsys):
    parts = tiny("sd1")
    joined = arrays(single_file.join(parts, "sd1"))
    extras = {
        "betas": np.zeros(3),
        "alphas_cumprod_prev": np.zeros(3),
        "sqrt_one_minus_alphas_cumprod": np.zeros(3),
        "posterior_mean_coef1": np.zeros(3),
        "model_ema.diffusion_modelinput_blocks00weight": np.zeros(3),
        "model_ema.num_updates": np.zeros((), np.int64),
        "first_stage_model.loss.logvar": np.zeros(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(7)[None],
        "global_step": np.zeros(()),
        "embedding_manager.embedder.transformer.text_model.embeddings.position_embedding.weight": np.zeros(3),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": np.zeros(()),
        "control_model.time_embed.0.weight": np.zeros(3),
        "cond_stage_model.transformer.text_projection.weight": np.zeros((3, 3)),
        "cond_stage_model.transformer.logit_scale": np.zeros(()),
        "cond_stage_model.transformer.visual_projection.weight": np.zeros((3, 3)),
        "safety_checker.concept_embeds": np.zeros(3),
    }
    safetensors.numpy.save_file(joined | extras, tmp_path / "model.safetensors")
    lightning = {"state_dict": {n: torch.from_numpy(v) for n, v in (joined | extras).items()}, "global_step": 3}
    torch.save(lightning, tmp_path / "model.ckpt")
    states = {
        "safetensors": safetensors.numpy.load_file(tmp_path / "model.safetensors"),
        "ckpt": torch_pickle.load(tmp_path / "model.ckpt"),
        "without text_model": {
            name.replace("transformer.text_model.", "transformer."): v for name, v in joined.items()
        },
        "linear attention": {
            name: v[:, :, 0, 0] if ".attn_1." in name and v.ndim == 4 else v for name, v in joined.items()
        },
        # As diffusers' script wrote them for a while (its issue 4790).
        "attention as in folders": {old_attention(name): v for name, v in joined.items()},
    }
    for what, state in states.items():
        back = single_file.split(layout.tensors(state), "sd1")
        said = capsys.readouterr().err
        assert back.keys() == {*parts, "scheduler"}, what
        if what in ("safetensors", "ckpt"):
            assert (
                "moving averages (2 tensors), " in said and "control_model (control_model.time_embed.0.weight)" in said
            )
            assert said.count("\n") == 1 and "position_ids" not in said
        else:
            assert said == "", what
        for name, (_, tensors) in parts.items():
            same(arrays(back[name][1]), arrays(prefixed(tensors) if name.startswith("text") else tensors))

    for name, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        bare = {n[len(prefix) :]: value for n, value in joined.items() if n.startswith(prefix)} | {
            "loss.x": np.zeros(1)
        }
        back = single_file.split(layout.tensors(bare), {"unet": "sd1", "vae": None}[name])
        assert back.keys() == ({"unet", "scheduler"} if name == "unet" else {"vae"})
        same(arrays(back[name][1]), arrays(parts[name][1]))
        if name == "vae":
            del bare["loss.x"]
            same(arrays(single_file.join(back, "vae")), bare)


def test_last_layer_of_sd2_is_left_out():
    model = tiny_text(False, num_hidden_layers=24)
    state = single_file.join({"unet": component(tiny_unet("sd2")), "text_encoder": component(model)}, "sd2")
    extras = ("cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection", "depth_model.model.bias")
    state |= layout.tensors({name: np.zeros((8, 8)) for name in extras})
    assert set(original.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE) <= state.keys()
    config, tensors = single_file.split(state, "sd2")["text_encoder"]
    assert config["num_hidden_layers"] == 23 and config["architectures"] == ["CLIPTextModel"]
    expected = original.convert_open_clip_checkpoint(model, as_torch(state), "cond_stage_model.model.")
    same(arrays(tensors), expected)


def test_bfloat16_and_the_scale_of_an_autoencoder_alone():
    config, tensors = component(tiny_vae())
    half = {name: tensor.read().astype(layout.jax.numpy.bfloat16) for name, tensor in tensors.items()}
    state = single_file.join({"vae": (config, layout.tensors(half))}, "vae")
    same(arrays(single_file.split(state)["vae"][1]), half)
    assert single_file.split(state)["vae"][0]["scaling_factor"] == 0.18215
    assert single_file.split(state, "sdxl")["vae"][0]["scaling_factor"] == 0.13025
    options = {"vae": {"norm_num_groups": 2, "scaling_factor": 0.5}}
    config = single_file.split(state, options=options)["vae"][0]
    assert (config["scaling_factor"], config["norm_num_groups"], config["latent_channels"]) == (0.5, 2, 4)

    sd3 = AutoencoderKL(
        **VAE | {"block_out_channels": [4, 8, 12, 12], "latent_channels": 16, "use_quant_conv": False},
        norm_num_groups=2,
    )
    state = single_file.join({"vae": component(sd3)}, "vae")
    config = single_file.split(state, options={"vae": {"scaling_factor": 1.5305, "shift_factor": 0.0609}})["vae"][0]
    assert (config["latent_channels"], config["use_quant_conv"], config["use_post_quant_conv"]) == (16, False, True)
    with pytest.raises(ValueError, match="no scale is known for latents of 16 channels"):
        single_file.split(state)


@pytest.mark.parametrize("kind", [kind for kind in single_file.KINDS if kind != "vae"])
def test_schedulers_are_those_of_diffusers(kind):
    shapes = {name: tensor.shape for name, tensor in single_file.join(tiny("sd1"), "sd1").items()}
    channels = single_file.KINDS[kind].channels
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (4, channels, 3, 3)
    shapes |= {f"model.diffusion_model.label_emb.0.{i}.weight": (16, 24) for i in (0, 2)}
    config = single_file.configs(shapes, kind)["scheduler"]
    cls = getattr(diffusers, config["_class_name"])
    assert config.keys() - {"_class_name"} <= inspect.signature(cls).parameters.keys()
    assert config["prediction_type"] == ("v_prediction" if kind == "sd2" else "epsilon")
    table = cls.from_config(config).alphas_cumprod
    published = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.allclose(table, (1 - published).cumprod(0))
    assert single_file.configs(shapes, kind, prediction="sample")["scheduler"]["prediction_type"] == "sample"
    if kind.startswith("sdxl"):
        marked = single_file.configs(shapes | {"v_pred": (0,), "ztsnr": (0,)}, kind)["scheduler"]
        assert marked["prediction_type"] == "v_prediction" and marked["rescale_betas_zero_snr"]
        assert cls.from_config(marked).alphas_cumprod[-1] < 1e-6


def test_size_follows_the_prediction_of_sd2():
    shapes = {name: tensor.shape for name, tensor in single_file.join(tiny("sd2"), "sd2").items()}
    for prediction, size in ((None, 96), ("v_prediction", 96), ("epsilon", 64)):
        configs = single_file.configs(shapes, "sd2", prediction=prediction)
        assert (configs["unet"]["sample_size"], configs["vae"]["sample_size"]) == (size, 8 * size)


def test_what_is_wrong_is_named():
    state = single_file.join(tiny("sd1"), "sd1")
    shapes = {name: tensor.shape for name, tensor in state.items()}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    with pytest.raises(ValueError, match=r"among its 12 tensors: foo\.0, .*foo\.9, and 2 more"):
        single_file.identify({f"foo.{i}": (1,) for i in range(12)})
    with pytest.raises(ValueError, match=r"attends to 6 channels of text and reads 4 .* 768 and 9 \(sd1_inpaint\)"):
        single_file.split(state)
    with pytest.raises(ValueError, match="kind is 'sd4', expected one of sd1, "):
        single_file.split(state, "sd4")
    with pytest.raises(ValueError, match="U-Net reads 4 channels, that of a sd1_inpaint reads 9"):
        single_file.split(state, "sd1_inpaint")
    with pytest.raises(ValueError, match="prediction is 'eps', expected one of epsilon"):
        single_file.split(state, "sd1", prediction="eps")
    with pytest.raises(ValueError, match="options for 'text_encoder_2', expected one of unet, vae, text_encoder"):
        single_file.split(state, "sd1", options={"text_encoder_2": {}})
    extra = {f"hypernetwork.{i}": state[first] for i in range(11)}
    with pytest.raises(ValueError, match=r"11 tensors are of no network of a sd1: hypernetwork\.0, .*\.9, and 1 more"):
        single_file.split(state | extra, "sd1")
    # unCLIP's vector, which SD 2 does not read.
    with pytest.raises(ValueError, match=r"1 tensors .*label_emb\.0\.0\.weight"):
        single_file.split(state | {"model.diffusion_model.label_emb.0.0.weight": state[first]}, "sd1")
    with pytest.raises(ValueError, match=r"no tensor out\.2\.weight"):
        single_file.split({n: t for n, t in state.items() if "model.out.2" not in n}, "sd1")
    with pytest.raises(ValueError, match="middle depth 0"):
        single_file.configs({n: s for n, s in shapes.items() if "middle_block.1" not in n}, "sd1")
    with pytest.raises(ValueError, match="as many alike in every level"):
        single_file.configs({n: s for n, s in shapes.items() if "input_blocks.11." not in n}, "sd1")
    bias = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    sd2 = single_file.join(tiny("sd2"), "sd2")
    with pytest.raises(ValueError, match=rf"{bias} is \[25\], expected 3 tensors"):
        single_file.split(sd2 | {bias: layout.Tensor((25,), np.dtype(np.float32), lambda: np.zeros(25))}, "sd2")


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.0.out_layers.3.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.model.token_embedding.weight",
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias",
    ],
)
def test_a_number_where_a_matrix_belongs_is_named(name):
    number = layout.Tensor((), np.dtype(np.float32), lambda: np.zeros(()))
    with pytest.raises(ValueError, match=rf"{name.partition('_model.')[2].removeprefix('model.')} is \[\], expected"):
        single_file.split(single_file.join(tiny("sd2"), "sd2") | {name: number}, "sd2")


def test_what_cannot_be_joined_is_named():
    parts = tiny("sd2")
    config, tensors = parts["text_encoder"]
    lacking = {n: t for n, t in tensors.items() if not n.endswith("layers.0.self_attn.k_proj.weight")}
    with pytest.raises(
        ValueError, match=r"text_encoder lacks text_model\.encoder\.layers\.0\.self_attn\.k_proj\.weight"
    ):
        single_file.join({"text_encoder": (config, lacking)}, "sd2")
    with pytest.raises(ValueError, match="a sd2 has no safety_checker, expected unet, vae, text_encoder"):
        single_file.join({"safety_checker": ({}, {})}, "sd2")
    config, tensors = parts["unet"]
    extra = {"time_embedding.cond_proj.weight": tensors["conv_in.weight"]}
    with pytest.raises(ValueError, match=r"1 tensors are not of unet: time_embedding\.cond_proj\.weight"):
        single_file.join({"unet": (config, tensors | extra)}, "sd2")
    with pytest.raises(ValueError, match="has a AttnDownBlock2D, expected one of CrossAttnDownBlock2D"):
        single_file.unet.table(config | {"down_block_types": ["AttnDownBlock2D"] * 4})
    with pytest.raises(ValueError, match="transformer_layers_per_block is"):
        single_file.unet.table(config | {"transformer_layers_per_block": [1, 2]})


@pytest.mark.parametrize("kind", ["sd2_depth", "sdxl"])
def test_components_load_and_come_back(kind):
    parts = tiny(kind)
    family = single_file.KINDS[kind].family
    options = {"unet": {"norm_num_groups": 2, "attention_head_dim": TINY[family].get("attention_head_dim")}}
    options |= {"vae": {"norm_num_groups": 2}}
    options["unet"] |= {"addition_time_embed_dim": 4} if family.startswith("sdxl") else {}
    state = single_file.join(parts, kind)
    components = single_file.split(state, kind, options=options)
    returned = {}
    for name, (config, tensors) in components.items():
        if name != "scheduler":
            form = weights.FORMATS[config.get("_class_name") or config["architectures"][0]]
            module = form.module(config)
            params = layout.read(form.table(module), form.shapes(module), tensors)
            returned[name] = (form.config(module), layout.tensors(weights.to_state(module, params)))
    same(arrays(single_file.join(returned, kind)), arrays(state))


def test_a_kind_belongs_to_the_family_that_lists_it():
    for name, family in single_file.FAMILIES.items():
        assert {kind.family for kind in family.kinds.values()} == {name}
        assert all(single_file.parts(kind) is family.parts for kind in family.kinds)
    assert len(single_file.KINDS) == sum(len(family.kinds) for family in single_file.FAMILIES.values())
