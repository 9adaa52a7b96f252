"""The task of the first stage: what moves and what does not, for each kind of autoencoder; resume; more devices than one."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.kernels import mesh
from ldm_jax.models import MODELS, vq
from ldm_jax.runs import checkpoint
from ldm_jax.runs.log import read_metrics
from ldm_jax.training import check, experiment, first_stage, frozen_networks, init_from, loop, open_stage, spaces
from ldm_jax.training.state import Averages, step_key
from ldm_jax.training.task import Context
from ldm_jax.training.tasks import TASKS, autoencoder
from ldm_jax.training.tasks.autoencoder.latent import KINDS
from ldm_jax.training.terms import TERMS
from ldm_jax.training.terms.term import Term
from tests.finished import finished
from tests.training import tiny
from tests.training.test_resume import assert_same_bits, stored

SIDE, BATCH = 8, 8
SHAPE = {"block_out_channels": (4,), "norm_num_groups": 2, "layers_per_block": 1, "mid_block_add_attention": False}
NETWORKS = {
    "autoencoder_kl": {"latent_channels": 2, **SHAPE},
    "vq": {"latent_channels": 3, "num_vq_embeddings": 16, **SHAPE},
    "fsq": {"levels": (5, 3), **SHAPE},
    "autoencoder_tiny": {
        "encoder_block_out_channels": (4, 4),
        "decoder_block_out_channels": (4, 4),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 2,
    },
}
GAME = {"width": 4, "layers": 1}
BATCH_OF = {"image": np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)}


def make(name="autoencoder_tiny", accumulate=1, load=None, **settings):
    context = Context(
        network=MODELS[name](**NETWORKS[name]),
        optimizer=lambda learning_rate=1e-3, start_images=0, **rest: optax.adamw(
            learning_rate, weight_decay=0.1, **rest
        ),
        schedule=lambda step: 1e-3,
        averages=Averages((100,)),
        batch_size=BATCH,
        accumulate=accumulate,
        space=spaces.images(SIDE),
        load=load,
    )
    return autoencoder.make(context, **settings)


def run(task, steps, state=None):
    """States after 0, 1, ..., `steps` steps on one batch, and the metrics of each step."""
    states, metrics = [jax.jit(task.init)(jax.random.key(0)) if state is None else state], []
    step = jax.jit(task.step)
    for _ in range(steps):
        state, values = step(states[-1], task.frozen, BATCH_OF)
        states.append(state)
        metrics.append(jax.device_get(values))
    return states, metrics


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def differs_everywhere(a, b):
    return not any(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_learns_and_says_how_well(name):
    task = make(name, reconstruction="l2")
    states, metrics = run(task, 20)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    rows = task.validate(states[-1].params, task.frozen, BATCH_OF, jax.random.key(0))
    assert {value.shape for value in rows.values()} == {(BATCH,)}
    metric_of = {"autoencoder_kl": "val_kl", "vq": "val_codebook_perplexity", "fsq": "val_codebook_usage"}
    assert {"val_loss", "val_psnr", "val_reconstruction"} | (
        {metric_of[name]} if name in metric_of else set()
    ) <= rows.keys()
    shown = task.pictures(states[-1].params, task.frozen, BATCH_OF, jax.random.key(0))
    assert shown["reconstructions"].shape == shown["data"].shape
    if name in ("vq", "fsq"):
        size = MODELS[name](**NETWORKS[name]).num_vq_embeddings
        assert 1 / size <= rows["val_codebook_usage"][0] <= 1 <= rows["val_codebook_perplexity"][0] <= size


def test_both_networks_move_from_the_step_on_at_which_the_game_starts():
    task = make(adversarial={**GAME, "start_images": 2 * BATCH - 1, "lecam": 0.1})
    states, metrics = run(task, 3)
    critics = [state.params["discriminator"] for state in states]
    assert same(critics[0], critics[1]) and same(critics[1], critics[2])
    assert [m["adversarial_weight"] > 0 for m in metrics] == [False, False, True]
    assert differs_everywhere(critics[2], critics[3])
    assert differs_everywhere(states[2].params["autoencoder"], states[3].params["autoencoder"])
    assert differs_everywhere(states[2].variables, states[3].variables), "running statistics and anchors"
    _, alone = run(make(), 3)
    errors = np.array([[m["reconstruction"] for m in both] for both in (metrics, alone)])
    np.testing.assert_allclose(*errors, rtol=1e-5, err_msg="before it starts, nothing of it is felt")
    # Adam's first step has the size of the learning rate, whenever it is taken.
    moved = np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (critics[3], critics[2])))])
    np.testing.assert_allclose(np.median(np.abs(moved)), 1e-3, rtol=0.05)


def test_the_discriminator_learns_to_tell():
    settings = {"adversarial": {**GAME, "norm": "spectral", "weight": 0.0, "optimizer": {"learning_rate": 1e-2}}}
    _, metrics = run(make(**settings), 20)
    assert metrics[-1]["discriminator_loss"] < 0.7 * metrics[0]["discriminator_loss"]
    assert metrics[-1]["logits_real"] > metrics[-1]["logits_fake"] + 0.5


def test_only_the_decoder_moves_where_only_it_is_trained():
    task = make(train="decoder", adversarial=GAME)
    states, _ = run(task, 2)
    for name, before in states[0].params["autoencoder"].items():
        after = states[-1].params["autoencoder"][name]
        assert (differs_everywhere if name == "decoder" else same)(before, after), name
    sizes = [
        sum(x.size for x in jax.tree.leaves(s.opt_state["autoencoder"])) for s in (states[0], run(make(), 0)[0][0])
    ]
    assert sizes[0] < 0.7 * sizes[1], "what stands still has no moments"


def test_a_codebook_follows_its_latents_from_what_it_begins_with():
    task = make("vq", codebook_decay=0.9, revive_after=2 * BATCH)
    state = jax.jit(task.init)(jax.random.key(0))
    entries = state.params["autoencoder"]["quantize"]["embedding"].at[4:].add(9.0)  # dead ones, for no latent is near
    state.params["autoencoder"]["quantize"]["embedding"] = entries  # as config.init_from does
    book = vq.Codebook(jnp.full(16, 3.0), 3.0 * entries, jnp.zeros(16, jnp.int32))
    states, metrics = run(task, 3, state._replace(variables={"codebook": book}))
    for before, after in itertools.pairwise(states):
        variables = {"params": before.params["autoencoder"]}
        x = BATCH_OF["image"] / 127.5 - 1.0
        latent = KINDS[vq.VQModel].encode(MODELS["vq"](**NETWORKS["vq"]), variables, x, None)
        key = jax.random.fold_in(step_key(before), 2)
        book, entries = vq.update(book, latent.z, latent.indices, key, 0.9, 2 * BATCH)
        np.testing.assert_allclose(after.params["autoencoder"]["quantize"]["embedding"], entries, atol=1e-5)
        np.testing.assert_allclose(after.variables["codebook"].count, book.count, atol=1e-4)
    assert metrics[0]["codebook_usage"] <= 0.25 < metrics[2]["codebook_usage"], "dead entries come back"
    # An average over parameters follows the entries too.
    assert not np.array_equal(
        states[-1].ema["100"]["autoencoder"]["quantize"]["embedding"][0],
        states[0].ema["100"]["autoencoder"]["quantize"]["embedding"][0],
    )


def test_a_step_in_two_parts_is_the_step_of_the_whole():
    """For VQ, in which nothing is drawn."""
    whole, parts = (
        run(make("vq", accumulate=accumulate, codebook_decay=0.9, learned_variance=True), 1)[0][1]
        for accumulate in (1, 2)
    )
    for a, b in zip(jax.tree.leaves(whole.variables), jax.tree.leaves(parts.variables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    moments = [s.opt_state["autoencoder"].inner_states["moves"] for s in (whole, parts)]
    for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_weight_of_the_kl_grows_over_its_warmup():
    task = make("autoencoder_kl", kl_weight=1e-2, kl_warmup_images=2 * BATCH)
    _, metrics = run(task, 3)
    weights = [(m["loss"] - m["reconstruction"]) / m["kl"] for m in metrics]
    np.testing.assert_allclose(weights, [0.0, 5e-3, 1e-2], atol=1e-6)


def test_the_terms_of_the_loss_add_up():
    task = make(equivariance=0.5, learned_variance=True, adversarial={**GAME, "weight": 0.3})
    _, metrics = run(task, 2)
    for m in metrics:
        nll = m["reconstruction"] * np.exp(-m["log_variance"]) + m["log_variance"]
        total = nll + 0.5 * m["equivariance"] + m["adversarial_weight"] * m["adversarial_loss"]
        np.testing.assert_allclose(m["loss"], total, rtol=1e-5)
        assert m["equivariance"] > 0 and m["adversarial_weight"] > 0
    assert metrics[1]["log_variance"] < 0, "an error below 1 is a variance below 1"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"reconstruction": "l3"}, "task.reconstruction is 'l3'"),
        ({"train": "encoder"}, "task.train is 'encoder'; there are all, decoder"),
        ({"kl_weight": -1.0}, "task.kl_weight is -1.0"),
        ({"codebook_decay": 0.9}, "task.codebook_decay is 0.9.*AutoencoderTiny"),
        ({"name": "vq", "codebook_decay": 0.9, "train": "decoder"}, "task.codebook_decay is 0.9.*'decoder'"),
        ({"kl_weight": 1e-3}, "task.kl_weight is 0.001, which does nothing for a AutoencoderTiny"),
        ({"name": "fsq", "commitment": 0.1}, "task.commitment is 0.1, which does nothing for a FSQModel"),
        ({"name": "vq", "revive_after": 5}, "task.revive_after is 5, but task.codebook_decay is 0"),
        (
            {"align": {"name": "classifier:DIR"}, "train": "decoder"},
            "task.train is 'decoder' with task.align",
        ),
        ({"adversarial": {"loss": "none"}}, "task.adversarial.loss is 'none'"),
        ({"adversarial": GAME, "accumulate": 2}, "config.train.accumulate=2 with task.adversarial"),
    ],
)
def test_what_is_off_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        make(**settings)


def test_a_network_that_is_no_autoencoder_is_refused(tmp_path):
    config = tiny.config()
    with config.unlocked():
        config.model = {"name": "classifier"}
    with pytest.raises(ValueError, match=r"trains AutoencoderKL, .*config\.model\.name is a Classifier"):
        loop.train(config, tmp_path, quiet=True)


def test_a_perceptual_distance_counts_in_training_and_validation():
    network = MODELS["classifier"](num_classes=4, widths=(4, 8), norm_num_groups=2)
    params = network.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    perceptual = {"name": "classifier:DIR", "weight": 0.5}
    task = make(perceptual=perceptual, load={"classifier:DIR": (network, params)}.get)
    other = make(perceptual=perceptual, load=lambda name: (network, jax.tree.map(lambda x: 2 * x, params)))
    assert len(task.facts["perceptual"]) == 64 and task.facts.keys() == other.facts.keys() and task.facts != other.facts
    assert make(perceptual=perceptual).frozen == {}, "nothing is read for a config that is only checked"
    steps, metrics = run(task, 1)
    rows = task.validate(steps[0].params, task.frozen, BATCH_OF, jax.random.key(0))
    assert metrics[0]["perceptual"] > 0
    np.testing.assert_allclose(rows["val_loss"], rows["val_reconstruction"] + 0.5 * rows["val_perceptual"], rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["loss"], np.mean(rows["val_loss"]), rtol=1e-4)


def test_a_new_term_is_one_function_and_one_line(monkeypatch):
    def frequency(context, *, weight: float = 1.0):
        def loss(params, frozen, seen):
            return jnp.mean(jnp.abs(jnp.fft.fft2(seen.x - seen.y, axes=(1, 2))), (1, 2, 3))

        return Term("frequency", "error", loss, weight, ramp=lambda step: jnp.where(step > 0, 1.0, 0.0))

    with pytest.raises(ValueError, match=r"task\.frequency is unknown; the terms that have a block are perceptual"):
        make(frequency={"weight": 0.5})
    monkeypatch.setitem(TERMS, "frequency", frequency)
    task = make(frequency={"weight": 0.5})
    state = task.init(jax.random.key(0))
    rows = task.validate(state.params, task.frozen, BATCH_OF, jax.random.key(0))
    np.testing.assert_allclose(rows["val_loss"], rows["val_reconstruction"] + 0.5 * rows["val_frequency"], rtol=1e-5)
    step = jax.jit(task.step)
    for i, weight in enumerate((0.0, 0.5)):
        _, metrics = step(state._replace(step=jnp.int32(i)), task.frozen, BATCH_OF)
        expected = metrics["reconstruction"] + weight * metrics["frequency"]
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5, err_msg="its weight grows with the step")


def test_what_a_network_carries_comes_with_it_from_another_run(tmp_path):
    """A codebook's averages and the discriminator's spectral vectors and anchors; none of them from a run that had none."""
    task = make("vq", codebook_decay=0.9, adversarial={**GAME, "norm": "spectral", "lecam": 0.1})
    config, random, shapes = (
        tiny.config().unlock(),
        np.random.default_rng(0),
        jax.eval_shape(task.init, jax.random.key(0)),
    )
    given, fresh = (jax.tree.map(lambda x: jnp.asarray(9 * random.random(x.shape), x.dtype), shapes) for _ in range(2))
    given = given._replace(ema={"100": given.params})
    entries = given.params["autoencoder"]["quantize"]["embedding"]
    started = {"codebook": vq.codebook(entries), **{k: fresh.variables[k] for k in ("anchors", "discriminator")}}
    for name, variables, expected, said in (
        ("average", given.variables, given.variables, "carrying over anchors, codebook, discriminator"),
        ("gradient", {"discriminator": {"norm_1": {"mean": entries}}}, started, f"step {given.step}"),
    ):
        writer = checkpoint.Writer(tmp_path / name)
        writer.save(given._replace(variables=variables), {})
        writer.close()
        (tmp_path / name / "config.json").write_text(config.to_json())
        config.init_from.workdir, log = str(tmp_path / name), []
        parsed, shardings = experiment.parse(config), mesh.tree_shardings(fresh, mesh.make_mesh(), (), 0)
        started_from, _ = init_from.start(parsed, TASKS["autoencoder"], fresh, shardings, log.append)
        assert same(started_from.params, given.params) and same(started_from.variables, expected), name
        assert jax.tree.structure(started_from) == jax.tree.structure(fresh) and log[0].endswith(said)


# --- the loop ------------------------------------------------------------------------------------------------------------


def full(**train):
    """VQ by average, batch norm, both regularizers, a learned variance and a later start."""
    config = tiny.config(**train).unlock()
    config.input.update(resolution=16, crop="lanczos")
    config.model = {"name": "vq", **NETWORKS["vq"]}
    config.task = {
        "name": "autoencoder",
        "learned_variance": True,
        "codebook_decay": 0.9,
        "revive_after": 24,
        "adversarial": {**GAME, "start_images": 40, "lecam": 0.1, "optimizer": {"learning_rate": 1e-4}},
    }
    return config.lock()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    finished(full(), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_that_was_killed_ends_in_the_same_bits(whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real = checkpoint.Writer.save

    def save_then_die(self, state, meta):
        real(self, state, meta)
        if int(state.step) == 8:
            raise Killed

    monkeypatch.setattr(checkpoint.Writer, "save", save_then_die)
    with pytest.raises(Killed):
        loop.train(full(), tmp_path, quiet=True)
    monkeypatch.undo()
    loop.train(full(), tmp_path, quiet=True)
    kept = stored(whole, 12)
    assert_same_bits(kept, stored(tmp_path, 12))
    for part in ("['variables']['codebook']", "['variables']['discriminator']", "['variables']['anchors']"):
        assert any(name.startswith(part) for name in kept)
    assert any(name.startswith("['opt_state']['discriminator']") for name in kept)


@pytest.mark.slow
def test_a_decoder_is_tuned_to_an_encoder_that_is_there(whole, tmp_path):
    config = full(images=16).unlock()
    config.task = {"name": "autoencoder", "train": "decoder"}
    with pytest.raises(ValueError, match=r"task\.train='decoder' .* expected config\.init_from"):
        loop.train(config.lock(), tmp_path, quiet=True)
    (tmp_path / "config.json").unlink(missing_ok=True)
    with config.unlocked():
        config.init_from.workdir = str(whole)
    loop.train(config, tmp_path, quiet=True)
    before = checkpoint.restore_params(whole, 12, "100")["autoencoder"]
    for average in (None, "100"):
        after = checkpoint.restore_params(tmp_path, 2, average)["autoencoder"]
        for name in before:
            assert same(before[name], after[name]) == (name in ("encoder", "quant_conv", "quantize")), name


def test_a_misspelt_key_of_a_block_is_named(tmp_path):
    for block in ("adversarial", "perceptual", "align"):
        config = tiny.config().unlock()
        config.task[block] = {"typo": 1}
        with pytest.raises(ValueError, match=rf"config\.task\.{block}\.typo is unknown"):
            loop.train(config.lock(), tmp_path / block, quiet=True)


@pytest.mark.slow
def test_a_small_autoencoder_learns_the_latents_and_decodes_previews(whole, tmp_path):
    stage = open_stage.load(whole)
    assert stage.shape == (16, 16, 3)
    config = full(images=160, validate_every=80).unlock()
    config.task = {"name": "tiny_autoencoder"}
    config.model = {"name": "autoencoder_tiny", **NETWORKS["autoencoder_tiny"], "latent_channels": 3}
    with pytest.raises(ValueError, match=r"expected config\.first_stage to name it"):
        check.check(config)
    config.first_stage.workdir = str(whole)
    with pytest.raises(ValueError, match=r"latents of shape \(8, 8, 3\); the first stage's have \(16, 16, 3\)"):
        loop.train(config.lock(), tmp_path / "wrong", quiet=True)
    with config.unlocked():
        for half in ("encoder", "decoder"):
            config.model[f"{half}_block_out_channels"], config.model[f"num_{half}_blocks"] = (4,), (1,)
        config.optimizer.learning_rate = 1e-2
    last = loop.train(config, tmp_path / "student", quiet=True)
    first = read_metrics(tmp_path / "student" / "metrics.jsonl")[0]
    assert last["val_loss"] < 0.9 * first["loss"] and (tmp_path / "student" / "pictures").is_dir()

    preview = open_stage.load_preview(tmp_path / "student", stage)
    z = jax.random.normal(jax.random.key(0), (2, *stage.shape))
    shown = first_stage.to_image(preview, first_stage.frozen(preview), z)
    np.testing.assert_allclose(shown, preview.network.apply({"params": preview.params}, z, method="decode"), atol=1e-6)
    with config.unlocked():
        config.task = {"name": "diffusion", "prediction": "flow"}
        config.model = {"name": "dit", "in_channels": 3, "hidden_size": 8, "depth": 1, "num_heads": 1, "num_classes": 0}
        config.first_stage.update(preview=str(tmp_path / "student"), cache=False)
    task, data = tiny.built(config, tmp_path / "run", stage)
    params = jax.eval_shape(task.init, jax.random.key(0)).params
    student = {"preview": task.frozen["preview"]}  # the full decoder is not asked for
    drawn = jax.eval_shape(task.pictures, params, student, data.picture_batch, jax.random.key(0))
    assert drawn["samples"].shape[1:] == (16, 16, 3)

    with pytest.raises(ValueError, match="another first stage"):
        open_stage.load_preview(tmp_path / "student", stage._replace(sha256="other"))
    with pytest.raises(ValueError, match="holds a run of the task 'autoencoder'; expected 'tiny_autoencoder'"):
        open_stage.load_preview(whole, stage)
    with pytest.raises(ValueError, match="holds a run of the task 'autoencoder'; expected 'classifier'"):
        frozen_networks.classifier(whole)


SCRIPT = """
import json, sys
import jax, numpy as np
from ldm_jax.kernels import mesh
from tests.training.tasks import test_autoencoder as tests
assert jax.device_count() == 4
ends = []
for size in (1, 4):
    task = tests.make("vq", codebook_decay=0.9, learned_variance=True, adversarial={**tests.GAME, "lecam": 0.1})
    devices = mesh.make_mesh(1, size, 1, devices=jax.devices()[:size])
    shard = lambda tree: mesh.tree_shardings(tree, devices, (), 64)
    key = jax.random.key(0)
    shardings = shard(jax.eval_shape(task.init, key))
    state = jax.device_put(jax.jit(task.init)(key), shardings)
    step = jax.jit(task.step, in_shardings=(shardings, {}, mesh.batch_sharding(devices)), out_shardings=(shardings, None))
    batch = mesh.shard_global(tests.BATCH_OF, devices)
    for _ in range(2):
        state, metrics = step(state, {}, batch)
    ends.append([np.asarray(x) for x in jax.tree.leaves((state.variables, metrics))])
    moments = [np.asarray(x) for x in jax.tree.leaves(state.opt_state)]
    ends[-1] += moments
print(json.dumps(max(float(np.abs(a - b).max() / (1 + np.abs(a).max())) for a, b in zip(*ends))))
"""


@pytest.mark.slow
def test_four_devices_take_the_step_of_one():
    flags = os.environ.get("XLA_FLAGS", "")
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4"},
        cwd=pathlib.Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert json.loads(out.stdout.splitlines()[-1]) < 1e-5


@pytest.mark.slow
def test_a_decoder_tuned_alone_keeps_the_name_of_its_latents(tmp_path):
    """So that caches and diffusion runs of the first autoencoder take the second, and its whitening is the same."""
    finished(tiny.config(images=16), tmp_path / "first")
    config = tiny.config(images=16).unlock()
    config.task.train, config.init_from.workdir = "decoder", str(tmp_path / "first")
    loop.train(config.lock(), tmp_path / "tuned", quiet=True)
    first, tuned = (open_stage.load(tmp_path / name) for name in ("first", "tuned"))
    assert tuned.sha256 == first.sha256 == checkpoint.identity(tmp_path / "first", 2)
    assert np.array_equal(first.std, tuned.std)
    kernels = [stage.params["decoder"]["conv_out"]["kernel"] for stage in (first, tuned)]
    assert not np.array_equal(*kernels)
