"""The latent cache: what is written is read back, whole or not at all."""

import json
import pickle

import numpy as np
import pytest

from ldm_jax.data import SOURCES, eval_batches, latents, train_batches

SHAPE = (2, 3, 4)
META = {"source": "abc", "checkpoint": "def", "num_classes": 5, "class_names": list("vwxyz")}


def _moments(count: int = 10):
    rng = np.random.default_rng(0)
    return [rng.normal(3, 2, (count, *SHAPE)).astype(np.float32) for _ in range(4)]


def _write(out, *, first: int = 0, last: int = 10, flipped: bool = True, meta=META, **other):
    mean, logvar, mean_f, logvar_f = _moments()
    with latents.Writer(out, "train", count=10, shape=SHAPE, flipped=flipped, meta=meta, **other) as writer:
        assert writer.done == first
        for i in range(first, last, 3):
            rows = slice(i, min(i + 3, last))
            extra = (mean_f[rows], logvar_f[rows]) if flipped else ()
            labels = np.arange(10, dtype=np.int32)[rows] % 5
            writer.append(mean[rows], logvar[rows], labels, [f"é{j}" for j in range(10)][rows], *extra)


def test_round_trip(tmp_path):
    _write(tmp_path)
    source = SOURCES["latents"](split="train", path=str(tmp_path))
    moments = _moments()
    assert (len(source), source.num_classes, source.class_names, source.has_text) == (10, 5, tuple("vwxyz"), True)
    for item in (source[7], pickle.loads(pickle.dumps(source))[7]):
        for key, values in zip(("mean", "logvar", "mean_flipped", "logvar_flipped"), moments):
            assert item[key].dtype == np.float16 and (item[key] == values[7].astype(np.float16)).all()
        assert item["label"] == 2 and item["text"] == "é7"
    rounded = moments[0].astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(source.mean, rounded.mean((0, 1, 2)), rtol=1e-6)
    variance = np.exp(moments[1].astype(np.float16).astype(np.float64))
    draws = rounded + np.sqrt(variance) * np.random.default_rng(0).normal(size=(4000, *rounded.shape))
    white = (draws - source.mean) / source.std
    np.testing.assert_allclose(white.std((0, 1, 2, 3)), 1, rtol=0.05)
    assert source.meta["source"] == "abc" and source.shape == SHAPE


def test_statistics_in_chunks():
    values = np.random.default_rng(1).normal(100, 0.5, (103, 2, 2, 3)).astype(np.float32)
    mean, std = latents.statistics(values, np.full_like(values, np.log(0.3)), chunk=10)
    np.testing.assert_allclose(mean, values.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(values.astype(np.float64).var((0, 1, 2)) + 0.3), rtol=1e-6)


def test_batches_take_the_mirrored_copy_half_of_the_time(tmp_path):
    _write(tmp_path)
    source = SOURCES["latents"](split="train", path=str(tmp_path))
    mean, logvar, mean_f, logvar_f = (m.astype(np.float16) for m in _moments())
    batches = train_batches(source, batch_size=10, seed=0, flip=True)
    mirrored = []
    for _ in range(20):
        batch = next(batches)
        assert set(batch) == {"mean", "logvar", "label"}
        for m, v in zip(batch["mean"], batch["logvar"]):
            plain = [i for i in range(10) if (m == mean[i]).all() and (v == logvar[i]).all()]
            turned = [i for i in range(10) if (m == mean_f[i]).all() and (v == logvar_f[i]).all()]
            assert len(plain) + len(turned) == 1
            mirrored.append(bool(turned))
    assert 0.35 < np.mean(mirrored) < 0.65
    (first, last) = eval_batches(source, batch_size=6)
    assert (first["mean"] == mean[:6]).all() and last["valid"].tolist() == [True] * 4 + [False] * 2


def test_flip_without_mirrored_copies_is_an_error(tmp_path):
    _write(tmp_path, flipped=False)
    source = SOURCES["latents"](split="train", path=str(tmp_path))
    assert set(source[0]) == {"mean", "logvar", "label", "text"}
    with pytest.raises(ValueError, match="flip=True, but the latent cache holds no mirrored copies"):
        train_batches(source, batch_size=2, seed=0, flip=True)


def test_an_interrupted_writer_goes_on_and_is_no_source_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with latents.Writer(tmp_path, "train", count=10, shape=SHAPE, flipped=True, meta=META) as writer:
            writer.append(
                *(m[:6] if i < 2 else m for i, m in enumerate(_moments()[:2])),
                [0, 1, 2, 3, 4, 0],
                [f"é{i}" for i in range(6)],
                *(m[:6] for m in _moments()[2:]),
            )
            raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"train.partial: unfinished latent cache"):
        SOURCES["latents"](split="train", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"an unfinished cache of another kind .*checkpoint: 'def', now 'other'"):
        _write(tmp_path, first=6, meta={**META, "checkpoint": "other"})
    _write(tmp_path, first=6)
    _write(tmp_path / "whole")
    a, b = (SOURCES["latents"](split="train", path=str(p)) for p in (tmp_path, tmp_path / "whole"))
    assert all(
        (a[i][k] == b[i][k]).all() for i in range(10) for k in ("mean", "logvar", "mean_flipped", "logvar_flipped")
    )
    assert [a[i]["text"] for i in range(10)] == [b[i]["text"] for i in range(10)]
    assert (a.mean == b.mean).all() and not (tmp_path / "train.partial").exists()


def test_killed_at_any_file(tmp_path):
    """A kill leaves some prefix of the files: never a source, and the next writer finishes."""
    for names in ([], ["mean.npy"], ["mean.npy", "text.jsonl", "progress.json"]):
        out = tmp_path / str(len(names))
        folder = out / "train.partial"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text("")
        _write(out)
        assert len(SOURCES["latents"](split="train", path=str(out))) == 10


def test_killed_before_the_first_flush(tmp_path):
    writer = latents.Writer(tmp_path, "train", count=10, shape=SHAPE, flipped=True, meta=META)
    rows = [m[:3] for m in _moments()]
    writer.append(rows[0], rows[1], np.zeros(3, np.int32), ["a"] * 3, *rows[2:])
    del writer  # neither flushed nor closed, as after kill -9
    _write(tmp_path)
    assert SOURCES["latents"](split="train", path=str(tmp_path))[1]["text"] == "é1"


def test_a_full_disk_is_an_error_before_anything_is_encoded(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latents.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        latents.Writer(tmp_path, "train", count=10, shape=SHAPE, flipped=True, meta=META)
    monkeypatch.undo()
    _write(tmp_path)


def test_too_few_rows(tmp_path):
    with pytest.raises(ValueError, match="only 6 of 10 rows were written"):
        _write(tmp_path, last=6)
    assert not (tmp_path / "train").exists()


def test_bad_rows(tmp_path):
    with latents.Writer(tmp_path, "train", count=1, shape=SHAPE, flipped=False, meta={}) as writer:
        good = np.zeros((1, *SHAPE), np.float32)
        for bad in (np.inf, np.nan, 1e6):
            with pytest.raises(ValueError, match=r"mean in rows 0\.\.0 does not fit float16"):
                writer.append(good + bad, good, [0])
        with pytest.raises(ValueError, match=r"logvar has shape \(1, 2, 3, 5\); expected \(1, 2, 3, 4\)"):
            writer.append(good, np.zeros((1, 2, 3, 5)), [0])
        with pytest.raises(ValueError, match="2 rows and 2 texts after 0 of 1"):
            writer.append(np.zeros((2, *SHAPE)), np.zeros((2, *SHAPE)), [0, 0])
        writer.append(good, good, [0])


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
    np.save(tmp_path / "train" / "label.npy", np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"label has 3 rows, meta.json says 10"):
        SOURCES["latents"](path=str(tmp_path))
    meta.write_text(json.dumps({**content, "complete": False}))
    with pytest.raises(ValueError, match="unfinished latent cache"):
        SOURCES["latents"](path=str(tmp_path))
    (tmp_path / "train" / "statistics.npz").unlink()
    meta.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged latent cache"):
        SOURCES["latents"](path=str(tmp_path))
