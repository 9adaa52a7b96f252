"""`ldm convert`: each form into each other with the same numbers, nothing overwritten or left half written, and bad input."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import jax  # noqa: E402

from ldm_jax import cli, pipelines, runs, weights  # noqa: E402
from ldm_jax.pipelines import convert  # noqa: E402
from ldm_jax.runs import checkpoint  # noqa: E402
from ldm_jax.training import loop, open_stage  # noqa: E402
from ldm_jax.weights import files  # noqa: E402
from tests.pipelines import published as tiny  # noqa: E402
from tests.training.tiny import config as tiny_config  # noqa: E402

pytestmark = pytest.mark.oracle

# The least that has the shapes of SD 1: what is not measured (heads, groups, 768 channels of text) is as published.
UNET = {"block_out_channels": (32, 64), "cross_attention_dim": 768, "attention_head_dim": 8, "norm_num_groups": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder whose networks the LDM layout can say."""
    from transformers import CLIPTextConfig, CLIPTextModel

    path = tmp_path_factory.mktemp("published") / "pipeline"
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=8,
        num_attention_heads=12,
        num_hidden_layers=1,
        vocab_size=64,
        max_position_embeddings=tiny.LENGTH,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
    )
    diffusers.StableDiffusionPipeline(
        vae=tiny.stir(vae),
        text_encoder=tiny.stir(CLIPTextModel(text)),
        tokenizer=tiny.tokenizer(),
        unet=tiny.unet(**UNET),
        scheduler=diffusers.DDIMScheduler(**tiny.DDIM),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    assert cli.main(["convert", str(folder), str(path), "--to=single"]) == 0
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An autoencoder of two averages, trained for two steps."""
    path = tmp_path_factory.mktemp("run") / "run"
    loop.train(tiny_config(images=16, checkpoint_every=0), path, quiet=True)
    return path


def same(a, b, dtype=None):
    """Two files or folders of weights hold the same tensors, the second in another dtype."""
    a, b = (files.open_tensors(path) for path in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name].read(), b[name].read()
        assert y.dtype == (x.dtype if dtype is None else np.dtype(dtype)), name
        np.testing.assert_array_equal(x if dtype is None else x.astype(dtype), y, err_msg=name)


PARTS = ("unet", "vae", "text_encoder")


def test_a_folder_becomes_a_file_and_a_folder_again(folder, single, tmp_path, capsys):
    out = tmp_path / "again"
    assert cli.main(["convert", str(single), str(out), f"--tokenizer={folder}"]) == 0
    assert "StableDiffusionPipeline" in capsys.readouterr().out
    prefix = lambda name: name.removeprefix("text_model.")  # noqa: E731  (the file always has it, transformers 5 no more)
    for part in PARTS:
        a, b = ({prefix(k): v.read() for k, v in files.open_tensors(p / part).items()} for p in (folder, out))
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out)
    expected = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    tokens = pipeline.tokenizer("a red cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = [p.text_encoder(tokens)[0] for p in (pipeline, expected)]
        outputs = [p.unet(torch.ones(1, 4, 8, 8), 7, states[0]).sample for p in (pipeline, expected)]
    assert torch.equal(*states) and torch.equal(*outputs)


def test_a_single_file_is_padded_as_its_text_encoder_was_trained(single, tmp_path):
    from transformers import CLIPTokenizer

    words = tiny.tokenizer()
    words.pad_token = "b"
    words.save_pretrained(tmp_path / "words")
    assert CLIPTokenizer.from_pretrained(tmp_path / "words").pad_token == "b"
    (encoder,) = pipelines.load(single, tokenizer=tmp_path / "words").parts.text
    assert cli.main(["convert", str(single), str(tmp_path / "out"), f"--tokenizer={tmp_path / 'words'}"]) == 0
    for tokenizer in (encoder.tokenizer, CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")):
        ids = tokenizer("a", padding="max_length", max_length=tiny.LENGTH).input_ids
        assert ids[2:] == [1] * (tiny.LENGTH - 2)


def test_diffusers_reads_the_single_file(single, folder):
    theirs = diffusers.AutoencoderKL.from_single_file(str(single), config=str(folder), subfolder="vae")
    expected = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_pipeline_is_cast_and_keeps_its_other_parts(folder, tmp_path, dtype):
    out = tmp_path / "out"
    assert cli.main(["convert", str(folder), str(out), f"--dtype={dtype}"]) == 0
    for part in PARTS:
        same(folder / part, out / part, dtype)
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((folder / name).read_text())
    read = diffusers.StableDiffusionPipeline.from_pretrained(out)
    assert read.text_encoder.dtype == getattr(torch, dtype)


def test_one_network_goes_both_ways(folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder / "vae"), str(tmp_path / "vae.safetensors"), "--to=single"]) == 0
    assert cli.main(["convert", str(tmp_path / "vae.safetensors"), str(tmp_path / "vae")]) == 0
    same(folder / "vae", tmp_path / "vae")
    assert "a file does not say; --scaling-factor tells another" in capsys.readouterr().out
    words = ["convert", str(tmp_path / "vae.safetensors"), str(tmp_path / "xl"), "--scaling-factor=0.13025"]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "xl" / "config.json").read_text())["scaling_factor"] == 0.13025
    assert cli.main(["convert", str(folder / "unet"), str(tmp_path / "unet")]) == 0
    same(folder / "unet", tmp_path / "unet")


def test_a_pipeline_becomes_a_start_for_training(folder, tmp_path):
    assert cli.main(["convert", str(folder), str(tmp_path / "start"), "--to=orbax", "--dtype=bfloat16"]) == 0
    step = checkpoint.pick(tmp_path / "start", None)
    assert step == 0
    average = runs.read(tmp_path / "start").average
    params = checkpoint.restore_params(tmp_path / "start", step, average)
    assert sorted(params) == ["autoencoder", "denoiser"]
    _, expected = weights.load(folder, "unet", "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params["denoiser"], expected)


def test_a_training_starts_from_a_converted_network(run, tmp_path):
    assert cli.main(["convert", str(run), str(tmp_path / "vae")]) == 0
    assert cli.main(["convert", str(tmp_path / "vae"), str(tmp_path / "start"), "--to=orbax"]) == 0
    c = tiny_config(images=8, checkpoint_every=0)
    with c.unlocked():
        c.init_from.workdir, c.optimizer.learning_rate = str(tmp_path / "start"), 0.0
    loop.train(c, tmp_path / "run", quiet=True)
    stage = open_stage.load(tmp_path / "run")
    _, expected = weights.load(tmp_path / "vae")
    jax.tree.map(np.testing.assert_array_equal, stage.params, expected)


def test_a_run_in_another_dtype(run, tmp_path):
    for words in ([], ["--dtype=float16"]):
        assert cli.main(["convert", str(run), str(tmp_path / f"vae{len(words)}"), *words]) == 0
    same(tmp_path / "vae0", tmp_path / "vae1", "float16")
    assert cli.main(["convert", str(run), str(tmp_path / "vae.safetensors"), "--to=orbax"]) == 2


def test_a_crash_leaves_nothing(folder, tmp_path, monkeypatch):
    def fails(path, model):
        path.mkdir()
        (path / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_folder", fails)
    assert cli.main(["convert", str(folder), str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_number_out_of_float16_is_an_error(folder, tmp_path, capsys):
    model = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    with torch.no_grad():
        model.decoder.conv_in.bias[0] = 1e5
    model.save_pretrained(tmp_path / "large")
    assert cli.main(["convert", str(tmp_path / "large"), str(tmp_path / "out"), "--dtype=float16"]) == 2
    assert "decoder.conv_in.bias: 100000 is out of the range of float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["convert", str(tmp_path / "large"), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0


def test_a_file_that_lacks_a_tensor_is_an_error(single, tmp_path, capsys):
    state = files.open_tensors(single)
    state.pop("model.diffusion_model.out.2.bias")
    files.write_safetensors(tmp_path / "less.safetensors", state)
    words = [str(tmp_path / "less.safetensors"), str(tmp_path / "out"), "--to=orbax"]
    assert cli.main(["convert", *words]) == 2
    assert "1 missing: conv_out.bias" in capsys.readouterr().err


def test_what_a_single_file_cannot_say_is_an_error(tmp_path, capsys):
    tiny.unet(**UNET | {"attention_head_dim": 4}).save_pretrained(tmp_path / "unet")
    assert cli.main(["convert", str(tmp_path / "unet"), str(tmp_path / "out.safetensors"), "--to=single"]) == 2
    assert "unet's attention_head_dim is 4, and a reader takes 8" in capsys.readouterr().err


WRONG = [
    (["{single}", "{out}", "--scaling-factor=nan"], "--scaling-factor=nan; expected a finite number above 0"),
    (["{data}", "{out}/a/b"], "expected a run of `ldm train`"),
    (["{data}", "{out}"], "expected a run of `ldm train`, a pipeline's folder (model_index.json)"),
    (["{data}/nothing", "{out}"], "nothing: no such folder or file"),
    (["{data}/text.txt", "{out}"], "expected a file that ends in .safetensors"),
    (["{folder}", "{data}"], "exists; nothing is overwritten"),
    (["{folder}", "{out}", "--to=onnx"], "--to=onnx; expected hf, single, orbax"),
    (["{folder}", "{out}", "--to=single"], "expected a file's name that ends in .safetensors"),
    (["{folder}", "{out}.safetensors"], "expected the name of a folder"),
    (["{folder}", "{out}", "--dtype=int8"], "--dtype=int8; expected float32, bfloat16, float16"),
    (["{folder}", "{out}", "--step=3"], "--step=3 is for a run of `ldm train`"),
    (["{folder}", "{out}", "--tokenizer={data}"], "tokenizer is for single files"),
    (["{folder}/text_encoder", "{out}.safetensors", "--to=single"], "no place for a CLIPTextModel"),
    (["{folder}/text_encoder", "{out}", "--to=orbax"], "holds CLIPTextModel; expected a U-Net"),
    (["{single}", "{out}"], "a single file has no tokenizer; give the folder of one"),
    (["{single}", "{out}", "--tokenizer={data}"], "expected vocab.json + merges.txt"),
    (["{run}", "{out}", "--step=99"], "has no checkpoint of step 99; it has 2"),
    (["{run}", "{out}", "--ema=none"], "--ema=none: {run} is a first stage"),
    (["{run}", "{out}", "--component=denoiser"], "holds a run of the task 'autoencoder'"),
    (["{run}", "{out}", "--component=text"], "--component=text; expected denoiser, first_stage"),
    (["{run}", "{out}", "--prediction=epsilon"], "--prediction=epsilon is for a single file"),
    (["{data}/empty_run", "{out}"], "has no intact checkpoint"),
]


@pytest.mark.parametrize("words,said", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_one_line_and_exit_code_2(folder, single, run, tmp_path, capsys, words, said):
    data = tmp_path / "data"
    (data / "empty_run").mkdir(parents=True)
    (data / "text.txt").write_text("no weights")
    (data / "empty_run" / "config.json").write_text((run / "config.json").read_text())
    names = {"folder": folder, "single": single, "run": run, "data": data, "out": tmp_path / "out"}
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["convert", *(word.format(**names) for word in words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ldm convert: ") and said.format(**names) in error
    assert sorted(tmp_path.rglob("*")) == before


def test_other_first_stages_are_written_as_they_are(tmp_path):
    config = tiny_config(images=16, checkpoint_every=0).unlock()
    config.model.update(name="vq", num_vq_embeddings=16)
    loop.train(config.lock(), tmp_path / "vq", quiet=True)
    assert cli.main(["convert", str(tmp_path / "vq"), str(tmp_path / "out")]) == 0
    model = diffusers.VQModel.from_pretrained(tmp_path / "out")
    assert model.config.sample_size == 32
    params = checkpoint.restore_params(tmp_path / "vq", 2, "100")["autoencoder"]
    assert np.array_equal(model.quantize.embedding.weight.detach().numpy(), params["quantize"]["embedding"])
