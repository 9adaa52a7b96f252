"""Rows of metrics: figures, provenance, and what is refused before an image is made; no network is trained."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import shapes
from ldm_jax.evaluation import (
    clip_score,
    evaluate,
    frechet,
    inception_score,
    kid,
    neighbours,
    one_pass,
    precision_recall,
    psnr,
    ssim,
)
from ldm_jax.evaluation import images as sources
from ldm_jax.evaluation.lpips import Lpips
from ldm_jax.evaluation.table import choices
from tests.evaluation.fake import LABELS, PIXELS, RNG, case, config, extractor, images

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
    assert choices(metrics, asked.networks).keys() < row.keys()
    figures = ["fid", "fid_infinity", "fd_classifier", "fd_classifier_infinity", "kid", "kd_classifier"]
    assert list(choices(["fid", "fd", "kid"], asked.networks)) == figures


def test_a_class_that_one_side_lacks_has_no_distance_and_the_others_have(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=255 - PIXELS, arr_1=np.where(LABELS == 2, 4, LABELS))
    asked = case(tmp_path, images(labels=LABELS), reference=str(tmp_path / "x.npz"))
    row = evaluate.measure(asked, ["fid_by_class"])
    result = row["fd_classifier_by_class"]
    for k in (0, 1):
        a, b = (extractor().apply(x[LABELS == k]).astype(float) for x in (PIXELS, 255 - PIXELS))
        assert result[k] == pytest.approx(frechet.distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)))
    assert result[2:] == [None, None, None]
    assert "fd_classifier_by_class: null for the classes [2, 3, 4], of which" in row["warnings"][-1]


def test_prompts_are_compared_with_the_images_that_were_kept(tmp_path, monkeypatch):
    prompts = [f"a picture of {i}" for i in range(70)]

    embeds = extractor().apply(PIXELS)

    def text_embeds(folder, texts):
        """Every text as its own image is embedded: the score is 100 if they are not mixed up."""
        assert folder == "FOLDER"
        return np.stack([embeds[int(text.split()[-1])] for text in texts])

    monkeypatch.setattr(clip_score, "text_embeds", text_embeds)
    asked = case(tmp_path, images(prompts=prompts), ("clip",), subset=25)
    asked = asked._replace(networks={"clip": extractor("clip")._replace(where="FOLDER")})
    large = PIXELS.repeat(2, 1).repeat(2, 2)
    row = evaluate.measure(asked, ["clip"])
    assert row["clip_score"] == pytest.approx(100, abs=1e-3) and row["subset"] == 25 and "reference" not in row
    row = evaluate.measure(asked._replace(images=images(large, prompts=prompts)), ["clip", "cmmd"])
    assert row["cmmd"] > 0 and row["reference"] == "split:test"
    assert list(choices(["clip", "cmmd"], asked.networks)) == ["clip_score", "cmmd"]


def test_figures_of_single_images_are_averaged(tmp_path):
    """Reconstructions by an autoencoder of nothing but noise; LPIPS in the place of which the mean difference is taken."""
    noisy = np.clip(PIXELS + RNG.normal(0, 9, PIXELS.shape), 0, 255).astype(np.uint8)

    def batches():
        for start in range(0, 70, 32):
            yield {"image": noisy[start : start + 32], "original": PIXELS[start : start + 32]}

    made = sources.Images(batches, 70, {"images": "reconstructions", "step": 3}, frozenset({"image", "original"}))
    mean = Lpips(lambda x, y: np.abs(x.astype(float) - y).mean((1, 2, 3)), "sha-of-lpips")
    asked = case(tmp_path, made, options={"lpips": mean})
    row = evaluate.measure(asked, ["psnr", "ssim", "lpips"])
    assert row["lpips_sha256"] == "sha-of-lpips"
    assert row["psnr"] == pytest.approx(psnr.psnr(noisy, PIXELS).mean())
    assert row["ssim"] == pytest.approx(ssim.ssim(noisy, PIXELS).mean())
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
    asked = case(tmp_path, images(PIXELS[:12].repeat(2, 1).repeat(2, 2)), options={"draws": 0})
    row = evaluate.measure(asked, ["fid"])
    assert row["warnings"][0].startswith("fd_classifier: ") and "12" in row["warnings"][0]
    assert row["fd_classifier"] > 0 and not {"fd_classifier_infinity", "fd_classifier_low"} & row.keys()


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is needs at least 10 images; there are 7"):
        evaluate.measure(case(tmp_path, images(PIXELS[:7]), ("inception",)), ["is"])
