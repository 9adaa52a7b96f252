"""`ldm evaluate` on runs of a few steps: every kind of run, labels, files of samples, watching a training, and bad input."""

import argparse
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from configs import base
from ldm_jax import cli
from ldm_jax.data import SOURCES
from ldm_jax.evaluation import watch
from ldm_jax.evaluation.table import choices
from ldm_jax.runs import checkpoint
from ldm_jax.runs.log import read_metrics
from ldm_jax.training import experiment
from ldm_jax.training.images import from_uint8, to_uint8
from ldm_jax.training.loop import train
from ldm_jax.training.tasks import TASKS
from tests.finished import finished
from tests.training import tiny

pytestmark = pytest.mark.slow


def smoke(task, model, **condition):
    c = base.get_config()
    c.task, c.model = task, model
    c.data = {"name": "shapes", "size": 64, "objects": [1, 2]}
    c.input.update(crop="none", num_threads=2, prefetch=2)
    c.condition.update(condition)
    base.smoke(c)
    return c.lock()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "vae"
    finished(tiny.config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "classifier"
    model = {"name": "classifier", "num_classes": 4, "widths": (8, 8), "norm_num_groups": 4}
    train(smoke({"name": "classifier"}, model), workdir, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "pixels"
    model = {"name": "dit", "patch_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2}
    task = {"name": "diffusion", "prediction": "flow", "drop": 0.1}
    train(smoke(task, model | {"num_classes": 4}, label=True), workdir, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A classifier of noisy images."""
    workdir = tmp_path_factory.mktemp("runs") / "noisy"
    model = {"name": "noisy_classifier", "num_classes": 4, "block_out_channels": (4, 4), "layers_per_block": 1}
    model |= {"attention_levels": 1, "attention_head_dim": 4, "norm_num_groups": 2}
    config = smoke({"name": "noisy_classifier"}, model)
    with config.unlocked():
        config.optimizer.learning_rate = 0.1  # so that it has an opinion after four steps
    train(config, workdir, quiet=True)
    return workdir


def evaluate(workdir, capsys, *words, code=0):
    capsys.readouterr()
    assert cli.main(["evaluate", f"--workdir={workdir}", "--quiet", *words]) == code
    said = capsys.readouterr()
    if code:
        assert not said.out, "it was measured before it was refused"
        return said.err.strip().splitlines()[-1]
    rows = [json.loads(line) for line in said.out.splitlines()]
    for row in rows:
        networks = [name for name in row.get("features", "").split(",") if name]
        missing = choices(row["metrics"].split(","), networks).keys() - row.keys()
        assert all(figure.endswith("_infinity") for figure in missing), "of too few images there is none"
    return rows


def test_an_autoencoder_in_one_row(vae, classifier, capsys):
    metrics = "--metrics=psnr,ssim,rfid,fid,kl,latents"
    (row,) = evaluate(vae, capsys, metrics, "--num=40", f"--features=classifier:{classifier}", "--draws=40")
    assert row["images"] == "reconstructions" and row["num"] == 40 and row["reference_num"] == 64
    assert 3 < row["psnr"] < 60 and -1 < row["ssim"] < 1 and row["kl_bits"] > 0
    assert row["rfd_classifier"] == row["fd_classifier"] > 0 and "rfd_classifier_infinity" in row
    assert len(row["latent_mean"]) == len(row["latent_variance"]) == 2 and min(row["latent_variance"]) > 0
    assert row["latent_power"] and 0 < row["latent_high_share"] < 1 and np.isfinite(row["latent_excess"])
    with Image.open(row["picture"]) as grid:
        assert grid.width == 8 * 66 + 2 and grid.height == 4 * 66 + 2, "16 pairs, four a row"
    assert row["picture"].startswith(str(vae / "pictures")) and not list((vae / "statistics").glob("tmp*"))


def test_figures_of_reconstructions_are_those_of_the_images(vae, capsys):
    (row,) = evaluate(vae, capsys, "--metrics=psnr,kl,latents", "--num=64")
    config = experiment.of_run(vae)
    network = config.network
    params = checkpoint.restore_params(vae, 12, "100")["autoencoder"]
    source = SOURCES["shapes"](split="test", size=64)
    images = np.stack([source[i]["image"] for i in range(64)])

    @jax.jit
    def through(x):
        posterior = network.apply({"params": params}, from_uint8(x), method="encode")
        return posterior, to_uint8(network.apply({"params": params}, posterior.mean, method="decode"))

    posterior, y = through(images)
    y = np.asarray(y)
    error = np.mean((y.astype(float) - images) ** 2, axis=(1, 2, 3))
    assert row["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), abs=1e-3)
    assert row["kl_bits"] == pytest.approx(float(posterior.kl().mean()) / np.log(2) / posterior.mean[0].size, rel=1e-4)
    mean, variance = np.asarray(posterior.mean, np.float64), np.exp(np.asarray(posterior.logvar, np.float64))
    np.testing.assert_allclose(row["latent_mean"], mean.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(row["latent_variance"], mean.var((0, 1, 2)) + variance.mean((0, 1, 2)), rtol=1e-4)


def test_a_codebook_is_counted(vae, tmp_path, capsys, monkeypatch):
    """The run of an FSQ model, with fresh parameters in the place of trained ones."""
    config = json.loads((vae / "config.json").read_text())
    shared = {k: v for k, v in config["model"].items() if k not in ("name", "latent_channels")}
    config["model"] = {"name": "fsq", "levels": [4, 3], **shared}
    workdir = tmp_path / "fsq"
    shutil.copytree(vae / "checkpoints" / "12", workdir / "checkpoints" / "12")
    (workdir / "config.json").write_text(json.dumps(config))
    network = experiment.of_run(workdir).network
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_: {"autoencoder": params})
    (row,) = evaluate(workdir, capsys, "--metrics=codebook,psnr", "--num=20")

    source = SOURCES["shapes"](split="test", size=64)
    images = np.stack([source[i * 64 // 20]["image"] for i in range(20)])
    z = jax.jit(lambda x: network.apply({"params": params}, from_uint8(x), method="encode"))(images)
    p = np.bincount(np.asarray(network.apply({"params": params}, z, method="quantized").indices).ravel(), minlength=12)
    p = p / p.sum()
    assert row["codebook_size"] == 12 and row["codebook_usage"] == pytest.approx((p > 0).mean())
    assert row["codebook_perplexity"] == pytest.approx(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), rel=1e-3)
    assert "needs an autoencoder with a posterior" in evaluate(workdir, capsys, "--metrics=kl", code=2)


def test_a_class_conditional_run_and_its_samples_from_a_file(pixels, classifier, tmp_path, capsys):
    features = f"--features=classifier:{classifier}"
    metrics = "--metrics=fd,kid,prdc,fid_by_class,accuracy,neighbours"
    (row,) = evaluate(pixels, capsys, metrics, "--num=24", features, "--draws=40", f"--out={tmp_path / 'grids'}")
    assert row["labels"] == "equal" and len(row["fd_classifier_by_class"]) == 4
    assert {"kd_classifier", "precision_classifier", "accuracy", "authentic_classifier", "training_num"} <= row.keys()
    assert row["precision"] == "float32"
    assert next(iter((tmp_path / "grids").iterdir())).name.startswith("neighbours_classifier_")

    words = ["sample", f"--workdir={pixels}", "--num=24", f"--out={tmp_path / 'drawn'}", "--quiet"]
    assert cli.main(words) == 0
    path = tmp_path / "drawn" / "samples.npz"
    with np.load(path) as file:
        assert file["arr_0"].shape == (24, 32, 32, 3) and file["arr_1"].tolist() == [i % 4 for i in range(24)]
    metrics = "--metrics=fd,kid,accuracy,fid_by_class"
    (again,) = evaluate(pixels, capsys, metrics, features, "--draws=40", f"--samples={path}")
    for figure in ("fd_classifier", "kd_classifier", "accuracy", "fd_classifier_by_class", "fd_classifier_low"):
        assert again[figure] == pytest.approx(row[figure], rel=1e-6, abs=1e-9), figure
    # The samples as a reference: no distance to themselves.
    metrics = "--metrics=fd,kid"
    (same,) = evaluate(pixels, capsys, metrics, features, "--draws=0", f"--samples={path}", f"--reference={path}")
    assert same["fd_classifier"] < 1e-6 and same["reference_num"] == 24


def test_the_balance_of_labels_is_recorded_and_changes_the_images(pixels, classifier, capsys):
    rows = [
        evaluate(
            pixels, capsys, "--metrics=fd", "--num=12", "--draws=0", f"--features=classifier:{classifier}", *words
        )[0]
        for words in ([], ["--labels=random"], ["--labels=dataset"])
    ]
    assert [row["labels"] for row in rows] == ["equal", "random", "dataset"]
    assert len({row["fd_classifier"] for row in rows}) == 3


def test_bits_of_a_pixel_model_draw_no_image(pixels, capsys, monkeypatch):
    from ldm_jax.evaluation import generate

    monkeypatch.setattr(generate, "draw", None)
    (row,) = evaluate(pixels, capsys, "--metrics=bits", "--num=8", "--steps=2")
    assert row["bits_num"] == 8 and row["bits_steps"] == 2 and np.isfinite(row["bits"]) and row["bits_error"] > 0


def test_watching_evaluates_each_checkpoint_once_and_keeps_the_best(vae, tmp_path, capsys, monkeypatch):
    from ldm_jax.evaluation import evaluate as measuring

    workdir = tmp_path / "run"
    shutil.copytree(vae, workdir, ignore=shutil.ignore_patterns("metrics.jsonl", "12"))
    true, hold, measure = {}, watch.hold, measuring.measure

    def goes_on(workdir, config, step):
        """Training saves its last checkpoint as soon as step 8 is looked at, and prunes it before it is restored."""
        held = hold(workdir, config, step)
        if step == 8:
            shutil.copytree(vae / "checkpoints" / "12", workdir / "checkpoints" / "12")
            shutil.rmtree(workdir / "checkpoints" / "8")
        return held

    def gets_worse(case, metrics):
        row = measure(case, metrics)
        true[row["step"]] = row["psnr"]
        return row | {"psnr": 1000 - row["step"]}

    monkeypatch.setattr(watch, "hold", goes_on)
    monkeypatch.setattr(measuring, "measure", gets_worse)
    monkeypatch.setattr(watch, "SECONDS", 0.05)
    words = ["evaluate", f"--workdir={workdir}", "--metrics=psnr", "--num=8", "--quiet", "--watch", "--keep-best=psnr"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["step"] for row in rows] == [8, 12]
    assert rows == [row for row in read_metrics(workdir / "metrics.jsonl") if "metrics" in row]
    assert json.loads((workdir / "best" / "row.json").read_text()) == rows[0]
    assert checkpoint.steps(workdir) == [12] and checkpoint.steps(workdir / "best") == [8]
    assert "left out" not in said.err and not (workdir / "best" / "held").exists()
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "", "a second watch finds all of it done"
    # The kept folder is a run of its own.
    monkeypatch.setattr(measuring, "measure", measure)
    assert cli.main(["evaluate", f"--workdir={workdir / 'best'}", "--metrics=psnr", "--num=8", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["psnr"] == true[8]


def test_a_checkpoint_that_training_prunes_meanwhile_is_left_out(vae, tmp_path, capsys, monkeypatch):
    from ldm_jax.evaluation import evaluate as measuring

    workdir = tmp_path / "run"
    shutil.copytree(vae, workdir, ignore=shutil.ignore_patterns("metrics.jsonl"))
    measure = measuring.measure

    def pruned(case, metrics):
        if case.images.made_by["step"] == 8:
            shutil.rmtree(checkpoint.folder(workdir) / "8")
            raise FileNotFoundError("checkpoints/8/state is gone")
        return measure(case, metrics)

    monkeypatch.setattr(measuring, "measure", pruned)
    words = ["evaluate", f"--workdir={workdir}", "--metrics=psnr", "--num=8", "--quiet", "--watch"]
    assert cli.main([*words, "--keep-best=psnr"]) == 2
    assert "state is gone" in capsys.readouterr().err, "what is held cannot vanish: this is another fault"
    assert not (workdir / "best").exists()
    shutil.copytree(checkpoint.folder(vae) / "8", checkpoint.folder(workdir) / "8")
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "checkpoint 8 is left out: it vanished" in said.err
    assert [json.loads(line)["step"] for line in said.out.splitlines()] == [12]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--metrics=fod"], "--metrics=fod is unknown; there are fid"),
        (["--metrics="], "--metrics= is unknown"),
        (["--metrics=psnr,ssim,psnr"], "--metrics=psnr,ssim,psnr names psnr twice"),
        (["--metrics=psnr", "--num=1"], "--num=1; expected at least 2"),
        (["--metrics=psnr", "--subset=1"], "--subset=1; expected at least 4"),
        (["--metrics=psnr", "--draws=7"], "--draws=7; expected at least 40 (or 0)"),
        (["--metrics=fid"], "fid needs --features"),
        (["--metrics=fid", "--features=vgg"], "features 'vgg'; expected inception"),
        (["--metrics=fid", "--features=classifier:/nowhere"], "is not a run"),
        (["--metrics=fid", "--features=classifier:{c},classifier:{c}"], "names classifier twice"),
        (["--metrics=sfid", "--features=classifier:{c}"], "sfid needs --features=inception"),
        (["--metrics=rfid", "--features=classifier:{c}", "--reference=/nowhere.npz"], "/nowhere.npz"),
        (["--metrics=rfid", "--features=classifier:{c}", "--reference=split:none"], "none"),
        (["--metrics=accuracy", "--features=classifier:{c}"], "accuracy needs images that were told a class"),
        (["--metrics=psnr", "--samples=/nowhere.npz"], "/nowhere.npz does not exist"),
        (["--metrics=psnr", "--samples=README.md"], "expected an npz with arr_0"),
        (["--metrics=bits"], "bits needs a diffusion run"),
        (["--metrics=lpips"], "lpips needs --lpips=VGG16.pth,HEADS.pth"),
        (["--metrics=lpips", "--lpips=a.pth"], "--lpips=a.pth; expected two files"),
        (["--metrics=lpips", "--lpips=/a.pth,/b.pth"], "/a.pth"),
        (["--metrics=psnr", "--labels=equal"], "--labels=equal goes with images that are drawn"),
        (["--metrics=psnr", "--guidance-method=apg"], "--guidance-method=apg goes with images that are drawn"),
        (["--metrics=psnr", "--first-stage=/nowhere"], "--first-stage=/nowhere goes with images that are drawn"),
        (["--metrics=psnr", "--steps=9"], "--steps=9 goes with images that are drawn"),
        (["--metrics=psnr", "--seed=0"], "--seed=0 goes with images that are drawn"),
        (["--metrics=psnr", "--subset=9"], "--subset=9 goes with metrics of some of"),
        (["--metrics=psnr", "--draws=0"], "--draws=0 goes with the metrics fid"),
        (["--metrics=psnr", "--reference=split:val"], "--reference=split:val goes with metrics that compare"),
        (["--metrics=psnr", "--features=classifier:{c}"], "goes with metrics of classifier"),
        (["--metrics=psnr", "--lpips=a.pth,b.pth"], "--lpips=a.pth,b.pth goes with the metric lpips"),
        (["--metrics=psnr", "--samples=split:val", "--ema=none"], "--ema=none goes with a checkpoint"),
        (["--metrics=psnr", "--samples=split:val", "--out=x"], "--out=x goes with grids"),
        (["--metrics=psnr", "--samples=x.npz", "--num=1000"], "--num=1000 goes with images that are drawn, rec"),
        (["--metrics=psnr", "--step=4", "--watch"], "--step=4 does not go with --watch"),
        (["--metrics=psnr", "--watch", "--distributed"], "--watch does not go with --distributed"),
        (["--metrics=psnr", "--watch", "--samples=split:val"], "--watch does not go with --samples"),
        (["--metrics=psnr", "--keep-best=psnr"], "--keep-best=psnr goes with --watch"),
        (
            ["--metrics=psnr", "--watch", "--keep-best=fid", "--num=8"],
            "--keep-best=fid is no figure of this evaluation; there are psnr",
        ),
        (["--metrics=psnr", "--step=99"], "no checkpoint of step 99"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(vae, classifier, capsys, words, said):
    assert said in evaluate(vae, capsys, *(word.format(c=classifier) for word in words), code=2)


def drawn(verb, run, out, *words):
    flag = "--model" if verb == "generate" else "--workdir"
    assert cli.main([verb, f"{flag}={run}", f"--out={out}", "--quiet", "--num=2", "--steps=2", *words]) == 0
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("0*.png"))])


def test_a_classifier_of_noisy_images_guides_what_is_drawn_and_measured(pixels, noisy, classifier, tmp_path, capsys):
    name, null, guide = checkpoint.identity(noisy, 4), "--guidance=0", f"--classifier={noisy}"
    plain = drawn("sample", pixels, tmp_path / "plain", null)
    scales = drawn("sample", pixels, tmp_path / "scales", null, guide, "--classifier-scale=0,1000")
    np.testing.assert_array_equal(scales[:2], plain)
    assert np.abs(scales[2:] - plain).max() > 10
    record = json.loads((tmp_path / "scales" / "settings.json").read_text())
    assert record["classifier"] == name and [way["classifier_scale"] for way in record["drawn"]] == [0, 1000]
    assert not (tmp_path / "scales" / "samples.npz").exists() and len(scales) == 4
    assert 2 * 32 < Image.open(tmp_path / "scales" / "grid.png").width < 3 * 64, "a column for each scale"
    other = drawn("sample", pixels, tmp_path / "other", null, guide, "--classifier-scale=1000", "--label=3")
    record = json.loads((tmp_path / "other" / "settings.json").read_text())
    assert record["classifier"] == name and record["classifier_scale"] == 1000 and record["guidance"] == 0
    assert np.abs(other - scales[2:]).max() > 10, "the null class is drawn, and the classifier has another label"
    generated = drawn("generate", pixels, tmp_path / "generated", null, guide, "--classifier-scale=0,1000")
    assert np.abs(generated - scales).max() <= 1
    loaded = ldm_jax.load(pixels, classifier=noisy, classifier_scale=1000)
    np.testing.assert_array_equal(np.round(255 * loaded.sample(2, guidance=0.0, steps=2)), scales[2:])

    words = ["--metrics=accuracy", "--num=8", "--steps=2", f"--features=classifier:{classifier}", null, guide]
    one, two = (evaluate(pixels, capsys, *words, *scale)[0] for scale in ([], ["--classifier-scale=0"]))
    assert one["classifier"] == two["classifier"] == name and [one["classifier_scale"], two["classifier_scale"]] == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--classifier-scale=2"], "--classifier-scale=2.0 goes with --classifier=DIR"),
        (["--classifier=/nowhere"], "/nowhere is not a run"),
        (["--classifier={c}"], "holds a run of the task 'classifier'; expected 'noisy_classifier'"),
        (["--classifier={n}", "--classifier-scale=-1"], "--classifier-scale=-1; expected a number from 0 to 1000"),
        (["--classifier={n}", "--classifier-scale=nan"], "--classifier-scale=nan; expected a number from 0 to 1000"),
        (["--classifier={n}", "--classifier-scale=1,1"], "--classifier-scale: a value stands there twice"),
        (["--classifier={begun}"], "is not finished; expected a classifier that no longer changes"),
    ],
)
def test_a_classifier_that_cannot_guide_is_said_before_anything_is_drawn(
    pixels, noisy, classifier, tmp_path, capsys, words, said
):
    begun = tmp_path / "begun"
    shutil.copytree(noisy, begun)
    config = json.loads((begun / "config.json").read_text())
    config["train"]["images"] *= 2
    (begun / "config.json").write_text(json.dumps(config))
    words = [word.format(c=classifier, n=noisy, begun=begun) for word in words]
    assert cli.main(["sample", f"--workdir={pixels}", "--num=1", f"--out={tmp_path / 'out'}", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_one_scale_of_a_classifier_is_measured_and_of_drawn_images(pixels, noisy, vae, capsys):
    guide = f"--classifier={noisy}"
    several = evaluate(pixels, capsys, "--metrics=accuracy", guide, "--classifier-scale=1,2", code=2)
    assert "--classifier-scale=1.0,2.0; expected one number here" in several
    assert f"{guide} goes with images that are drawn" in evaluate(vae, capsys, "--metrics=psnr", guide, code=2)


def test_a_folder_that_does_not_exist_is_called_so(tmp_path, capsys):
    said = evaluate(tmp_path / "none", capsys, "--metrics=psnr", code=2)
    assert f"{tmp_path / 'none'}: no such run; --workdir expects the folder of a run, or a published" in said


def test_flags_that_another_kind_of_run_does_not_read_are_refused(pixels, classifier, capsys):
    features = f"--features=classifier:{classifier}"
    wrong = evaluate(pixels, capsys, "--metrics=fid", features, "--labels=even", code=2)
    assert "'even' is unknown; there are equal" in wrong
    for word in ("--labels=equal", "--guidance=2.0", "--sampler=heun"):
        assert f"{word} goes with images" in evaluate(pixels, capsys, "--metrics=bits", word, code=2)
    assert evaluate(classifier, capsys, "--metrics=accuracy", "--num=5")[0]["num"] == 5
    loaded = ldm_jax.load(classifier)
    assert loaded.evaluate("accuracy", 5)["num"] == 5 and loaded.offers == ["evaluate"]


def test_every_flag_of_sampling_is_known_to_be_read_or_not():
    from ldm_jax.cli import evaluate, sample
    from ldm_jax.evaluation import subject

    parser, sampling = argparse.ArgumentParser(), argparse.ArgumentParser(add_help=False)
    evaluate.add_arguments(parser)
    sample.add_sampling_arguments(sampling)
    args = parser.parse_args(["--workdir=x", "--metrics=psnr"])
    measured = subject.Subject(None, None, TASKS["autoencoder"].figures)
    flags = subject.reads(measured, subject.Asked(("psnr",), {})).keys()
    assert {action.dest for action in sampling._actions} - flags == {"quiet"}
    assert flags < vars(args).keys()


def test_help_names_every_metric_and_network(capsys):
    from ldm_jax.evaluation import features, table

    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(":", " ").replace(";", " ").split()
    assert set(table.METRICS) | set(features.NAMES) <= set(words)
