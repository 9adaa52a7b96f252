"""What is seen of a config before any work: ranges, types, and networks that do not fit, of a run and of its first stage."""

import jax
import pytest

from ldm_jax.config import config_file, config_keys
from ldm_jax.training import check, loop

LDM, VAE, CIFAR = "configs/quickstart.py:smoke", "configs/quickstart_vae.py:smoke", "configs/cifar10_dit_pixel.py:smoke"
UNET, CLASSIFIER, XL = (
    "configs/cifar10_ldm_unet.py:smoke",
    "configs/cifar10_classifier.py:smoke",
    "configs/imagenet256_dit_xl2.py",
)

WRONG = [
    (LDM, {"model.num_heads": 0}, "config.model.num_heads=0; expected at least 1"),
    (LDM, {"model.hidden_size": 0}, "config.model.hidden_size=0; expected at least 1"),
    (LDM, {"model.patch_size": 0}, "config.model.patch_size=0; expected at least 1"),
    (LDM, {"model.depth": 10**12}, "config.model.depth=1000000000000; expected at most 1000"),
    (LDM, {"model.hidden_size": "x"}, "config.model.hidden_size='x'; expected a whole number"),
    (LDM, {"model.hidden_size": None}, "config.model.hidden_size=None; expected a whole number"),
    (LDM, {"model.hidden_size": True}, "config.model.hidden_size=True; expected a whole number"),
    (LDM, {"model.hiden_size": 64}, "config.model.hiden_size is unknown; did you mean hidden_size?"),
    (LDM, {"model.dtype": "float32"}, "config.model.dtype is unknown"),
    (LDM, {"model.num_heads": 3}, "DiT: hidden_size 32 is not a multiple of num_heads 3"),
    (LDM, {"model.patch_size": 3}, "H and W multiples of patch_size 3"),
    (LDM, {"model.in_channels": 4}, "config.model.in_channels=4, but what is modelled has shape (8, 8, 6)"),
    (LDM, {"model.out_channels": 12}, "config.task.learned_variance is False, so expected 6"),
    (LDM, {"model.text_dim": 32}, "config.model.text_dim=32 must equal config.text.width=16"),
    (LDM, {"text.heads": 3}, "width 16 is not a multiple of heads 3"),
    (LDM, {"text.deepth": 3}, "config.text.deepth is unknown; did you mean depth?"),
    (LDM, {"tokenizer.length": 2}, "config.tokenizer.length=2; expected at least 3"),
    (LDM, {"condition.label": True}, "config.model.num_classes=0, but config.condition.label is True"),
    (LDM, {"condition.lable": True}, "config.condition.lable is unknown; did you mean label?"),
    (LDM, {"condition.text": 3}, "config.condition.text=3; expected True, False or a block of options"),
    (LDM, {"condition.text": {"dorp": 0.1}}, "config.condition.text.dorp is unknown; did you mean drop?"),
    (LDM, {"condition.text": {"drop": 1.5}}, "config.condition.text.drop=1.5; expected below 1"),
    (LDM, {"model.num_classes": 5}, "config.model.num_classes=5, but config.condition.label is False; expected none"),
    (LDM, {"input.resolution": 30}, "config.input.resolution=30"),
    (LDM, {"input.crop": "centre"}, "config.input.crop: crop 'centre' is unknown"),
    (LDM, {"task.drop": 1.5}, "config.task.drop=1.5; expected below 1"),
    (LDM, {"task.wieght": "simple"}, "config.task.wieght is unknown; did you mean weight?"),
    (LDM, {"task.prediction": "velocity"}, "config.task.prediction='velocity'; there are"),
    (LDM, {"process": {"name": "flow", "shfit": 2}}, "config.process.shfit is unknown; did you mean shift?"),
    (LDM, {"data": {"name": "zip"}}, "config.data.path is missing; expected a string"),
    (LDM, {"data.siez": 3}, "config.data.siez is unknown; did you mean size?"),
    (LDM, {"optimizer.learning_rate": "fast"}, "config.optimizer.learning_rate='fast'; expected a number"),
    (LDM, {"optimizer.b2": 1.0}, "config.optimizer.b2=1.0; expected below 1"),
    (LDM, {"optimizer.lerning_rate": 1.0}, "config.optimizer.lerning_rate is unknown; did you mean learning_rate?"),
    (LDM, {"optimizer": {"name": "adamw"}}, "config.optimizer.learning_rate is missing"),
    (LDM, {"sampler.options": {"eat": 1}}, "config.sampler.options.eat is unknown"),
    (
        LDM,
        {"sampler.guidance_options": {"eta": float("nan")}, "sampler.guidance_method": "apg"},
        "config.sampler.guidance_options.eta=nan; expected a finite number",
    ),
    (LDM, {"sampler.guidance_schedule": "linear", "sampler.schedule_options": {"flor": 1}}, "options.flor is unknown"),
    (
        LDM,
        {"process": {"name": "discrete_vp", "betas": None}},
        "config.process.betas=None; expected an array or a string",
    ),
    (LDM, {"sampler.steps": 0}, "config.sampler.steps=0; expected at least 1"),
    (LDM, {"sampler.t_lo": 1.0}, "config.sampler: guidance interval"),
    (LDM, {"train.accumulate": 3}, "config.train.batch_size=16 must be a multiple of config.train.accumulate=3"),
    (LDM, {"train.images": 10**14}, "expected fewer than 2**31"),
    (LDM, {"mesh.rules": ((".*", ("fdsp",)),)}, "names the axis 'fdsp'; there are data, fsdp, tensor"),
    (LDM, {"mesh.rules": (("(", ("fsdp",)),)}, "is no regular expression"),
    (LDM, {"first_stage.config": LDM}, "has the task 'diffusion'; expected 'autoencoder'"),
    (LDM, {"first_stage.config": "configs/quickstart_vea.py"}, "did you mean configs/quickstart_vae.py"),
    (LDM, {"first_stage.whitening": "none"}, "config.first_stage.whitening='none'; expected one of auto, measured"),
    (UNET, {"model.norm_num_groups": 3}, "norm_num_groups 3 does not divide"),
    (UNET, {"model.block_out_channels": (16, 0)}, "config.model.block_out_channels=(16, 0); expected at least 1"),
    (UNET, {"model.block_out_channels": 16}, "config.model.block_out_channels=16; expected a tuple of whole numbers"),
    (UNET, {"model.down_block_types": ("Attn", "Attn")}, "down_block_types contains 'Attn'"),
    (
        CIFAR,
        {"model.patch_size": 1, "input.resolution": 4096, "model.hidden_size": 384},
        "expected a product of at most",
    ),
    (CLASSIFIER, {"model.widths": ()}, "config.model"),
    (CLASSIFIER, {"condition.label": True}, "the task 'classifier' takes no condition"),
    (CLASSIFIER, {"task.cutout": 64}, "task.cutout is 64; expected at most the resolution, 32"),
    (VAE, {"model.norm_num_groups": 0}, "config.model.norm_num_groups=0; expected at least 1"),
    (VAE, {"task.adversarial": {"widht": 4}}, "config.task.adversarial.widht is unknown; did you mean width?"),
    (VAE, {"task.adversarial": 5}, "config.task.adversarial=5; expected a block"),
    (
        VAE,
        {"task.adversarial": {"width": 4, "optimizer": {"lr": 1}}},
        "config.task.adversarial.optimizer.lr is unknown",
    ),
    (VAE, {"task.perceptual": {"weight": 1.0}}, "config.task.perceptual.name is missing"),
    (VAE, {"init_from.workdir": "/nowhere"}, "config.init_from.workdir=/nowhere: /nowhere is not a run"),
]


def changed(name, values):
    config = config_file.load(name).unlock()
    for key, value in values.items():
        *path, last = key.split(".")
        block = config
        for part in path:
            block = block[part]
        if last in block:
            del block[last]  # a ConfigDict would cast to the type that it holds
        block[last] = value
    return config.lock()


@pytest.mark.parametrize(
    "name, values, said", WRONG, ids=[f"{key}={value}" for _, v, _ in WRONG for key, value in [*v.items()][:1]]
)
def test_what_cannot_run_is_one_line_that_names_it(name, values, said):
    with pytest.raises(ValueError) as error:
        check.check(changed(name, values))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_is_found_before_the_first_stage_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_train", None)
    with pytest.raises(ValueError, match="hidden_size 50"):
        loop.train(changed(LDM, {"model.hidden_size": 50}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_data_that_does_not_fit_is_found_before_the_first_stage_is_trained(tmp_path):
    config = changed(UNET, {"data": {"name": "shapes", "size": 64}, "input.flip": False, "model.num_class_embeds": 8})
    with pytest.raises(ValueError, match=r"config\.model\.num_class_embeds=8; the data has 4 classes .* expected 5"):
        loop.train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "first_stage").exists()


def test_a_wrong_key_of_a_first_stages_own_config_is_found(tmp_path):
    stage = tmp_path / "stage.py"
    text = "from configs import quickstart_vae\ndef get_config(arg=''):\n    c = quickstart_vae.get_config('smoke')\n"
    stage.write_text(text + "    c.model.latent_chanels = 6\n    return c")
    with pytest.raises(ValueError) as error:
        check.check(changed(LDM, {"first_stage.config": str(stage)}))
    assert f"config.first_stage.config={stage}" in str(error.value) and "latent_chanels is unknown" in str(error.value)


def test_lists_are_as_good_as_tuples():
    config = changed(VAE, {"model.block_out_channels": [8, 8, 8], "ema.half_lives": [300]})
    _, state = check.check(config)
    _, expected = check.check(config_file.load(VAE))
    assert jax.tree.structure(state.params) == jax.tree.structure(expected.params)


def test_every_range_is_of_a_key_that_there_is():
    keys = set(config_file.keys(config_file.base()))
    unknown = {key for key in config_keys.RANGES if "." in key and key not in keys}
    assert not unknown
