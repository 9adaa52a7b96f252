"""One pass over images: what is kept of it does not depend on the batches."""

import numpy as np
import pytest

from ldm_jax.evaluation import one_pass, statistics
from tests.evaluation.fake import LABELS, PIXELS, extractor, images


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
