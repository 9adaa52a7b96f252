"""The cache of a first stage's latents: one for all runs that need the same, written by all devices, trained on as if it were not."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax import cli
from ldm_jax.data import SOURCES, files
from ldm_jax.models import MODELS
from ldm_jax.models.autoencoder_kl import Posterior
from ldm_jax.training import encode, experiment, open_stage, streams, whitening
from ldm_jax.training.first_stage import FirstStage, moments
from tests.processes import run_two
from tests.training import tiny


class Quarter:
    """An 'autoencoder' whose posterior is every fourth pixel."""

    dtype = "float32"

    @staticmethod
    def apply(variables, x, method):
        return Posterior(x[:, ::4, ::4], jnp.full_like(x[:, ::4, ::4], -3.0))


STAGE = FirstStage(Quarter, {}, np.zeros(3), np.ones(3), (8, 8, 3), "sha")


def place(tmp_path, stage=STAGE, **changes):
    config = tiny.config().copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(changes)
    parsed = experiment.parse(config)
    images = streams.source(parsed, "train")
    return encode.folder(parsed, stage, tmp_path / "stage", tmp_path / "run", images, images.fingerprint())


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


def encoded(out, stage=STAGE, config=None, **more):
    parsed = experiment.parse(config or tiny.config())
    images = streams.source(parsed, "train")
    return encode.cached(parsed, out, "train", stage, images, **{"flip": False, "quiet": True, **more})


def test_two_runs_at_once_encode_once(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 24)
    found, said = [], []
    runs = [threading.Thread(target=lambda: found.append(encoded(tmp_path, say=said.append))) for _ in range(2)]
    for r in runs:
        r.start()
    for r in runs:
        r.join()
    assert len([s for s in said if s.startswith("encoding")]) == 1
    assert all(len(f) == 64 for f in found)
    images = streams.source(experiment.parse(tiny.config()), "train")
    for i in range(64):
        np.testing.assert_allclose(found[0][i]["mean"], images[i]["image"][::4, ::4] / 127.5 - 1, atol=1e-3)
        np.testing.assert_allclose(found[0][i]["std"], np.exp(-1.5), rtol=1e-3)
        assert (found[0][i]["text"], found[0][i]["label"]) == (images[i]["text"], images[i]["label"])


def test_what_is_there_is_taken_as_it_is_unless_it_is_something_else(tmp_path):
    assert encoded(tmp_path, dtype="float32").meta["dtype"] == "float32"
    assert encoded(tmp_path).meta["dtype"] == "float32"
    for more, said in (
        ({"dtype": "float16"}, "dtype: 'float32', expected 'float16'"),
        ({"limit": 3}, "count: 64, expected 3"),
        ({"stage": STAGE._replace(sha256="x")}, "checkpoint: 'sha', expected 'x'"),
        ({"stage": STAGE._replace(shape=(4, 4, 3)), "limit": 3}, "count"),
    ):
        with pytest.raises(ValueError, match=f"holds the latents of something else .*{said}"):
            encoded(tmp_path, **more)


def test_what_cannot_be_encoded_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="mirrored copies are asked for, but its captions would not fit"):
        encoded(tmp_path / "a", flip=True)
    with pytest.raises(ValueError, match=r"resolution=32 gives latents of shape \(8, 8, 3\); this .* have \(4, 4, 3\)"):
        encoded(tmp_path / "a", STAGE._replace(shape=(4, 4, 3)))
    with pytest.raises(ValueError, match="dtype 'float8' of a latent cache"):
        encoded(tmp_path / "a", dtype="float8")
    assert not (tmp_path / "a").exists()
    encoded(tmp_path / "b")
    with pytest.raises(ValueError, match="holds latents already; expected images"):
        cache = SOURCES["latents"](path=str(tmp_path / "b"))
        encode.cached(experiment.parse(tiny.config()), tmp_path / "c", "train", STAGE, cache, flip=False)


# --- training from it ----------------------------------------------------------------------------------------------------


def stir(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(x.dtype), tree)


class Half:
    """Every second pixel, mapped to 2 channels: an autoencoder with a posterior, or a deterministic one."""

    dtype = "float32"

    def __init__(self, deterministic):
        self.deterministic = deterministic

    def apply(self, variables, x, method):
        z = x[:, ::2, ::2] @ variables["params"]["mean"]
        return z if self.deterministic else Posterior(z, x[:, ::2, ::2] @ variables["params"]["logvar"])


def make_stage(deterministic):
    params = stir({"mean": np.eye(3, 2, dtype=np.float32), "logvar": np.eye(3, 2, 1, dtype=np.float32)})
    return FirstStage(Half(deterministic), params, np.float32([0.1, -0.2]), np.float32([0.7, 1.3]), (8, 8, 2), "sha")


CONVOLUTIONS = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2}
TINY = {f"{half}_block_out_channels": (4, 4) for half in ("encoder", "decoder")} | {"num_encoder_blocks": (1, 1)}


@pytest.mark.parametrize(
    "name, options, names",
    [
        ("autoencoder_kl", CONVOLUTIONS, {"mean", "std"}),
        ("vq", CONVOLUTIONS | {"latent_channels": 4}, {"mean"}),
        ("fsq", CONVOLUTIONS, {"mean"}),
        ("autoencoder_tiny", TINY | {"num_decoder_blocks": (1, 1)}, {"mean"}),
    ],
)
def test_the_latent_of_each_kind_of_autoencoder(name, options, names):
    module, x = MODELS[name](**options), jnp.zeros((2, 16, 16, 3))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, method="encode")["params"])
    found = jax.eval_shape(lambda params: moments(module, params, x), params)
    assert found.keys() == names and {z.shape for z in found.values()} == {(2, 8, 8, 4)}


def picture_folder(path):
    rng = np.random.default_rng(0)
    for i in range(10):
        image = rng.integers(0, 256, (16, 16, 3), np.uint8)
        (path / ("val" if i > 7 else "train") / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / ("val" if i > 7 else "train") / "a" / f"{i}.png")


def test_a_cache_keeps_several_captions_of_an_image_and_knows_when_one_changes(tmp_path):
    picture_folder(tmp_path / "data")
    texts = [[f"{i}{c}" for c in "abc"[: 1 + i % 3]] for i in range(8)]

    def write(texts):
        rows = [{"file_name": f"train/a/{i}.png", "captions": t} for i, t in enumerate(texts)]
        (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write(texts)
    stage, config = STAGE._replace(shape=(4, 4, 3)), diffusion_config(tmp_path / "data")
    cache = encoded(tmp_path / "latents", stage, config)
    assert cache.several_captions and [list(cache[i]["captions"]) for i in range(8)] == texts
    write([*texts[:-1], ["another", *texts[-1][1:]]])
    with pytest.raises(ValueError, match=r"holds the latents of something else \(content: "):
        encoded(tmp_path / "latents", stage, config)


def test_images_are_decoded_once_and_known_when_they_change(tmp_path, monkeypatch):
    picture_folder(tmp_path / "data")
    lines = [json.dumps({"file_name": f"train/a/{i}.png", "text": f"picture {i}"}) for i in range(8)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    decoded, decode = [], files.decode
    monkeypatch.setattr(files, "decode", lambda data, where: decoded.append(where) or decode(data, where))
    stage, config = STAGE._replace(shape=(4, 4, 3)), diffusion_config(tmp_path / "data")
    monkeypatch.setattr(encode, "BATCH", 4)
    cache = encoded(tmp_path / "latents", stage, config)
    assert len(decoded) == len(set(decoded)) == 8
    assert [cache[i]["text"] for i in range(8)] == [f"picture {i}" for i in range(8)]

    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "data" / "train" / "a" / "3.png")
    with pytest.raises(ValueError, match=rf"{tmp_path}/latents/train holds the latents of something else \(content: "):
        encoded(tmp_path / "latents", stage, config)
    meta = tmp_path / "latents" / "train" / "meta.json"  # as it was before it said what the content was
    meta.write_text(json.dumps({key: value for key, value in json.loads(meta.read_text()).items() if key != "content"}))
    assert len(encoded(tmp_path / "latents", stage, config)) == 8


def diffusion_config(data):
    c = tiny.config(batch_size=4, images=12).copy_and_resolve_references().unlock()
    c.task = {"name": "diffusion", "prediction": "flow"}
    c.model = {"name": "dit", "in_channels": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
    c.data = {"name": "folder", "path": str(data)}
    c.input.update(resolution=16, flip=True)
    c.optimizer = {"name": "sgd", "learning_rate": 0.1}
    return c.lock()


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_from_the_cache_is_training_through_the_frozen_encoder(tmp_path, deterministic):
    picture_folder(tmp_path / "data")
    stage, config = make_stage(deterministic), diffusion_config(tmp_path / "data")
    cache = encoded(tmp_path / "latents", stage, config, flip=True, dtype="float32")
    assert ("std" in cache[0]) == (not deterministic)
    ends = {}
    for cached in (False, True):
        with config.unlocked():
            config.first_stage.update(cache=cached, latents=str(tmp_path / "latents"))
        task, data = tiny.built(config, tmp_path, stage)
        state = jax.jit(task.init)(jax.random.key(0))
        start = stir(state.params)
        state = state._replace(params=start)
        batches, step = data.train_batches(0), jax.jit(task.step)
        for _ in range(3):
            batch = next(batches)
            assert ("image" in batch) != cached
            state, _ = step(state, task.frozen, batch)
        ends[cached] = state.params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ends[False], ends[True])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start, ends[True])
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("deterministic", [False, True])
def test_whitening_is_of_the_latents_with_their_noise(deterministic):
    stage = make_stage(deterministic)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    mean, std = whitening.measure(stage.network, stage.params, iter([{"image": images, "valid": np.arange(6) < 5}]))
    pixels = images[:5, ::2, ::2] / 127.5 - 1
    z = pixels @ stage.params["mean"]
    noise = 0 if deterministic else np.exp(pixels @ stage.params["logvar"]).mean((0, 1, 2))
    np.testing.assert_allclose(mean, z.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(z.var((0, 1, 2)) + noise), rtol=1e-5)


# --- devices and processes -----------------------------------------------------------------------------------------------

SCRIPT = """
import pathlib, sys
import jax
out, devices, *processes = sys.argv[1:]
if processes:
    jax.distributed.initialize(f"127.0.0.1:{processes[0]}", 2, int(processes[1]))
from ldm_jax.data import latent_cache
from tests.training import test_encode
latent_cache.SHARD_ROWS = 7
assert jax.local_device_count() == int(devices)
seen = []
class Quarter(test_encode.Quarter):
    def apply(variables, x, method):
        if isinstance(x, jax.core.Tracer) and x.shape[0] > 1:
            jax.debug.inspect_array_sharding(x, callback=lambda s: seen.append(s.shard_shape(x.shape)[0] / x.shape[0]))
        return test_encode.Quarter.apply(variables, x, method)
written, write = [], latent_cache.write_shard
latent_cache.write_shard = lambda folder, meta, shard, batches: (written.append(shard), write(folder, meta, shard, batches))
test_encode.encoded(pathlib.Path(out), test_encode.STAGE._replace(network=Quarter))
assert seen == [1 / int(devices)], seen
assert written == list(range(jax.process_index(), 10, jax.process_count())), written
"""


def same_records(a, b):
    assert len(a) == len(b)
    return all((a[i][k] == b[i][k]).all() for i in range(len(a)) for k in ("mean", "std", "label"))


@pytest.mark.slow
def test_four_devices_encode_what_one_does(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "four"), "4"],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert same_records(encoded(tmp_path / "one"), SOURCES["latents"](path=str(tmp_path / "four")))


@pytest.mark.slow
def test_two_processes_write_every_other_shard(tmp_path):
    run_two("-c", SCRIPT, str(tmp_path / "two"), "1")
    assert same_records(encoded(tmp_path / "one"), SOURCES["latents"](path=str(tmp_path / "two")))


# --- the command ---------------------------------------------------------------------------------------------------------


def test_encode_says_what_it_wrote_and_names_bad_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "vae").mkdir()
    parsed = experiment.parse(tiny.config())
    monkeypatch.setattr(open_stage, "load", lambda workdir, experiment: STAGE)
    monkeypatch.setattr(experiment, "of_run", lambda workdir: parsed)
    words = ["encode", f"--workdir={tmp_path / 'vae'}", f"--out={tmp_path}", "--quiet"]
    assert cli.main([*words, "--data=val", "--dtype=float32"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"64 latents of shape (8, 8, 3) in {tmp_path}/val; whitened with {tmp_path}/vae/whitening.json"
    images = streams.source(experiment.parse(tiny.config()), "tune")
    pixels = np.stack([images[i]["image"][::4, ::4] for i in range(64)]) / 127.5 - 1
    expected = np.stack([range(3), pixels.mean((0, 1, 2)), pixels.var((0, 1, 2)) + np.exp(-3)], 1)
    np.testing.assert_allclose([[float(v) for v in row.split()] for row in said[2:]], expected, atol=1e-4)
    file = tmp_path / "file"
    file.write_text("")
    for more, error in (
        (["--data=nosplit"], "nosplit"),
        (["--data=/nowhere.py:train"], "/nowhere.py"),
        (["--data=train", "--flip"], "mirrored copies"),
        (["--data=train", "--dtype=int8"], "dtype 'int8' of a latent cache; expected one of float16, float32"),
        (["--data=val", "--dtype=float16"], "dtype: 'float32', expected 'float16'"),
        (["--data=train", f"--out={file}"], "ile"),
    ):
        assert cli.main([*words, *more]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and error in said[0]
