"""One pass over images, the reference, npz files, the table of metrics and the best checkpoint; no network is trained."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import base
from ldm_jax.data import shapes
from ldm_jax.evaluation import (
    bits,
    clip_score,
    evaluate,
    features,
    frechet,
    generate,
    inception_score,
    kid,
    metrics,
    neighbours,
    npz,
    one_pass,
    precision_recall,
    reference,
    similarity,
    statistics,
    watch,
)
from ldm_jax.evaluation import images as sources
from ldm_jax.evaluation.features import Extractor
from ldm_jax.evaluation.metrics import METRICS, Case, Lpips, Settings, better, choices
from ldm_jax.runs import checkpoint
from ldm_jax.training import conditioning as conditions
from tests.training import tiny

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(70) % 3
MIX = RNG.normal(size=(48, 6)).astype(np.float32)


def extractor(name="classifier", runs=None):
    """Features of 4 x 4 means, without a network; `runs` counts the images that went through."""

    def outputs(pixels):
        pixels = np.asarray(pixels)
        if runs is not None:
            runs.append(len(pixels))
        side = pixels.shape[1] // 4
        means = pixels.reshape(len(pixels), 4, side, 4, side, 3).mean((2, 4)).reshape(len(pixels), 48)
        features = np.einsum("nk,kd->nd", means / 255, MIX).astype(np.float32)  # by itself, whatever the batch
        return {"features": features, "logits": features[:, :3], "spatial": features[:, ::-1]}

    return Extractor(name, 6, f"sha-of-{name}", 16, outputs)


def images(pixels=PIXELS, labels=None, size=32, **more):
    def batches():
        for start in range(0, len(pixels), size):
            part = {"image": pixels[start : start + size]}
            yield part if labels is None else part | {"label": labels[start : start + size]}

    holds = frozenset({"image"} if labels is None else {"image", "label"})
    return sources.Images(batches, len(pixels), {"images": "made up"}, holds, 0 if labels is None else 3, **more)


def config():
    c = tiny.config().copy_and_resolve_references()
    c.lock()
    return c


def case(tmp_path, made, names=("classifier",), **settings):
    settings = {"reference": "split:test", "draws": 40, "quiet": True, **settings}
    networks = {name: extractor(name) for name in names}
    return Case(made, config(), networks, Settings(folder=tmp_path / "s", pictures=tmp_path / "p", **settings))


# --- one pass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 32, 70])
def test_one_pass_keeps_what_is_asked_for_whatever_the_batches(tmp_path, size):
    runs = []
    network = extractor(runs=runs)
    takes = [(how, "classifier", "features") for how in ("moments", "all", "subset", "few")]
    seen = one_pass.collect(
        images(labels=LABELS, size=size),
        {"classifier": network},
        [*takes, ("subset", "", "image")],
        cap=20,
        folder=tmp_path,
    )
    assert sum(runs) == 70, "each image goes through a network once"
    whole = extractor().apply(PIXELS)
    key = ("classifier", "features")
    np.testing.assert_allclose(seen.moments[key].mean, whole.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.covariance(seen.moments[key]), np.cov(whole.T), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(seen.rows["all", *key], whole)
    chosen = one_pass.numbers(70, 20)
    assert len(chosen) == 20 and (np.diff(chosen) > 0).all() and chosen[-1] < 70
    assert np.bincount(one_pass.numbers(50_000, 10_000) % 100).min() > 50, "labels that come in turn are all there"
    np.testing.assert_array_equal(seen.rows["subset", *key], whole[chosen])
    np.testing.assert_array_equal(seen.rows["subset", "", "image"], PIXELS[chosen])
    assert len(seen.rows["few", *key]) == one_pass.FEW
    assert isinstance(seen.rows["subset", *key], np.memmap) and not list(tmp_path.iterdir()), "files without a name"


def test_one_pass_refuses_another_number_of_images(tmp_path):
    with pytest.raises(ValueError, match="70 images came, expected 71"):
        one_pass.collect(images()._replace(count=71), {}, [("few", "", "image")], cap=4, folder=tmp_path)


def test_scores_of_single_images_are_told_which_they_are(tmp_path):
    def score(batch, which):
        return {"at": np.arange(70)[which], "none": np.full(len(batch["image"]), np.nan)}

    seen = one_pass.collect(images(), {}, [], scores=[score], cap=4, folder=tmp_path)
    np.testing.assert_array_equal(seen.values["at"], np.arange(70))
    assert np.isnan(seen.values["none"]).all()


# --- npz -----------------------------------------------------------------------------------------------------------------


def test_samples_are_written_as_numpy_reads_them_and_read_batch_by_batch(tmp_path):
    path = tmp_path / "samples.npz"
    npz.write(path, (PIXELS[start : start + 9] for start in range(0, 70, 9)), 70, LABELS)
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"] and file["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(file["arr_0"], PIXELS)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
    found = sources.from_file(path)
    assert found.count == 70 and found.classes == 3
    batches = list(found.batches())
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in batches]), PIXELS)
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), LABELS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_of_others_and_older_ones_of_ours_are_read(tmp_path, save):
    save(tmp_path / "adm.npz", PIXELS, LABELS)
    save(tmp_path / "old.npz", arr_0=PIXELS, labels=LABELS.astype(np.int32))
    save(tmp_path / "none.npz", PIXELS)
    for name, classes in (("adm", 3), ("old", 3), ("none", 0)):
        found = sources.from_file(tmp_path / f"{name}.npz")
        assert found.classes == classes
        np.testing.assert_array_equal(np.concatenate([b["image"] for b in found.batches()]), PIXELS)


def test_an_interrupted_file_of_samples_leaves_nothing(tmp_path):
    def batches():
        yield PIXELS[:8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        npz.write(tmp_path / "samples.npz", batches(), 70)
    with pytest.raises(ValueError, match="8 images, expected 70"):
        npz.write(tmp_path / "samples.npz", iter([PIXELS[:8]]), 70)
    with pytest.raises(ValueError, match="expected uint8"):
        npz.write(tmp_path / "samples.npz", iter([PIXELS[:8], PIXELS[:8, :8]]), 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"x": PIXELS}, "expected an npz with arr_0"),
        ({"arr_0": PIXELS.astype(np.float32)}, "arr_0 is float32"),
        ({"arr_0": PIXELS[..., :1]}, r"expected uint8\[N, H, W, 3\]"),
        ({"arr_0": PIXELS, "arr_1": LABELS[:5]}, r"arr_1 is int64\[5\]; expected int64\[70\]"),
    ],
)
def test_files_that_are_no_samples_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        npz.read(tmp_path / "x.npz")


def test_a_damaged_file_of_samples_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="expected an npz with arr_0"):
        npz.read(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        npz.read(tmp_path / "y.npz")


# --- labels --------------------------------------------------------------------------------------------------------------


class Source:
    """Items of class 0, 0, 0, 1, 2, 2 as a source has them."""

    classes = (0, 0, 0, 1, 2, 2)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"label": np.int32(self.classes[i])}


def test_label_balances():
    def count(balance, training=None):
        return np.bincount(generate.balanced(balance, 600, 3, 0, training), minlength=3).tolist()

    assert count("equal") == [200, 200, 200]
    assert count("dataset", Source()) == [300, 100, 200]
    assert generate.balanced("dataset", 3, 3, 0, Source()).tolist() == [0, 0, 2], "at even distances"
    drawn = count("random")
    assert sum(drawn) == 600 and drawn != [200, 200, 200] and min(drawn) > 150
    assert generate.balanced("random", 9, 3, 1).tolist() != generate.balanced("random", 9, 3, 0).tolist()
    with pytest.raises(ValueError, match="'even' is unknown; there are equal, random, dataset"):
        generate.balanced("even", 9, 3, 0)


# --- the reference -------------------------------------------------------------------------------------------------------

TAKES = [(how, "classifier", "features") for how in ("moments", "subset", "all")]
TAKES.append(("all", "", "label"))


def test_a_reference_is_measured_once_and_then_read(tmp_path):
    runs = []
    networks = {"classifier": extractor(runs=runs)}

    def opened(takes, cap=20):
        return reference.open_reference("split:val", config(), takes, networks, cap=cap, folder=tmp_path)

    first, n = opened(TAKES), tiny.config().data.size
    assert sum(runs) == n == first.count
    again = opened(TAKES)
    assert sum(runs) == n and first.sha256 == again.sha256 and len(again.files) == 4
    key = ("classifier", "features")
    np.testing.assert_array_equal(first.rows["subset", *key], again.rows["all", *key][one_pass.numbers(n, 20)])
    np.testing.assert_allclose(again.moments[key].mean, again.rows["all", *key].mean(0), rtol=1e-6)
    assert again.rows["all", "", "label"].max() == 3
    opened([("subset", *key)], cap=30)
    assert sum(runs) == 2 * n, "another number of rows is another file"
    for path in again.files:
        path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_allclose(opened(TAKES).moments[key].covariance, first.moments[key].covariance)
    assert sum(runs) == 3 * n, "a damaged file is measured anew"


def adm(path, **more):
    rng = np.random.default_rng(1)
    x, s = rng.normal(size=(50, 6)), rng.normal(size=(50, 2023))
    arrays = {"mu": x.mean(0), "sigma": np.cov(x.T), "mu_s": s.mean(0), "sigma_s": np.cov(s.T)}
    np.savez(path, **arrays, **more)
    return arrays


def test_adm_statistics_serve_fid_and_sfid(tmp_path):
    arrays = adm(tmp_path / "adm.npz", arr_0=PIXELS)
    takes = [("moments", "inception", "features"), ("moments", "inception", "spatial")]
    networks = {"inception": extractor("inception")}
    path = str(tmp_path / "adm.npz")
    found = reference.open_reference(path, config(), takes, networks, cap=20, folder=tmp_path)
    np.testing.assert_array_equal(found.moments["inception", "features"].mean, arrays["mu"])
    np.testing.assert_array_equal(found.moments["inception", "spatial"].covariance, arrays["sigma_s"])
    # What the statistics do not say is measured of the images beside them.
    rows = [("subset", "inception", "features")]
    found = reference.open_reference(path, config(), rows, networks, cap=20, folder=tmp_path)
    np.testing.assert_array_equal(found.rows[rows[0]], extractor().apply(PIXELS)[one_pass.numbers(70, 20)])


def test_references_of_two_files_are_not_mixed_up(tmp_path):
    found = []
    for name, pixels in (("a", PIXELS), ("b", 255 - PIXELS)):
        np.savez(tmp_path / f"{name}.npz", pixels)
        where, networks = str(tmp_path / f"{name}.npz"), {"classifier": extractor()}
        take = ("moments", "classifier", "features")
        opened = reference.open_reference(where, config(), [take], networks, cap=9, folder=tmp_path / "kept")
        found.append(opened.moments[take[1:]].mean)
    np.testing.assert_allclose(found[1], extractor().apply(255 - PIXELS).mean(0), rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_a_reference_without_labels_is_refused_where_they_are_wanted(tmp_path):
    np.savez(tmp_path / "x.npz", PIXELS)
    with pytest.raises(ValueError, match=r"x\.npz, does not say the label of its images"):
        where = str(tmp_path / "x.npz")
        reference.open_reference(where, config(), [("all", "", "label")], {}, cap=9, folder=tmp_path)


def test_a_reference_of_other_features_is_refused(tmp_path):
    adm(tmp_path / "adm.npz")
    path = str(tmp_path / "adm.npz")

    def opened(how, network, where=path, dim=6):
        networks = {network: extractor(network)._replace(dim=dim)}
        return reference.open_reference(where, config(), [(how, network, "features")], networks, cap=9, folder=tmp_path)

    with pytest.raises(ValueError, match="expected inception's, not classifier's"):
        opened("moments", "classifier")
    with pytest.raises(ValueError, match=r"holds moments, and features \(subset\) are wanted"):
        opened("subset", "inception")
    with pytest.raises(ValueError, match="holds 6 features; inception has 5"):
        opened("moments", "inception", dim=5)
    own = statistics.write(
        tmp_path / "own.npz", statistics.Gaussian(9, np.zeros(6), np.eye(6)), {"extractor": "x", "weights": "other"}
    )
    with pytest.raises(ValueError, match="holds features of x other"):
        opened("moments", "classifier", str(own))
    with pytest.raises(FileNotFoundError):
        opened("moments", "inception", str(tmp_path / "none.npz"))


# --- measuring -----------------------------------------------------------------------------------------------------------


CAP = 33


def test_one_row_holds_every_metric_and_says_how_it_was_made(tmp_path):
    val = shapes.shapes("val", size=55, objects=(1, 2))
    near = np.stack([val[i]["image"] for i in range(55)]) + RNG.normal(0, 9, (55, 32, 32, 3))
    small = np.concatenate([np.clip(near, 0, 255).astype(np.uint8), PIXELS[:15].repeat(2, 1).repeat(2, 2)])
    metrics = ["fid", "fd", "sfid", "is", "kid", "prdc", "fid_by_class", "accuracy", "neighbours"]
    asked = case(tmp_path, images(small, LABELS), ("inception", "classifier"), subset=CAP)
    row = evaluate.measure(asked, metrics)
    assert json.loads(json.dumps(row)) == row
    real = one_pass.collect(
        sources.real(config(), "test"), asked.networks, [("all", "classifier", "features")], cap=1, folder=tmp_path
    ).rows["all", "classifier", "features"]
    made = extractor().apply(small)
    expected = frechet.distance(made.mean(0), np.cov(made.T), real.mean(0), np.cov(real.T))
    np.testing.assert_allclose([row["fid"], row["fd_classifier"], row["sfid"]], expected, rtol=1e-4)
    part = [f[one_pass.numbers(len(f), CAP)] for f in (made, real)]
    assert row["kid"] == pytest.approx(kid.kid(*part, subset_size=CAP).mean)
    assert row["kid_error"] == pytest.approx(kid.standard_error(*part))
    manifold = precision_recall.precision_recall(part[1], part[0])
    assert [row[f"{name}_inception"] for name in manifold._fields] == pytest.approx(list(manifold))
    assert len(set(manifold)) == 4, "one could stand for another"
    assert row["inception_score"] == pytest.approx(inception_score.inception_score(made[:, :3]).mean)
    training = extractor().apply(next(sources.real(config(), "train").batches())["image"])
    rows, distances = neighbours.nearest(part[0], training, 4)
    assert row["authentic"] == pytest.approx(neighbours.memorised(rows, distances, training).authentic)
    assert row["training_num"] == len(training) and row["training"] == "split:train"
    assert row["kid_subset_size"] == row["subset"] == CAP and row["draws"] == 40
    assert row["fid_low"] < row["fid"] < row["fid_high"] and row["fid_infinity_error"] > 0
    assert row["accuracy"] == pytest.approx((made[:, :3].argmax(1) == LABELS).mean())
    assert all(v > 0 for v in row["fid_by_class"][:3]) and row["fid_by_class"][3:] == [None], (
        "there is no fourth class here"
    )
    assert row["precision"] == "float32", "what networks compute in, as before; that of prdc has another name"
    assert {"precision_inception", "recall_classifier", "coverage_inception", "inception_score", "copied"} <= row.keys()
    assert row["features"] == "inception,classifier" and row["features_sha256"] == "sha-of-inception,sha-of-classifier"
    assert row["reference"] == "split:test" and row["metrics"] == ",".join(sorted(metrics)) and row["num"] == 70
    assert all("_by_class: " in line for line in row["warnings"]), "70 images are enough for 6 features, 23 are not"
    with Image.open(row["neighbours"]) as grid:
        assert grid.width > 5 * 64 and grid.height > 8 * 64
    assert set(choices(metrics, asked.networks)) < row.keys()
    figures = ["fid", "fid_infinity", "fd_classifier", "fd_classifier_infinity", "kid", "kd_classifier"]
    assert choices(["fid", "fd", "kid"], asked.networks) == figures


def test_a_class_that_one_side_lacks_has_no_distance_and_the_others_have(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=255 - PIXELS, arr_1=np.where(LABELS == 2, 4, LABELS))
    asked = case(tmp_path, images(labels=LABELS), reference=str(tmp_path / "x.npz"))
    row = evaluate.measure(asked, ["fid_by_class"])
    found = row["fd_classifier_by_class"]
    for k in (0, 1):
        a, b = (extractor().apply(x[LABELS == k]).astype(float) for x in (PIXELS, 255 - PIXELS))
        assert found[k] == pytest.approx(frechet.distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)))
    assert found[2:] == [None, None, None]
    assert "fd_classifier_by_class: null for the classes [2, 3, 4], of which" in row["warnings"][-1]


def test_prompts_are_compared_with_the_images_that_were_kept(tmp_path, monkeypatch):
    prompts = [f"a picture of {i}" for i in range(70)]

    embeds = extractor().apply(PIXELS)

    def text_embeds(folder, texts):
        """Every text as its own image is embedded: the score is 100 if they are not mixed up."""
        assert folder == "FOLDER"
        return np.stack([embeds[int(text.split()[-1])] for text in texts])

    monkeypatch.setattr(clip_score, "text_embeds", text_embeds)
    asked = case(tmp_path, images(prompts=prompts), ("clip",), subset=25)._replace(clip_folder="FOLDER")
    large = PIXELS.repeat(2, 1).repeat(2, 2)
    row = evaluate.measure(asked, ["clip"])
    assert row["clip_score"] == pytest.approx(100, abs=1e-3) and row["subset"] == 25 and "reference" not in row
    row = evaluate.measure(asked._replace(images=images(large, prompts=prompts)), ["clip", "cmmd"])
    assert row["cmmd"] > 0 and row["reference"] == "split:test"
    assert choices(["clip", "cmmd"], asked.networks) == ["clip_score", "cmmd"]


def test_figures_of_single_images_are_averaged(tmp_path):
    """Reconstructions by an autoencoder of nothing but noise; LPIPS in the place of which the mean difference is taken."""
    noisy = np.clip(PIXELS + RNG.normal(0, 9, PIXELS.shape), 0, 255).astype(np.uint8)

    def batches():
        for start in range(0, 70, 32):
            yield {"image": noisy[start : start + 32], "original": PIXELS[start : start + 32]}

    made = sources.Images(batches, 70, {"images": "reconstructions", "step": 3}, frozenset({"image", "original"}))
    mean = Lpips(lambda x, y: np.abs(x.astype(float) - y).mean((1, 2, 3)), "sha-of-lpips")
    asked = case(tmp_path, made)._replace(lpips=mean)
    row = evaluate.measure(asked, ["psnr", "ssim", "lpips"])
    assert row["lpips_sha256"] == "sha-of-lpips"
    assert row["psnr"] == pytest.approx(similarity.psnr(noisy, PIXELS).mean())
    assert row["ssim"] == pytest.approx(similarity.ssim(noisy, PIXELS).mean())
    assert row["lpips"] == pytest.approx(np.abs(noisy.astype(float) - PIXELS).mean())
    # 16 pairs, four a row: the first of the second row is the original of the fifth.
    fifth = one_pass.numbers(70, one_pass.FEW)[4]
    with Image.open(row["picture"]) as grid:
        pixels = np.asarray(grid)
    assert pathlib.Path(row["picture"]).name.startswith("side_by_side_0000003_")
    raw = made._replace(made_by={**made.made_by, "ema": "none"})
    others = [evaluate.measure(asked._replace(images=of), ["psnr", "ssim", "lpips"])["picture"] for of in (made, raw)]
    assert others[0] == row["picture"] != others[1], "a picture of other weights has another name"
    np.testing.assert_array_equal(pixels[68 : 68 + 64 : 4, 2 : 2 + 64 : 4], PIXELS[fifth])
    np.testing.assert_array_equal(pixels[68 : 68 + 64 : 4, 68 : 68 + 64 : 4], noisy[fifth])


def test_lpips_is_of_an_image_and_its_own_original(monkeypatch):
    """A network that tells its first image from its second; 70 pairs are more than a batch."""

    class Network:
        def apply(self, variables, x, y):
            return variables["params"]["w"] * (x[:, :, :, 0] - y[:, :, :, 1] ** 2).sum((1, 2))

    params = {"w": np.float32(3)}
    monkeypatch.setattr(metrics.lpips_weights, "load", lambda vgg, heads: (Network(), params))
    found = metrics.lpips("vgg.pth", "heads.pth")
    x, y = PIXELS / 127.5 - 1, PIXELS[::-1] / 127.5 - 1
    expected = 3 * (x[..., 0] - y[..., 1] ** 2).sum((1, 2))
    np.testing.assert_allclose(found.distance(PIXELS, PIXELS[::-1]), expected, rtol=1e-4, atol=1e-3)
    assert found.sha256 == features.params_sha256(params)


@pytest.mark.parametrize(
    "metric, names, said",
    [
        ("fid", (), "fid needs --features=inception or"),
        ("sfid", ("classifier",), "sfid needs --features=inception"),
        ("cmmd", ("inception",), "cmmd needs --features=clip:DIR"),
        ("accuracy", ("classifier",), "accuracy needs images that were told a class"),
        ("fid_by_class", ("classifier",), "fid_by_class needs images that were told a class"),
        ("shapes", (), "shapes needs a run that takes captions"),
        ("clip", ("clip",), "clip needs a run that takes captions"),
        ("psnr", (), "psnr needs the run of an autoencoder"),
        ("rfid", ("classifier",), "rfid needs the run of an autoencoder"),
        ("codebook", (), "codebook needs an autoencoder with a codebook"),
        ("kl", (), "kl needs an autoencoder with a posterior"),
        ("lpips", (), "lpips needs the run of an autoencoder"),
        ("bits", (), "bits needs a diffusion run"),
    ],
)
def test_a_metric_that_lacks_something_is_refused_before_any_image_is_made(tmp_path, metric, names, said):
    def never():
        raise AssertionError("an image was made")

    with pytest.raises(ValueError, match=said):
        evaluate.measure(case(tmp_path, images()._replace(batches=never), names), [metric])
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "metric, more, said",
    [
        ("accuracy", {"classes": 4}, "accuracy: the classifier knows 3 classes; these images are of 4"),
        ("shapes", {"prompts": ["a small red circle"] * 69 + ["a house"]}, "not a caption of shapes: 'a house'"),
    ],
)
def test_images_that_a_metric_cannot_judge_are_refused_before_any_is_made(tmp_path, metric, more, said):
    with pytest.raises(ValueError, match=said):
        evaluate.measure(case(tmp_path, images(labels=LABELS)._replace(batches=None, **more)), [metric])


def test_a_figure_of_few_images_comes_with_a_warning_and_without_an_extrapolation(tmp_path):
    asked = case(tmp_path, images(PIXELS[:12].repeat(2, 1).repeat(2, 2)), draws=0)
    row = evaluate.measure(asked, ["fid"])
    assert row["warnings"][0].startswith("fd_classifier: ") and "12" in row["warnings"][0]
    assert row["fd_classifier"] > 0 and not {"fd_classifier_infinity", "fd_classifier_low"} & row.keys()


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is needs at least 10 images; there are 7"):
        evaluate.measure(case(tmp_path, images(PIXELS[:7]), ("inception",)), ["is"])


# --- bits ----------------------------------------------------------------------------------------------------------------


class Exact:
    """The network that predicts the clean image of N(0, std^2) noise under x_t = (1 - t) x + t eps: a denoiser without weights."""

    std = 0.25

    def apply(self, variables, x, t, cond):
        t = t.reshape(-1, 1, 1, 1) / 1000  # the time that flow() tells a network
        variance = ((1 - t) * self.std) ** 2 + t**2
        return x * ((1 - t) * self.std**2) / variance


def test_bits_of_white_noise_are_its_entropy(tmp_path, monkeypatch):
    from ldm_jax.diffusion.process import flow
    from ldm_jax.training import experiment, sampling

    rng = np.random.default_rng(0)
    noise = np.clip(np.floor((rng.normal(0, Exact.std, (40, 8, 8, 3)) + 1) * 128), 0, 255).astype(np.uint8)

    class Noise:
        name, num_classes, class_names, has_text = "noise", 0, (), False

        def __len__(self):
            return 40

        def __getitem__(self, i):
            return {"image": noise[i], "label": np.int32(0), "text": ""}

        def where(self, i):
            return f"noise[{i}]"

    c = base.get_config()
    c.input.update(resolution=8, crop="none")
    c.sampler.batch_size = 16
    monkeypatch.setattr(experiment, "source", lambda config, role: Noise())
    model = sampling.Model(Exact(), conditions.Conditioning(), None, flow(), "x", (8, 8, 3))
    run = experiment.Restored(c.lock(), model, {"denoiser": {}}, {}, 1, "", {})
    found = bits.bits(run, num=40, steps=24, seed=0)
    entropy = np.log2(Exact.std * np.sqrt(2 * np.pi * np.e)) + 7
    assert found["bits_num"] == 40 and 0 < found["bits_error"] < 0.05
    assert abs(found["bits"] - entropy) < 0.03


# --- the best checkpoint -------------------------------------------------------------------------------------------------


def saved(workdir, step, content=b"x"):
    """A folder like a checkpoint's, with its manifest."""
    folder = checkpoint.folder(workdir) / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "data").write_bytes(content + str(step).encode())
    checkpoint.write_manifest(folder)


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(tiny.config().to_json())
    (tmp_path / "dataset.json").write_text("{}")
    for step in (4, 8):
        saved(tmp_path, step)
    return tmp_path


def keep(workdir, step, value, **origin):
    origin = {"num": 8, "step": step, "checkpoint": f"sha{step}", **origin}
    held = watch.hold(workdir, config(), step)
    try:
        return watch.keep_if_best(held, origin | {"fid": value}, origin, "fid")
    finally:
        watch.drop(workdir)


def kept(workdir):
    row = json.loads((workdir / "best" / "row.json").read_text())
    assert checkpoint.steps(workdir / "best") == [row["step"]]
    assert checkpoint.damage(checkpoint.folder(workdir / "best") / str(row["step"])) is None
    assert json.loads((workdir / "best" / "config.json").read_text())["task"]["name"] == "autoencoder"
    return row["step"], row["fid"]


def test_the_best_checkpoint_is_copied_and_training_loses_nothing(workdir):
    assert not keep(workdir, 4, float("nan")) and not (workdir / "best").exists()
    assert keep(workdir, 4, 9.0) and kept(workdir) == (4, 9.0)
    assert not keep(workdir, 8, 9.5) and kept(workdir) == (4, 9.0)
    assert keep(workdir, 8, 7.0) and kept(workdir) == (8, 7.0)
    assert not keep(workdir, 4, 8.0), "restarted: what is kept stays"
    assert keep(workdir, 4, 8.0, num=99) and kept(workdir) == (4, 8.0), "figures of other settings are no rivals"
    assert checkpoint.steps(workdir) == [8, 4] and all(wrong is None for _, wrong in checkpoint.intact(workdir))
    with pytest.raises(ValueError, match="--keep-best=fod is no figure of this evaluation; there are fid"):
        watch.keep_if_best(workdir / "best" / "held", {"step": 4, "fid": 1.0}, {}, "fod")


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_held_outlives_what_training_removes(workdir, monkeypatch, links):
    def link(*_):
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", link)
    watch.hold(workdir, config(), 4)  # by a --watch that was killed
    held = watch.hold(workdir, config(), 8)
    assert checkpoint.steps(held) == [8]
    pruned = checkpoint.folder(workdir) / "8"
    assert (pruned / "state" / "data").stat().st_nlink == (2 if links else 1)
    shutil.rmtree(pruned)
    assert checkpoint.damage(pruned) == "it is gone"
    assert watch.keep_if_best(held, {"step": 8, "fid": 1.0}, {}, "fid")
    watch.drop(workdir)
    assert kept(workdir) == (8, 1.0) and not held.exists()


def test_a_checkpoint_that_vanishes_while_it_is_held_leaves_the_old_best(workdir, monkeypatch):
    assert keep(workdir, 4, 9.0)
    copytree = shutil.copytree

    def pruned(there, here, *rest, **more):
        copytree(there, here, *rest, **more)
        (pathlib.Path(here) / "data").unlink(missing_ok=True)

    monkeypatch.setattr(shutil, "copytree", pruned)
    with pytest.raises(ValueError, match="could not be held"):
        keep(workdir, 8, 1.0)
    watch.drop(workdir)
    assert kept(workdir) == (4, 9.0)
    assert sorted(path.name for path in (workdir / "best").iterdir()) == [
        "checkpoints",
        "config.json",
        "dataset.json",
        "row.json",
    ]


def test_each_checkpoint_is_handed_out_once_until_the_last(workdir, monkeypatch):
    said, c = [], config()
    last = 12  # 96 images in batches of 8
    (checkpoint.folder(workdir) / "10" / "state").mkdir(parents=True)  # being written: no manifest yet
    (checkpoint.folder(workdir) / "10" / "state" / "data").write_bytes(b"half")

    def pause(seconds):
        saved(workdir, last)
        checkpoint.write_manifest(checkpoint.folder(workdir) / "10")

    monkeypatch.setattr(watch.time, "sleep", pause)
    found = watch.new_steps(workdir, c, said.append)
    assert next(found) == 4
    (checkpoint.folder(workdir) / "8" / "state" / "data").write_bytes(b"flipped")
    assert list(found) == [10, 12] and said == ["checkpoint 8 is left out: state/data differs from its sha256"]


def test_a_row_with_the_same_origin_is_known_again(workdir):
    origin = {"num": 8, "step": 4, "options": {"eta": 0}, "prompts": ["a"]}
    lines = [{"step": 4, "loss": 1.0}, origin | {"fid": 2.0}, origin | {"num": 9, "fid": 3.0}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert watch.known(workdir, origin)["fid"] == 2.0
    assert watch.known(workdir, origin | {"num": 10}) is None


def test_which_way_a_figure_is_better():
    higher = {
        "accuracy",
        "psnr",
        "ssim",
        "recall_inception",
        "inception_score",
        "shapes_both",
        "clip_score",
        "precision_inception",
    }
    lower = {"fid", "fd_classifier", "kid", "lpips", "rfid", "bits", "cmmd", "copied"}
    assert {f for f in higher | lower if better(f) == 1} == higher
    assert set(METRICS) >= {"fid", "sfid", "bits", "neighbours"}
