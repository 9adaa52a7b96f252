"""Files of samples, as they are written and read."""

import numpy as np
import pytest

from ldm_jax.evaluation import images as sources
from ldm_jax.evaluation import npz
from tests.evaluation.fake import LABELS, PIXELS


def test_samples_are_written_as_numpy_reads_them_and_read_batch_by_batch(tmp_path):
    path = tmp_path / "samples.npz"
    npz.write(path, (PIXELS[start : start + 9] for start in range(0, 70, 9)), 70, LABELS)
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"] and file["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(file["arr_0"], PIXELS)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
    result = sources.from_file(path)
    assert result.count == 70 and result.classes == 3
    batches = list(result.batches())
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in batches]), PIXELS)
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), LABELS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_of_others_and_older_ones_of_ours_are_read(tmp_path, save):
    save(tmp_path / "adm.npz", PIXELS, LABELS)
    save(tmp_path / "old.npz", arr_0=PIXELS, labels=LABELS.astype(np.int32))
    save(tmp_path / "none.npz", PIXELS)
    for name, classes in (("adm", 3), ("old", 3), ("none", 0)):
        result = sources.from_file(tmp_path / f"{name}.npz")
        assert result.classes == classes
        np.testing.assert_array_equal(np.concatenate([b["image"] for b in result.batches()]), PIXELS)


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
