"""The cache of a first stage's latents: one for all runs that need the same, another for each that does not."""

import threading

import jax.numpy as jnp
import numpy as np

from ldm_jax.training import experiment, latents
from ldm_jax.training.first_stage import FirstStage
from tests.training import tiny


class Quarter:
    """An 'autoencoder' whose posterior is every fourth pixel."""

    dtype = "float32"

    @staticmethod
    def apply(variables, x, method):
        return x[:, ::4, ::4], jnp.full_like(x[:, ::4, ::4], -3.0)


STAGE = FirstStage(Quarter, {}, np.zeros(3), np.ones(3), (8, 8, 3), "sha")


def place(tmp_path, stage=STAGE, **changes):
    config = tiny.config().copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(changes)
    return latents.folder(config, stage, tmp_path / "stage", tmp_path / "run", experiment.source(config, "train"))


def test_a_cache_is_named_after_all_that_it_depends_on(tmp_path):
    (tmp_path / "stage").mkdir()
    first = place(tmp_path)
    assert first.parent == tmp_path / "stage" / "latents"
    assert place(tmp_path, **{"optimizer.learning_rate": 0.5, "train.images": 999}) == first
    others = [
        place(tmp_path, **{"input.flip": True}),
        place(tmp_path, **{"data.size": 63}),
        place(tmp_path, **{"split.tune": "test"}),
        place(tmp_path, **{"split.train": "val"}),
        place(tmp_path, **{"input.crop": "adm"}),
        place(tmp_path, STAGE._replace(sha256="other")),
    ]
    assert len({first, *others}) == 7


def test_two_runs_at_once_encode_once(tmp_path):
    config = tiny.config()
    images = experiment.source(config, "train")
    found, said = [], []

    def run():
        found.append(latents.cached(config, tmp_path, "train", STAGE, images, flip=False, quiet=True, say=said.append))

    runs = [threading.Thread(target=run) for _ in range(2)]
    for r in runs:
        r.start()
    for r in runs:
        r.join()
    assert len([s for s in said if s.startswith("encoding")]) == 1
    assert all(len(f) == 64 for f in found)
    expected = images[5]["image"][::4, ::4] / 127.5 - 1
    np.testing.assert_allclose(found[0][5]["mean"], expected, atol=2e-3)
