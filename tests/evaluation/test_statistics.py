"""Streaming moments against numpy's on all data at once, and the files of statistics."""

import json

import numpy as np
import pytest

from ldm_jax.evaluation import frechet, statistics


def streamed(features, sizes):
    moments, start = statistics.empty(features.shape[1]), 0
    for size in sizes:
        moments = statistics.update(moments, features[start : start + size])
        start += size
    assert start == len(features)
    return moments


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_stream_equals_numpy(offset):
    features = np.random.default_rng(0).normal(size=(100, 5)) @ np.diag([1, 2, 3, 4, 0.01]) + offset
    for sizes in ([100], [1] * 100, [3, 50, 0, 40, 7]):
        moments = streamed(features, sizes)
        assert moments.n == 100
        np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-14, atol=1e-14)
        # At an offset of 1e6 the inputs themselves hold 1e-10 of absolute precision; sums of squares would keep 1e-4.
        np.testing.assert_allclose(statistics.covariance(moments), np.cov(features.T), rtol=1e-7, atol=1e-12)


def test_merge_in_any_order():
    features = np.random.default_rng(1).normal(3, 2, size=(60, 4))
    parts = [streamed(part, [len(part)]) for part in np.split(features, [1, 20, 21])]
    whole = streamed(features, [60])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        total = statistics.empty(4)
        for i in order:
            total = statistics.merge(total, parts[i])
        np.testing.assert_allclose(total.m2, whole.m2, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-13)
    with pytest.raises(ValueError, match="width 4 and 5"):
        statistics.merge(whole, statistics.empty(5))


def test_no_order_and_no_split_moves_a_distance():
    """40 random orders, batch sizes and trees of merges of features with a mean of 1e4 and unit spread."""
    generator = np.random.default_rng(4)
    features = generator.normal(1e4, 1, size=(300, 6)) @ np.linalg.qr(generator.normal(size=(6, 6)))[0]
    whole = statistics.gaussian(streamed(features, [300]))
    other = statistics.Gaussian(0, whole.mean + 1, 2 * np.eye(6))
    distance = frechet.distance(whole.mean, whole.covariance, other.mean, other.covariance)
    for _ in range(40):
        cuts = np.sort(generator.integers(0, 301, generator.integers(1, 60)))
        parts = [streamed(part, [len(part)]) for part in np.split(features[generator.permutation(300)], cuts)]
        while len(parts) > 1:
            i, j = generator.choice(len(parts), 2, replace=False)
            both = statistics.merge(parts[i], parts[j])
            parts = [p for k, p in enumerate(parts) if k not in (i, j)] + [both]
        result = statistics.gaussian(parts[0])
        assert result.n == 300
        np.testing.assert_allclose(result.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(result.covariance, whole.covariance, rtol=0, atol=1e-10)
        value = frechet.distance(result.mean, result.covariance, other.mean, other.covariance)
        assert value == pytest.approx(distance, rel=1e-10)


def test_float16_features_are_summed_in_float64():
    features = np.full((3000, 2), 60000, np.float16)
    moments = streamed(features, [1000] * 3)
    np.testing.assert_array_equal(moments.mean, features[0].astype(np.float64))
    np.testing.assert_array_equal(moments.m2, 0)


def test_refusals():
    moments = streamed(np.ones((3, 2)), [3])
    bad = np.ones((4, 2))
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"features of 1 images are not finite \(the first is image 4\)"):
        statistics.update(moments, bad)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected \[B, 2\]"):
        statistics.update(moments, np.ones((4, 3)))
    with pytest.raises(ValueError, match="at least 2 images, there are 1"):
        statistics.covariance(streamed(np.ones((1, 2)), [1]))


def test_files(tmp_path):
    features = np.random.default_rng(2).normal(size=(50, 6))
    made = statistics.gaussian(streamed(features, [50]))
    path = statistics.write(tmp_path / "deep" / "a.npz", made, {"source": "x"})
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]
    result = statistics.read(path)
    assert result.n == 50
    np.testing.assert_array_equal(result.mean, made.mean)
    np.testing.assert_array_equal(result.covariance, made.covariance)
    with np.load(path) as file:
        assert {"mu", "sigma"} <= set(file.files)
        assert json.loads(str(file["fingerprint"])) == {"source": "x"}

    spatial = {"mu_s": np.ones(3), "sigma_s": 2 * np.eye(3)}
    np.savez(tmp_path / "adm.npz", mu=made.mean, sigma=made.covariance, **spatial, arr_0=np.zeros((2, 4, 4, 3)))
    assert statistics.read(tmp_path / "adm.npz").n == 0
    np.testing.assert_array_equal(statistics.read(tmp_path / "adm.npz").covariance, made.covariance)
    np.testing.assert_array_equal(statistics.read(tmp_path / "adm.npz", spatial=True).covariance, spatial["sigma_s"])
    with pytest.raises(ValueError, match=r"a\.npz: expected the arrays mu_s and sigma_s"):
        statistics.read(path, spatial=True)

    with pytest.raises(ValueError, match="not finite and are not written"):
        statistics.write(tmp_path / "b.npz", made._replace(mean=made.mean * np.nan))
    assert not (tmp_path / "b.npz").exists()
    np.savez(tmp_path / "nan.npz", mu=made.mean * np.nan, sigma=made.covariance)
    with pytest.raises(ValueError, match=r"nan\.npz: the statistics are not finite"):
        statistics.read(tmp_path / "nan.npz")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"expected the arrays mu and sigma, found \['arr_0'\]"):
        statistics.read(tmp_path / "other.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"mu has shape \(3,\) and sigma \(4, 4\)"):
        statistics.read(tmp_path / "shape.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([print], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="not an npz of statistics"):
        statistics.read(tmp_path / "pickled.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        statistics.read(tmp_path / "none.npz")


def test_a_reference_is_named_after_all_that_it_depends_on(tmp_path):
    origin = {"source": "cifar10", "split": "test", "n": 20, "extractor": "ab12", "preprocessing": {"resize": 32}}
    path = statistics.reference_path(tmp_path, origin)
    assert statistics.reference_path(tmp_path, dict(reversed(origin.items()))) == path
    for change in ({"n": 21}, {"extractor": "cd"}, {"preprocessing": {"resize": 64}}, {"split": "val"}):
        assert statistics.reference_path(tmp_path, origin | change) != path
