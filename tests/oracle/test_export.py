"""What was trained here, written as a pipeline of diffusers': the same pictures from the same initial noise, there and read back."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from ldm_jax import cli, models, pipelines, weights  # noqa: E402
from ldm_jax.cli.convert import write_start  # noqa: E402
from ldm_jax.config import config_file  # noqa: E402
from ldm_jax.diffusion.denoiser import make_denoiser  # noqa: E402
from ldm_jax.diffusion.prediction import posterior_mean, step_log_var  # noqa: E402
from ldm_jax.diffusion.process import PROCESSES  # noqa: E402
from ldm_jax.models.autoencoder_kl import AutoencoderKL  # noqa: E402
from ldm_jax.models.dit import DiT  # noqa: E402
from ldm_jax.models.unet import UNet  # noqa: E402
from ldm_jax.pipelines import export  # noqa: E402
from ldm_jax.training import (  # noqa: E402
    experiment,
    first_stage,
    loop,
    restore,
    sampling,
)
from ldm_jax.training.conditioning import Condition, Conditioning  # noqa: E402

pytestmark = pytest.mark.oracle

STEPS, TOLERANCE = 5, 2e-3
VAE = {"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
LEVELS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
UNET = LEVELS | {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}


def stirred(params, seed=0):
    """Random numbers everywhere: a fresh network's output is 0."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + 0.05 * generator.standard_normal(x.shape), np.float32), params)


def new(module, shape, seed=0):
    """The parameters of a fresh network."""
    return jax.jit(lambda key: models.init(module, key, shape))(jax.random.key(seed))["params"]


def initial_noise(shape, count=2, seed=0):
    keys = sampling.image_keys(seed, np.arange(count))
    return keys, np.asarray(jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys))


def ours(model, params, labels=None, guidance=1.0, times=None, sampler="ddim"):
    """f32[2, H, W, 3] in [0, 1], as `ldm sample --sampler=ddim --grid=trailing --steps=5` draws them."""
    settings = sampling.Settings(sampler, STEPS, "trailing", guidance)
    times = sampling.make_times(model, settings) if times is None else jnp.asarray(times, jnp.float32)
    keys, _ = initial_noise(model.shape)
    cond = {"label": jnp.asarray([0, 0] if labels is None else labels, jnp.int32)}
    generate = jax.jit(sampling.make_generate(model, settings))
    x = generate(params, first_stage.frozen(model.stage), keys, cond, times, jnp.float32(guidance))
    return np.clip(np.asarray(x) / 2 + 0.5, 0, 1)


def theirs(folder, monkeypatch, shape, **call):
    """(diffusers' pictures, its pipeline) with that noise."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.tensor(initial_noise(shape)[1].transpose(0, 3, 1, 2))
    module = sys.modules[type(pipeline).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: start)
    return pipeline(num_inference_steps=STEPS, output_type="np", **call).images, pipeline


def alike(a, b):
    assert np.std(a) > 0.02 and np.mean((a > 0.01) & (a < 0.99)) > 0.3, "pictures that could tell nothing"
    np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory):
    """Two steps of configs/imagenet256_dit_xl2.py:smoke from random parameters, on a first stage of random parameters."""
    root = tmp_path_factory.mktemp("dit")
    stage = config_file.load("configs/imagenet256_vae.py:smoke")
    config = config_file.load("configs/imagenet256_dit_xl2.py:smoke")
    with stage.unlocked(), config.unlocked():
        stage.train.images, stage.ema.half_lives = 16, ()
        config.train.update(images=32, checkpoint_every=0, validate_every=0, validate_images=16, pictures=1)
        config.first_stage.workdir, config.init_from.workdir = str(root / "stage"), str(root / "start")
        config.model.remat, config.optimizer.learning_rate, config.ema.half_lives = False, 1e-2, (16,)
    params = new(experiment.parse(stage).network, (32, 32, 3))
    write_start(root / "stage", {"autoencoder": stirred(params)}, root)
    (root / "stage" / "config.json").write_text(json.dumps(stage.to_dict()))
    (root / "stage" / "checkpoints" / "0").rename(root / "stage" / "checkpoints" / "1")  # as after its one step
    params = new(experiment.parse(config).network, (8, 8, 4))
    write_start(root / "start", {"denoiser": stirred(params)}, root)
    loop.train(config, root / "run", quiet=True)
    return root / "run"


def test_a_run_of_a_dit_is_a_dit_pipeline(dit_run, tmp_path, monkeypatch):
    assert cli.main(["convert", str(dit_run), str(tmp_path / "out")]) == 0
    restored = restore.restore(dit_run)
    labels, shape = [2, 1], restored.model.shape
    mine = ours(restored.model, restored.params, labels, 1.5)
    images, pipeline = theirs(tmp_path / "out", monkeypatch, shape, class_labels=labels, guidance_scale=1.5)
    assert type(pipeline).__name__ == "DiTPipeline" and pipeline.labels["circle"] in range(4)
    alike(mine, images)
    noise = initial_noise(shape)[1]
    alike(mine, pipelines.load(tmp_path / "out").draw(2, labels, steps=STEPS, guidance=1.5, latents=noise))


def test_the_average_is_chosen_and_a_network_is_written_alone(dit_run, tmp_path):
    raw, average = (restore.restore(dit_run, None, ema).params["denoiser"] for ema in ("none", None))
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), raw, average))) > 1e-3
    for ema, params in (("none", raw), ("16", average)):
        out = tmp_path / ema
        assert cli.main(["convert", str(dit_run), str(out), "--component=denoiser", f"--ema={ema}"]) == 0
        jax.tree.map(np.testing.assert_array_equal, weights.load(out, options={"scan_layers": True})[1], params)
    assert cli.main(["convert", str(dit_run), str(tmp_path / "vae"), "--component=first_stage"]) == 0
    assert weights.load(tmp_path / "vae")[0].scaling_factor == 1


def made(module, process, prediction, side, stage=None, learned=False):
    """A model of random parameters, as a run would be restored."""
    shape = (side, side, module.in_channels)
    params = stirred(new(module, shape))
    rest = {k: v for k, v in process.items() if k != "name"}
    built = PROCESSES[process["name"]](**rest)
    model = sampling.Model(module, Conditioning(), stage, built, prediction, shape, learned)
    return model, {"denoiser": params}, (process, prediction, learned)


@pytest.fixture(scope="module")
def stage():
    module = AutoencoderKL(**VAE)
    params = stirred(new(module, (16, 16, 3), seed=1))
    mean, std = np.array([0.3, -0.2, 0.1, 0.5], np.float32), np.array([0.6, 1.4, 0.8, 2.0], np.float32)
    return first_stage.FirstStage(module, params, mean, std, (8, 8, 4))


# An eps that is not the noise is divided by alpha: little noise keeps pictures of a random network in range.
LITTLE = tuple(np.linspace(1e-4, 5e-3, 200).tolist())
TABLES = [
    ({"name": "discrete_vp", "betas": LITTLE}, "eps"),
    ({"name": "discrete_vp", "betas": "linear"}, "x"),
    ({"name": "discrete_vp", "betas": "scaled_linear", "zero_terminal_snr": True}, "v"),
    ({"name": "vp_linear", "beta_max": 1.0}, "eps"),
]


@pytest.mark.parametrize("process,prediction", TABLES, ids=lambda x: x if isinstance(x, str) else x["name"])
def test_a_unet_in_pixels_is_a_ddim_pipeline(tmp_path, monkeypatch, process, prediction):
    model, params, spoken = made(UNet(in_channels=3, out_channels=3, **UNET), process, prediction, 16)
    export.pipeline(tmp_path, (model.denoiser, params["denoiser"]), 16, *spoken)
    mine = ours(model, params, times=_own_times(model))
    images, pipeline = theirs(tmp_path, monkeypatch, model.shape, eta=0.0)
    assert type(pipeline).__name__ == "DDIMPipeline"
    alike(mine, images)
    if prediction == "eps":
        alike(mine, pipelines.load(tmp_path).draw(2, steps=STEPS, latents=initial_noise(model.shape)[1]))


def _own_times(model):
    """A continuous process is drawn from at the table's entries; None: the trailing grid."""
    if model.process.levels is not None:
        return None
    return [*(np.array([999, 799, 599, 399, 199]) / 999), 0.0]


def test_the_table_of_a_continuous_process_is_that_process():
    betas = export.scheduler({"name": "vp_linear", "beta_min": 0.2, "beta_max": 15.0}, "eps")["trained_betas"]
    process, t = PROCESSES["vp_linear"](0.2, 15.0), np.arange(1000) / 999
    np.testing.assert_allclose(process.time_input(jnp.asarray(t)), np.arange(1000), rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.cumprod(1 - np.array(betas))), process.alpha(jnp.asarray(t)), rtol=3e-6)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "options", [{"betas": "cosine", "levels": 50, "s": 0.02, "beta_min": 1e-3}, {"betas": "linear", "beta_max": 0.01}]
)
def test_a_table_with_options_is_written_as_it_is(options, terminal):
    process = {"name": "discrete_vp", "zero_terminal_snr": terminal, **options}
    config = export.scheduler(process, "v")
    scheduler = diffusers.DDIMScheduler.from_config(config)
    built = PROCESSES["discrete_vp"](zero_terminal_snr=terminal, **options)
    t = jnp.asarray((np.arange(built.levels) + 1) / built.levels)
    assert config["num_train_timesteps"] == len(scheduler.alphas_cumprod) == built.levels
    np.testing.assert_allclose(built.alpha(t) ** 2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)


def test_a_unet_of_a_flow_in_pixels_is_a_ddpm_pipeline(tmp_path, monkeypatch):
    module = UNet(in_channels=3, out_channels=3, **UNET)
    model, params, spoken = made(module, {"name": "flow", "shift": 2.0}, "flow", 16)
    export.pipeline(tmp_path, (module, params["denoiser"]), 16, *spoken)
    images, pipeline = theirs(tmp_path, monkeypatch, model.shape)
    read = pipelines.load(tmp_path)
    sigmas = pipeline.scheduler.sigmas.numpy()
    mine = ours(model, params, times=sigmas / (2 - sigmas), sampler="euler")  # sigma = 2 t / (1 + t)
    assert type(pipeline).__name__ == "DDPMPipeline" and pipeline.scheduler.config.shift == 2
    alike(mine, images)
    alike(mine, read.draw(2, steps=STEPS, latents=initial_noise(model.shape)[1]))


def test_a_unet_in_latents_is_an_ldm_pipeline(tmp_path, monkeypatch, stage):
    module = UNet(in_channels=4, out_channels=4, **UNET)
    model, params, spoken = made(module, {"name": "discrete_vp"}, "eps", 8, stage)
    first = export.whitened(stage.network, stage.params, stage.mean, stage.std)
    export.pipeline(tmp_path, (module, params["denoiser"]), 8, *spoken, first)
    mine = ours(model, params)
    images, pipeline = theirs(tmp_path, monkeypatch, model.shape)
    assert type(pipeline).__name__ == "LDMPipeline" and pipeline.vqvae.config.scaling_factor == 1
    alike(mine, images)
    alike(mine, pipelines.load(tmp_path).draw(2, steps=STEPS, latents=initial_noise(model.shape)[1]))


def test_a_learned_variance_in_pixels_is_a_ddpm_pipeline(tmp_path, monkeypatch):
    module = UNet(in_channels=3, out_channels=6, **UNET)
    model, params, spoken = made(module, {"name": "discrete_vp", "betas": "cosine"}, "eps", 16, learned=True)
    export.pipeline(tmp_path, (module, params["denoiser"]), 16, *spoken)
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    _, pipeline = theirs(tmp_path, monkeypatch, model.shape)
    assert type(pipeline).__name__ == "DDPMPipeline"
    # One step of each with the same noise, in the middle: t = 600 -> 400 of the table.
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    noise = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    given = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(given, "randn_tensor", lambda *args, **kwargs: torch.tensor(noise.transpose(0, 3, 1, 2)))
    x_t = torch.tensor(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        out = pipeline.unet(x_t, 599).sample
    theirs_s = scheduler.step(out, 599, x_t).prev_sample.numpy().transpose(0, 2, 3, 1)

    @jax.jit
    def step(x, t, s):
        apply = lambda p, x, t, cond: module.apply({"params": p}, x, t, cond)  # noqa: E731
        clean = make_denoiser(apply, params["denoiser"], model.process, "eps", {}, learned_variance=True)(x, t)
        spread = jnp.exp(0.5 * step_log_var(model.process, clean.log_var, t, s))
        return posterior_mean(model.process, clean, t, s) + spread * noise

    mine_s = step(x, 0.6, 0.4)
    np.testing.assert_allclose(mine_s, theirs_s, atol=TOLERANCE, rtol=0)
    assert pipelines.load(tmp_path).parts.schedule.learned_variance


@pytest.mark.parametrize("quant", [True, False])
def test_whitening_becomes_part_of_the_autoencoder(tmp_path, stage, quant):
    module = AutoencoderKL(**VAE, use_quant_conv=quant, use_post_quant_conv=quant)
    params = {k: v for k, v in stage.params.items() if quant or "quant" not in k}
    export.network(tmp_path, *export.whitened(module, params, stage.mean, stage.std), 16)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    apply = jax.jit(module.apply, static_argnames="method")
    posterior = apply({"params": params}, x, method="encode")
    z = np.asarray((posterior.mean - stage.mean) / stage.std)
    with torch.no_grad():
        told = theirs.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist
        back = theirs.decode(torch.tensor(z.transpose(0, 3, 1, 2))).sample.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(told.mean.numpy().transpose(0, 2, 3, 1), z, atol=1e-5)
    spread = np.exp(0.5 * np.asarray(posterior.logvar)) / stage.std
    np.testing.assert_allclose(told.std.numpy().transpose(0, 2, 3, 1), spread, atol=1e-5, rtol=1e-5)
    decoded = apply({"params": params}, z * stage.std + stage.mean, method="decode")
    np.testing.assert_allclose(back, decoded, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["scaling_factor"] == 1 and config["sample_size"] == 16


DIT = {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "time_shift": 1.0}


@pytest.mark.parametrize(
    "module,latent,said",
    [
        (DiT(**DIT, rope_theta=100.0), True, "rope_theta is 100.0, DiTTransformer2DModel has 0.0 alone"),
        (DiT(**DIT | {"time_shift": 0.0}), True, "time_shift is 0.0, DiTTransformer2DModel has 1.0 alone"),
        (DiT(**DIT), False, "DiT in pixels"),
        (DiT(**DIT | {"num_classes": 0}), True, "text_dim is 0 and num_classes 0"),
        (DiT(**DIT | {"num_classes": 2000}), True, "num_classes is 2000; DiTPipeline guides away from class 1000"),
        (UNet(**UNET, num_class_embeds=3), False, "num_class_embeds is 3; no pipeline of diffusers tells a U-Net"),
        (UNet(**UNET, conv_in_kernel=1), False, "those of UNet2DConditionModel"),
    ],
)
def test_what_no_pipeline_has_is_refused_by_name(tmp_path, stage, module, latent, said):
    first = (stage.network, stage.params) if latent else None
    with pytest.raises(ValueError, match=said):
        export.pipeline(tmp_path / "out", (module, {}), 8, {"name": "discrete_vp"}, "eps", False, first)
    assert not (tmp_path / "out").exists()


def test_what_no_scheduler_has_is_refused_by_name(tmp_path, stage):
    for process in ("vp_cosine", "sub_vp", "ve", "edm", "trig"):
        with pytest.raises(ValueError, match=f"process is '{process}': diffusers has schedulers for"):
            export.scheduler({"name": process}, "eps")
    with pytest.raises(ValueError, match="prediction is 'score', expected eps, v, x with the process 'discrete_vp'"):
        export.scheduler({"name": "discrete_vp"}, "score")
    with pytest.raises(ValueError, match="prediction is 'v', expected 'flow'"):
        export.scheduler({"name": "flow"}, "v")
    flow = {"name": "flow"}, "flow", False
    for module, name in ((DiT(**DIT), "DiTPipeline"), (UNet(**UNET), "LDMPipeline")):
        with pytest.raises(ValueError, match=rf"process is 'flow': {name} \(latents\) takes no flow scheduler"):
            export.pipeline(tmp_path / "out", (module, {}), 8, *flow, (stage.network, stage.params))


def test_a_text_encoder_trained_here_is_refused_and_other_parts_named(dit_run, tmp_path, monkeypatch, capsys):
    run = restore.restore(dit_run)
    text = Condition("text", None, None, None, takes=("prompts",))
    monkeypatch.setattr(
        restore, "restore", lambda *args: run._replace(model=run.model._replace(conditioning=Conditioning((text,))))
    )
    assert cli.main(["convert", str(dit_run), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "config.condition.text is set" in said and "--component=denoiser or --component=first_stage" in said
    assert list(tmp_path.iterdir()) == []
