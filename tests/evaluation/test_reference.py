"""The reference: measured once and kept, read from files of others, refused where it does not fit."""

import numpy as np
import pytest

from ldm_jax.evaluation import one_pass, reference, statistics
from tests.evaluation.fake import PIXELS, config, extractor
from tests.training import tiny

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
    result = reference.open_reference(path, config(), takes, networks, cap=20, folder=tmp_path)
    np.testing.assert_array_equal(result.moments["inception", "features"].mean, arrays["mu"])
    np.testing.assert_array_equal(result.moments["inception", "spatial"].covariance, arrays["sigma_s"])
    # What the statistics do not say is measured of the images beside them.
    rows = [("subset", "inception", "features")]
    result = reference.open_reference(path, config(), rows, networks, cap=20, folder=tmp_path)
    np.testing.assert_array_equal(result.rows[rows[0]], extractor().apply(PIXELS)[one_pass.numbers(70, 20)])


def test_references_of_two_files_are_not_mixed_up(tmp_path):
    result = []
    for name, pixels in (("a", PIXELS), ("b", 255 - PIXELS)):
        np.savez(tmp_path / f"{name}.npz", pixels)
        where, networks = str(tmp_path / f"{name}.npz"), {"classifier": extractor()}
        take = ("moments", "classifier", "features")
        opened = reference.open_reference(where, config(), [take], networks, cap=9, folder=tmp_path / "kept")
        result.append(opened.moments[take[1:]].mean)
    np.testing.assert_allclose(result[1], extractor().apply(255 - PIXELS).mean(0), rtol=1e-5)
    assert np.abs(result[0] - result[1]).max() > 1e-3


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
