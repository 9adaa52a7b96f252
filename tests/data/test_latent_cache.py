"""The latent cache: what is written is read back, whole or not at all."""

import json
import pickle
import resource

import numpy as np
import pytest

from ldm_jax.data import SOURCES, eval_batches, latent_cache, train_batches

SHAPE, COUNT = (2, 3, 4), 10
NAMES = ("mean", "std", "mean_flipped", "std_flipped")
FACTS = {"source": "abc", "checkpoint": "def", "num_classes": 5, "class_names": list("vwxyz"), "has_text": True}


@pytest.fixture(autouse=True)
def _three_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_ROWS", 4)


def _moments():
    rng = np.random.default_rng(0)
    values = {name: rng.normal(3, 2, (COUNT, *SHAPE)).astype(np.float32) for name in NAMES}
    return {name: np.abs(v) if "std" in name else v for name, v in values.items()}


def _plan(**changes):
    return latent_cache.plan(**{"count": COUNT, "shape": SHAPE, "flipped": True, **FACTS, **changes})


def _batches(rows, moments=None, size=2):
    """The rows in batches, as an encoder gives them."""
    moments = moments or _moments()
    for i in range(rows.start, rows.stop, size):
        part = slice(i, min(i + size, rows.stop))
        labels = np.arange(COUNT)[part] % 5
        yield {k: v[part] for k, v in moments.items()}, labels, [f"é{j}" for j in range(COUNT)[part]]


def _write(out, meta=None, shards=None):
    meta = meta or _plan()
    folder = out / "train"
    latent_cache.begin(folder, meta)
    for shard in latent_cache.missing(folder, meta) if shards is None else shards:
        latent_cache.write_shard(folder, meta, shard, _batches(latent_cache.rows(meta, shard)))
    if shards is None:
        latent_cache.finish(folder, meta)


def _read(out):
    return SOURCES["latents"](split="train", path=str(out))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_trip(tmp_path, dtype):
    _write(tmp_path, _plan(dtype=dtype))
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == [
        *(f"latents-0000{i}-of-00003.array_record" for i in range(3)),
        "meta.json",
    ]
    source = _read(tmp_path)
    assert (len(source), source.num_classes, source.class_names, source.has_text) == (10, 5, tuple("vwxyz"), True)
    assert source.meta["source"] == "abc" and source.shape == SHAPE
    again = pickle.loads(pickle.dumps(source))
    for i in range(COUNT):
        for item in (source[i], again[i]):
            for key, values in _moments().items():
                assert item[key].dtype == dtype and (item[key] == values[i].astype(dtype)).all()
            assert item["label"] == i % 5 and item["text"] == f"é{i}"


def test_a_record_is_as_documented(tmp_path):
    import grain

    _write(tmp_path, _plan(dtype="float32"))
    shards = sorted((tmp_path / "train").glob("*.array_record"))
    record = grain.sources.ArrayRecordDataSource([str(s) for s in shards])[7]
    values = np.concatenate([_moments()[name][7].ravel() for name in NAMES])
    assert record == values.astype("<f4").tobytes() + b"\2\0\0\0" + "é7".encode()


def test_a_deterministic_stage_has_no_std(tmp_path):
    _write(tmp_path, _plan(deterministic=True, flipped=False))
    source = _read(tmp_path)
    assert set(source[0]) == {"mean", "label", "text"}
    np.testing.assert_allclose(
        source.std, _moments()["mean"].astype(np.float16).astype(float).std((0, 1, 2)), rtol=1e-6
    )


def test_whitening_statistics_are_those_of_what_is_stored(tmp_path):
    _write(tmp_path)
    source, moments = _read(tmp_path), _moments()
    mean, std = (moments[name].astype(np.float16).astype(np.float64) for name in ("mean", "std"))
    np.testing.assert_allclose(source.mean, mean.mean((0, 1, 2)), rtol=1e-6)
    draws = mean + std * np.random.default_rng(0).normal(size=(4000, *mean.shape))
    np.testing.assert_allclose(source.std, draws.std((0, 1, 2, 3)), rtol=0.01)


def test_spreads_merge_in_any_grouping():
    values = np.random.default_rng(1).normal(100, 0.5, (103, 3))
    parts = [latent_cache.Spread(len(v), v.mean(0), v.var(0)) for v in np.split(values, [1, 10, 60])]
    for merged in (
        latent_cache.merge(parts),
        latent_cache.merge([latent_cache.merge(parts[2:]), latent_cache.merge(parts[:2])]),
    ):
        assert merged.count == 103
        np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-14)
        np.testing.assert_allclose(merged.variance, values.var(0), rtol=1e-12)


def test_batches_take_the_mirrored_copy_half_of_the_time(tmp_path):
    _write(tmp_path)
    source = _read(tmp_path)
    mean, std, mean_f, std_f = (m.astype(np.float16) for m in _moments().values())
    batches = train_batches(source, batch_size=10, seed=0, flip=True)
    mirrored = []
    for _ in range(20):
        batch = next(batches)
        assert set(batch) == {"mean", "std", "label"}
        for m, s in zip(batch["mean"], batch["std"]):
            plain = [i for i in range(10) if (m == mean[i]).all() and (s == std[i]).all()]
            turned = [i for i in range(10) if (m == mean_f[i]).all() and (s == std_f[i]).all()]
            assert len(plain) + len(turned) == 1
            mirrored.append(bool(turned))
    assert 0.35 < np.mean(mirrored) < 0.65
    (first, last) = eval_batches(source, batch_size=6)
    assert (first["mean"] == mean[:6]).all() and last["valid"].tolist() == [True] * 4 + [False] * 2


def test_flip_without_mirrored_copies_is_an_error(tmp_path):
    _write(tmp_path, _plan(flipped=False))
    source = _read(tmp_path)
    assert set(source[0]) == {"mean", "std", "label", "text"}
    with pytest.raises(ValueError, match="flip=True, but the latent cache holds no mirrored copies"):
        train_batches(source, batch_size=2, seed=0, flip=True)


def test_an_interrupted_writer_loses_one_shard_and_is_no_source_before(tmp_path):
    meta, folder = _plan(), tmp_path / "train"
    latent_cache.begin(folder, meta)
    latent_cache.write_shard(folder, meta, 0, _batches(latent_cache.rows(meta, 0)))

    def stopped():
        yield next(_batches(latent_cache.rows(meta, 1)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latent_cache.write_shard(folder, meta, 1, stopped())
    assert latent_cache.missing(folder, meta) == [1, 2]
    with pytest.raises(ValueError, match="train: unfinished latent cache"):
        _read(tmp_path)
    with pytest.raises(ValueError, match=r"an unfinished cache of another kind \(checkpoint: 'def', now 'other'\)"):
        latent_cache.begin(folder, _plan(checkpoint="other"))
    before = latent_cache.shard_path(folder, meta, 0).stat().st_mtime_ns
    _write(tmp_path)
    assert latent_cache.shard_path(folder, meta, 0).stat().st_mtime_ns == before
    _write(tmp_path / "whole")
    assert json.loads((folder / "meta.json").read_text()) == json.loads(
        (tmp_path / "whole" / "train" / "meta.json").read_text()
    )
    a, b = _read(tmp_path), _read(tmp_path / "whole")
    assert all((a[i][k] == b[i][k]).all() for i in range(COUNT) for k in NAMES)


def test_killed_at_any_file(tmp_path):
    """A kill leaves some of the files, the last one in part: never a source, and the next writer finishes."""
    first = "latents-00000-of-00003"
    for names in ([], ["unfinished.json.new"], [f"{first}.array_record.partial"], [f"{first}.json"], ["meta.json.new"]):
        out = tmp_path / str(names)
        if names != [] and names != ["unfinished.json.new"]:
            _write(out, shards=[2])
        (out / "train").mkdir(parents=True, exist_ok=True)
        for name in names:
            (out / "train" / name).write_text("{")
        with pytest.raises(ValueError, match="latent cache"):
            _read(out)
        _write(out)
        assert _read(out)[1]["text"] == "é1"


def test_two_writers_share_the_shards(tmp_path):
    meta = _plan()
    _write(tmp_path, shards=[1])
    _write(tmp_path, shards=[2, 0])
    latent_cache.finish(tmp_path / "train", meta)
    assert [_read(tmp_path)[i]["text"] for i in range(COUNT)] == [f"é{i}" for i in range(COUNT)]


def test_shards_are_even_and_not_too_many(monkeypatch):
    monkeypatch.setattr(latent_cache, "MAX_SHARDS", 3)
    meta = _plan(count=1000)
    assert [len(latent_cache.rows(meta, i)) for i in range(meta["shards"])] == [333, 333, 334]
    with pytest.raises(ValueError, match="a latent cache of 0 images"):
        _plan(count=0)
    with pytest.raises(ValueError, match="dtype 'int8' of a latent cache; expected one of float16, float32"):
        _plan(dtype="int8")


def test_bad_rows(tmp_path):
    meta, folder = _plan(), tmp_path / "train"
    latent_cache.begin(folder, meta)
    rows = latent_cache.rows(meta, 0)
    for bad in (np.inf, np.nan, 1e6):
        moments = _moments()
        moments["mean"][2] = bad
        with pytest.raises(ValueError, match="array_record, from row 2: mean does not fit float16"):
            latent_cache.write_shard(folder, meta, 0, _batches(rows, moments))
    with pytest.raises(ValueError, match=r"std has shape \(2, 2, 3, 5\); expected \(2, 2, 3, 4\)"):
        latent_cache.write_shard(folder, meta, 0, _batches(rows, _moments() | {"std": np.zeros((COUNT, 2, 3, 5))}))
    with pytest.raises(ValueError, match="std_flipped has shape None"):
        latent_cache.write_shard(
            folder, meta, 0, _batches(rows, {k: v for k, v in _moments().items() if k != NAMES[3]})
        )
    with pytest.raises(ValueError, match="2 rows were given; expected 3"):
        latent_cache.write_shard(folder, meta, 0, _batches(range(2)))
    assert latent_cache.missing(folder, meta) == [0, 1, 2]


def test_what_is_not_a_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data at"):
        SOURCES["latents"](path=str(tmp_path / "none"))
    _write(tmp_path)
    with pytest.raises(ValueError, match="no latents of split 'val'; there are: train"):
        SOURCES["latents"](split="val", path=str(tmp_path))
    with pytest.raises(ValueError, match="exists already"):
        _write(tmp_path)
    meta = tmp_path / "train" / "meta.json"
    content = json.loads(meta.read_text())
    for other, said in (
        ({k: v for k, v in content.items() if k != "shape"}, "damaged latent cache .*shape"),
        (
            {k: v for k, v in content.items() if k != "format"},
            "of format 1, expected 2; remove it and run `ldm encode` again",
        ),
    ):
        meta.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=said):
            _read(tmp_path)
    meta.write_text(json.dumps(content)[:50])
    with pytest.raises(ValueError, match="not a latent cache, or a damaged one"):
        _read(tmp_path)


def test_damaged_shards_are_named(tmp_path):
    _write(tmp_path)
    shard = tmp_path / "train" / "latents-00001-of-00003.array_record"
    whole = shard.read_bytes()
    record = _moments()["mean"][4].astype(np.float16).tobytes()
    at = whole.index(record)
    shard.write_bytes(whole[:at] + b"\0" + whole[at + 1 :])
    source = _read(tmp_path)
    assert source[0]["text"] == "é0"
    with pytest.raises(ValueError, match=r"train\[4\]: damaged latent cache .*hash mismatch"):
        source[4]
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"latents-00001-of-00003.array_record: damaged latent cache .*bytes, expected"
    ):
        _read(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"damaged latent cache .*latents-00001"):
        _read(tmp_path)


def test_a_full_disk_is_an_error_that_says_so(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"latents-00000-of-00003.array_record.partial: write\(\) failed"):
            _write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert latent_cache.missing(tmp_path / "train", _plan()) == [0, 1, 2]
    _write(tmp_path)
