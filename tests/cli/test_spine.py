"""The commands, in order, on a smoke-sized run: train (with its first stage), sample, evaluate, encode; and bad input to each."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax import cli
from ldm_jax.runs import checkpoint
from ldm_jax.runs.log import read_metrics
from ldm_jax.training import restore, sampling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("spine") / "run"
    assert cli.main(["train", "--config=configs/quickstart.py:smoke", f"--workdir={workdir}", "--quiet"]) == 0
    return workdir


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classifier") / "run"
    words = ["--config.model.num_classes=4", "--quiet"]
    config = tmp_path_factory.mktemp("configs") / "shapes_classifier.py"
    config.write_text(
        "from configs import cifar10_classifier\n"
        "def get_config(arg=''):\n"
        "    c = cifar10_classifier.get_config('smoke')\n"
        "    c.data = {'name': 'shapes', 'size': 64}\n"
        "    c.input.flip = False\n"
        "    return c\n"
    )
    assert cli.main(["train", f"--config={config}", f"--workdir={workdir}", *words]) == 0
    return workdir


def sample(run, out, *words):
    code = cli.main(["sample", f"--workdir={run}", f"--out={out}", "--quiet", *words])
    return code, np.load(out / "samples.npz")["arr_0"] if code == 0 else None


def test_a_missing_first_stage_is_trained_in_its_folder(run):
    assert checkpoint.newest(run / "first_stage") == 4
    assert len(list((run / "first_stage" / "latents").glob("*/train/meta.json"))) == 1
    assert checkpoint.newest(run) == 4
    assert json.loads((run / "dataset.json").read_text())["prompts"]


def test_samples_are_files_an_array_and_a_grid(run, tmp_path):
    captions = ["a large red circle", "a small blue dog"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    with pytest.warns(UserWarning, match=r"1 of 2 prompts: words that the tokenizer does not know, .*: 'dog'"):
        code, images = sample(run, tmp_path, "--num=5", "--columns=5", f"--prompts={tmp_path / 'captions.txt'}")
    assert code == 0 and images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    for i in range(5):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{i:06d}.png")), images[i])
    assert 5 * 64 < Image.open(tmp_path / "grid.png").width < 6 * 64  # one row of five
    assert json.loads((tmp_path / "settings.json").read_text())["prompts"] == (3 * captions)[:5]


def test_image_i_depends_on_i_alone(run, tmp_path):
    words = ("--text=a large red circle", "--guidance=2", "--seed=3")
    _, a = sample(run, tmp_path / "a", "--num=6", "--batch-size=6", *words)
    _, b = sample(run, tmp_path / "b", "--num=4", "--batch-size=2", *words)
    # Another batch size is another program, whose sums may round differently.
    assert np.abs(a[:4].astype(int) - b.astype(int)).max() <= 1
    _, c = sample(
        run, tmp_path / "c", "--num=4", "--batch-size=2", "--text=a large red circle", "--guidance=2", "--seed=4"
    )
    assert np.abs(c.astype(int) - b.astype(int)).max() > 1


def test_the_guidance_of_the_command_line_is_used_and_recorded(run, tmp_path):
    words = ("--num=2", "--text=a large red circle", "--guidance=200")
    _, plain = sample(run, tmp_path / "plain", *words)
    more = ("--guidance-method=cfg_zero:t_zero=0.5", "--guidance-schedule=linear")
    code, guided = sample(run, tmp_path / "apg", *words, *more)
    # After four steps of training a condition moves little; the same words draw the same bits, so any difference is the guidance's.
    _, again = sample(run, tmp_path / "again", *words)
    assert code == 0 and (plain == again).all() and (plain != guided).any()
    record = json.loads((tmp_path / "apg" / "settings.json").read_text())
    assert record["guidance_method"] == "cfg_zero" and record["guidance_options"] == {"t_zero": 0.5}
    assert record["guidance_schedule"] == "linear" and record["threshold"] == "none"


def test_generate_draws_from_a_run_what_sample_draws(run, tmp_path, capsys):
    words = ["--num=2", "--seed=3", "--steps=3", "--guidance=2"]
    _, images = sample(run, tmp_path / "sample", *words, "--text=a large red circle", "--text=a small blue square")
    words = ["generate", f"--model={run}", "--quiet", *words]
    prompts = ["--prompt=a large red circle", "--prompt=a small blue square"]
    assert cli.main([*words, f"--out={tmp_path / 'generate'}", *prompts]) == 0
    drawn = np.stack([np.asarray(Image.open(tmp_path / "generate" / f"{i:06d}.png")) for i in range(2)])
    assert np.abs(drawn.astype(int) - images.astype(int)).max() <= 1
    picture, mask = tmp_path / "sample" / "000000.png", tmp_path / "mask.png"
    Image.fromarray(np.uint8(255 * np.eye(32))).save(mask)
    for i, more in enumerate(([f"--mask={mask}"], ["--strength=0.7", "--keep-latents"], ["--vary=a red circle"])):
        out = tmp_path / f"{i}"
        assert cli.main([*words, f"--out={out}", prompts[0], f"--init-image={picture}", *more]) == 0
        assert Image.open(out / "000001.png").size == (32, 32)
    capsys.readouterr()
    assert cli.main([*words, "--dtype=bfloat16", f"--out={tmp_path / 'x'}", prompts[0]]) == 2
    assert "--dtype=bfloat16 goes with a published pipeline" in capsys.readouterr().err


def test_a_list_of_scales_is_one_labelled_grid(run, tmp_path):
    words = ("--num=2", "--text=a large red circle", "--sampler=ddim,heun", "--steps=2")
    assert cli.main(["sample", f"--workdir={run}", f"--out={tmp_path}", "--quiet", *words]) == 0
    assert len(list(tmp_path.glob("0*.png"))) == 4 and not (tmp_path / "samples.npz").exists()
    assert [way["name"] for way in json.loads((tmp_path / "settings.json").read_text())["drawn"]] == ["ddim", "heun"]
    assert 2 * 64 < Image.open(tmp_path / "grid.png").width < 3 * 64


@pytest.mark.parametrize(
    "words, said",
    [
        (["--threshold=dynamic:floor=2"], "this model draws latents"),
        (["--guidance=nan"], "--guidance=nan; expected a finite number"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(run, tmp_path, capsys, words, said):
    assert cli.main(["sample", f"--workdir={run}", f"--out={tmp_path / 'out'}", "--num=1", "--quiet", *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_image_that_is_not_finite_is_named_and_the_others_of_its_batch_are_kept(run, tmp_path, monkeypatch, capsys):
    make = sampling.make_generate

    def broken(*args):
        generate = make(*args)
        return lambda *args: generate(*args).at[1].set(np.nan)

    monkeypatch.setattr(sampling, "make_generate", broken)
    assert cli.main(["sample", f"--workdir={run}", f"--out={tmp_path}", "--num=3", "--quiet"]) == 1
    assert "image 1 is not finite: the sampler" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["000000.png", "000002.png", "settings.json"]


def test_a_run_and_images_from_before_there_was_a_setting_go_on(run, tmp_path, monkeypatch):
    new = {"guidance_method", "guidance_options", "guidance_schedule", "schedule_options"}
    new |= {"threshold", "threshold_options"}
    _, before = sample(run, tmp_path / "out", "--num=1")
    files = {run / "config.json": "sampler", tmp_path / "out" / "settings.json": None}
    read_text = type(run).read_text

    def as_it_was(path, **options):
        text = read_text(path, **options)
        if path not in files:
            return text
        record = json.loads(text)
        kept = record[files[path]] if files[path] else record
        assert new <= kept.keys()
        for key in new:
            del kept[key]
        return json.dumps(record)

    monkeypatch.setattr(type(run), "read_text", as_it_was)
    code, again = sample(run, tmp_path / "out", "--num=1")
    assert code == 0 and np.array_equal(before, again)
    assert sample(run, tmp_path / "out", "--num=1", "--guidance-method=apg")[0] == 2, "other settings than then"


def test_raw_parameters_and_averages_are_drawn_from_by_name(run, tmp_path, monkeypatch):
    """By what is restored: after four steps the two draw the same bytes, or nearly."""
    met = []
    of_run = restore.restore
    monkeypatch.setattr(restore, "restore", lambda *args: met.append(of_run(*args)) or met[-1])
    sample(run, tmp_path / "a", "--num=2", "--ema=none")
    sample(run, tmp_path / "b", "--num=2")
    for found, average in zip(met, (None, "1000"), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found.params, checkpoint.restore_params(run, 4, average))
    raw, averaged = (np.concatenate([x.ravel() for x in jax.tree.leaves(found.params)]) for found in met)
    assert not np.array_equal(raw, averaged)


def test_evaluating_prints_and_appends_one_object_with_its_origin(run, classifier, capsys):
    capsys.readouterr()
    words = [
        "--metrics=fid,shapes",
        "--num=8",
        f"--features=classifier:{classifier}",
        "--quiet",
        "--reference=split:val",
    ]
    smaller = json.loads((run / "config.json").read_text())
    assert smaller["data"]["size"] == 256
    assert cli.main(["evaluate", f"--workdir={run}", *words]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row == read_metrics(run / "metrics.jsonl")[-1]
    assert row["fd_classifier"] > 0 and "fid" not in row, "only Inception features may be called FID"
    origin = {"step", "checkpoint", "ema", "seed", "sampler", "steps", "guidance", "num", "features", "features_sha256"}
    assert origin | {"reference", "reference_sha256", "reference_num", "commit", "shapes_both"} <= row.keys()
    assert row["checkpoint"] == checkpoint.identity(run, 4)
    assert list((run / "statistics").glob("reference-*.npz"))

    # Real images against themselves: 0, from the same cached statistics.
    words[0], words[1] = "--metrics=fid", "--num=256"
    assert cli.main(["evaluate", f"--workdir={run}", *words, "--samples=split:val"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fd_classifier"] < 1e-6


def test_every_checkpoint_can_be_evaluated(run, capsys):
    capsys.readouterr()
    assert cli.main(["evaluate", f"--workdir={run}", "--metrics=shapes", "--num=2", "--step=all", "--quiet"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["step"] for row in rows] == sorted(checkpoint.steps(run))


def test_a_classifier_and_an_autoencoder_are_evaluated_on_real_images(run, classifier, capsys):
    capsys.readouterr()
    assert cli.main(["evaluate", f"--workdir={classifier}", "--metrics=accuracy"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= row["accuracy"] <= 1 and len(row["accuracy_by_class"]) == 4
    assert cli.main(["evaluate", f"--workdir={run / 'first_stage'}", "--metrics=psnr", "--num=16"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["psnr"] > 3


def test_a_run_trains_on_encoded_latents_and_refuses_those_of_another_autoencoder(run, tmp_path, capsys):
    first = run / "first_stage"
    for split in ("train", "val"):
        assert (
            cli.main(["encode", f"--workdir={first}", f"--data={split}", f"--out={tmp_path / 'cache'}", "--quiet"]) == 0
        )
    config = tmp_path / "on_latents.py"
    config.write_text(
        "from configs import quickstart\n"
        "def get_config(arg=''):\n"
        "    c = quickstart.get_config('smoke')\n"
        f"    c.data = {{'name': 'latents', 'path': {str(tmp_path / 'cache')!r}}}\n"
        "    return c\n"
    )
    words = ["train", f"--config={config}", "--quiet", "--config.train.images=32"]
    assert cli.main([*words, f"--workdir={tmp_path / 'run'}", f"--config.first_stage.workdir={first}"]) == 0
    assert sample(tmp_path / "run", tmp_path / "out", "--num=2", "--text=a large red circle")[0] == 0
    capsys.readouterr()
    other = tmp_path / "other_stage"
    shape = ["--config=configs/quickstart_vae.py:smoke", "--config.seed=1", "--config.train.images=16", "--quiet"]
    assert cli.main(["train", *shape, f"--workdir={other}"]) == 0
    assert cli.main([*words, f"--workdir={tmp_path / 'run2'}", f"--config.first_stage.workdir={other}"]) == 2
    assert "was encoded by checkpoint" in capsys.readouterr().err


def test_what_encode_wrote_is_not_encoded_again(run, tmp_path, capsys):
    first, cache = run / "first_stage", tmp_path / "cache"
    words = ["encode", f"--workdir={first}", "--data=configs/quickstart.py:smoke:train", f"--out={cache}", "--quiet"]
    assert cli.main(words) == 0
    before = (cache / "train" / "meta.json").stat().st_mtime_ns
    words = [
        f"--config.first_stage.workdir={first}",
        f"--config.first_stage.latents={cache}",
        "--config.train.images=32",
    ]
    assert (
        cli.main(["train", "--config=configs/quickstart.py:smoke", f"--workdir={tmp_path / 'run'}", "--quiet", *words])
        == 0
    )
    assert (cache / "train" / "meta.json").stat().st_mtime_ns == before and (cache / "tune").is_dir()


def test_encoding_writes_a_source_with_its_whitening(run, tmp_path, capsys):
    words = ["encode", f"--workdir={run / 'first_stage'}", "--data=val", f"--out={tmp_path}", "--quiet"]
    assert cli.main(words) == 0
    from ldm_jax.data import SOURCES

    latents = SOURCES["latents"](split="val", path=str(tmp_path))
    assert len(latents) == 256 and latents[0]["mean"].shape == (8, 8, 6)
    assert cli.main(words) == 0, "repeating it finds it done"


@pytest.mark.parametrize(
    "words, said",
    [
        (["sample", "--num=0", "--out={out}"], "--num=0; expected at least 1"),
        (["sample", "--num=1", "--out={out}", "--columns=0"], "--columns=0; expected at least 1"),
        (["sample", "--num=1", "--out={out}", "--sampler=hein"], "sampler 'hein' is unknown"),
        (["sample", "--num=1", "--out={out}", "--steps=0"], "--steps=0; expected at least 1"),
        (["sample", "--num=1", "--out={out}", "--sampler=ddim:eta"], "'eta' is no option; expected NAME:OPTION=VALUE"),
        (["sample", "--num=1", "--out={out}", "--grid=karras:rho=0"], "rho"),
        (["sample", "--num=1", "--out={out}", "--guidance-method=dps"], "guidance method 'dps' is unknown; there are"),
        (
            ["sample", "--num=1", "--out={out}", "--guidance-method=apg:etta=1"],
            "'apg' has no option 'etta'; it has eta",
        ),
        (["sample", "--num=1", "--out={out}", "--guidance-method=apg:eta=x"], "eta is 'x'; expected a number"),
        (["sample", "--num=1", "--out={out}", "--guidance-schedule=down"], "guidance schedule 'down' is unknown"),
        (["sample", "--num=1", "--out={out}", "--threshold=dynamic:percentile=99"], "percentile is 99"),
        (["evaluate", "--metrics=shapes", "--guidance-method=cfg++"], "guidance method 'cfg++' is unknown"),
        (["sample", "--num=1", "--out={out}", "--ema=7"], "no average '7'"),
        (["sample", "--num=1", "--out={out}", "--step=99"], "no checkpoint of step 99"),
        (["sample", "--num=1", "--out={out}", "--label=3"], "takes no labels"),
        (["sample", "--num=1", "--out={out}", "--text=a", "--prompts=split:val"], "does not go with --text"),
        (["evaluate", "--metrics=fod"], "--metrics=fod is unknown"),
        (["evaluate", "--metrics=fid"], "fid needs --features"),
        (["evaluate", "--metrics=fid", "--features=classifier:/nowhere"], "is not a run"),
        (["evaluate", "--metrics=shapes", "--prompts=/nowhere"], "--prompts=/nowhere is no file"),
        (["evaluate", "--metrics=shapes", "--step=one"], "--step=one; expected a number or 'all'"),
        (["evaluate", "--metrics=accuracy"], "accuracy needs"),
        (["evaluate", "--metrics=psnr", "--num=4"], "psnr needs the run of an autoencoder"),
        (["evaluate", "--metrics=shapes", "--step=4", "--samples=split:val"], "--step=4 does not go with --samples"),
        (["sample", "--num=1", "--out=README.md"], "README.md is no folder"),
        (["encode", "--data=train", "--out={out}"], "expected 'autoencoder'"),
        (
            ["sample", "--num=1", "--out={out}", "--text=a", "--guidance=nan"],
            "--guidance=nan; expected a finite number",
        ),
        (
            ["sample", "--num=1", "--out={out}", "--text=a", "--guidance=1e38"],
            "guidance is 1e+38; expected a number of at most",
        ),
        (["sample", "--num=1", "--out={out}", "--seed=-1"], "--seed=-1; expected a whole number from 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, capsys, words, said):
    words = [word.format(out=tmp_path / "out") for word in words]
    assert cli.main([words[0], f"--workdir={run}", *words[1:]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out" / "settings.json").exists()


def test_images_of_other_settings_are_not_overwritten(run, tmp_path, capsys):
    assert sample(run, tmp_path, "--num=2")[0] == 0
    before = (tmp_path / "samples.npz").read_bytes()
    assert sample(run, tmp_path, "--num=2", "--seed=9")[0] == 2
    assert "other settings" in capsys.readouterr().err
    assert (tmp_path / "samples.npz").read_bytes() == before
