"""The diffusion task: learned uncertainty, and times drawn by the loss met at them, whose history is part of the state."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.diffusion import loss as losses
from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.runs import checkpoint
from ldm_jax.training import loop, restore, sampling, spaces
from ldm_jax.training.images import from_uint8
from ldm_jax.training.state import Averages, step_key
from ldm_jax.training.task import Context
from ldm_jax.training.tasks import diffusion
from tests.training import tiny
from tests.training.test_resume import assert_same_bits, stored

TABLE = PROCESSES["discrete_vp"](np.linspace(0.1, 0.6, 5))
BATCH = {"image": np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), np.uint8)}


class Linear:
    """w x_t, whatever the time."""

    in_channels, out_channels = 3, None

    @staticmethod
    def init(key, x, t, cond):
        return {"params": {"w": 0.3 + 0.1 * jax.random.normal(key, x.shape[-1:])}}

    @staticmethod
    def apply(variables, x, t, cond, train=False, rngs=None):
        return variables["params"]["w"] * x


def make(process=TABLE, rate=1.0, accumulate=1, kind="eps", network=Linear, **block):
    context = Context(
        network=network,
        process=process,
        space=spaces.images(2),
        settings=sampling.Settings(),
        optimizer=lambda: optax.sgd(rate),
        schedule=lambda step: rate,
        averages=Averages((100,)),
        batch_size=8,
        accumulate=accumulate,
    )
    return diffusion.make(context, prediction=kind, stratified=False, **block)


def rows_and_times(params, key, t=None, batch=BATCH):
    """The loss of each row by a direct call of the library, with the key that the task gives it."""
    k_loss = jax.random.split(key, 4)[2]
    if t is not None:
        t = t(jax.random.split(k_loss)[0])
    x = from_uint8(batch["image"])

    def apply(params, x, t, cond):
        return Linear.apply({"params": params}, x, t, cond)

    rows, aux = losses.diffusion_loss(apply, params, TABLE, "eps", x, {}, k_loss, t=t)
    return rows, aux["t"]


def gradient(before, after):
    """What sgd with rate 1 has followed."""
    return jax.tree.map(lambda a, b: np.asarray(a - b), before, after)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_the_validation_of_a_score_is_that_of_the_eps_in_it():
    """One x_t, as c x_t or as -c x_t / sigma: sigma^2 times the error of the score is the error of eps."""
    process = PROCESSES["ve"]()

    class Score(Linear):
        @staticmethod
        def apply(variables, x, t, cond, train=False, rngs=None):
            return -Linear.apply(variables, x, t, cond) / jnp.exp(t)[:, None, None, None]  # ve feeds log sigma

    params = {"denoiser": {"w": jnp.full(3, 0.2)}}
    of_score, of_eps = (
        make(process, kind=kind, network=network).validate(params, {}, BATCH, jax.random.key(1))
        for kind, network in (("score", Score), ("eps", Linear))
    )
    assert_close(of_score, of_eps, rtol=1e-4)
    assert len(of_eps) == len(diffusion.LEVELS) + 1


# --- uncertainty ---------------------------------------------------------------------------------------------------------


def test_uncertainty_is_trained_beside_the_denoiser_by_the_librarys_loss():
    task = make(uncertainty=True)
    state = task.init(jax.random.key(0))
    assert state.params["uncertainty"]["weight"].shape == (diffusion.WAVES,)
    noise = np.random.default_rng(1).normal(size=diffusion.WAVES)
    state.params["uncertainty"] = {"weight": jnp.asarray(0.1 * noise, jnp.float32)}

    def expected(params):
        rows, t = rows_and_times(params["denoiser"], step_key(state))
        u = diffusion.log_size(params["uncertainty"], t)
        return jnp.mean(losses.with_uncertainty(rows, u)), (jnp.mean(rows), jnp.mean(u))

    grads, (loss, u) = jax.grad(expected, has_aux=True)(state.params)
    after, metrics = jax.jit(task.step)(state, {}, BATCH)
    assert_close(gradient(state.params, after.params), grads, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([metrics["loss"], metrics["uncertainty"]], [loss, u], rtol=1e-5)
    assert {"grad_norm_denoiser", "grad_norm_uncertainty"} <= metrics.keys()
    moved = after.ema["100"]["uncertainty"]["weight"] != state.params["uncertainty"]["weight"]
    assert np.any(moved), "the average follows it"


def test_validation_knows_nothing_of_uncertainty():
    task, plain = make(uncertainty=True), make()
    params = task.init(jax.random.key(0)).params
    params["uncertainty"] = {"weight": jnp.ones(diffusion.WAVES)}
    a = task.validate(params, {}, BATCH, jax.random.key(1))
    assert_close(a, plain.validate({"denoiser": params["denoiser"]}, {}, BATCH, jax.random.key(1)), rtol=0)


def test_uncertainty_becomes_the_logarithm_of_the_mean_loss_at_each_time():
    params, adam = {"weight": jnp.zeros(diffusion.WAVES)}, optax.adam(0.03)

    def size(t):  # between e^-1 and e^2
        return jnp.exp(2 - 3 * t**2)

    def step(carry, key):
        params, opt = carry
        t = jax.random.uniform(key, (64,))

        def loss(params):
            return jnp.mean(losses.with_uncertainty(size(t), diffusion.log_size(params, t)))

        updates, opt = adam.update(jax.grad(loss)(params), opt)
        return (optax.apply_updates(params, updates), opt), None

    keys = jax.random.split(jax.random.key(0), 500)
    (params, _), _ = jax.jit(lambda: jax.lax.scan(step, (params, adam.init(params)), keys))()
    t = jnp.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(diffusion.log_size(params, t), jnp.log(size(t)), atol=0.1)


# --- times by loss -------------------------------------------------------------------------------------------------------


def with_history(state, spread=True):
    """The state with a history that is full, and says that the fifth level is the one to look at."""
    means = np.array([0.1, 0.2, 0.3, 0.4, 4.0]) if spread else np.ones(5)
    history = losses.LossHistory(jnp.asarray(means[:, None] * np.ones(10), jnp.float32), jnp.full(5, 10, jnp.int32))
    return state._replace(variables={diffusion.BY_LOSS: history})


def test_times_by_loss_are_drawn_and_weighed_and_recorded_as_the_library_does():
    task = make(times="loss_history")
    state = task.init(jax.random.key(0))
    assert state.variables[diffusion.BY_LOSS].losses.shape == (5, 10), "a bin for each entry of the table"
    state = with_history(state)
    history = state.variables[diffusion.BY_LOSS]
    share = []

    def draw(key):
        t, weight = losses.sample_by_loss(key, 8, history, process=TABLE)
        share.append(weight)
        return t

    def expected(params):
        rows, t = rows_and_times(params["denoiser"], step_key(state), draw)
        return jnp.mean(share[-1] * rows), (rows, t)

    grads, (rows, t) = jax.grad(expected, has_aux=True)(state.params)
    assert np.sum(np.asarray(t) == 1.0) >= 4, "most times are where the loss is large"
    after, metrics = jax.jit(task.step)(state, {}, BATCH)
    assert_close(gradient(state.params, after.params), grads, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], jnp.mean(share[-1] * rows), rtol=1e-5)
    assert all(np.ndim(value) == 0 for value in metrics.values())
    assert_close(after.variables[diffusion.BY_LOSS], losses.record_losses(history, t, rows), rtol=1e-5)


def test_until_the_history_is_full_times_are_uniform():
    task = make(times="loss_history")
    state = task.init(jax.random.key(0))
    step = jax.jit(task.step)
    for _ in range(20):
        state, _ = step(state, {}, BATCH)
    count = np.asarray(state.variables[diffusion.BY_LOSS].count)
    assert count.sum() == 160 and count.min() > 15


def test_every_part_of_an_accumulated_batch_is_recorded():
    task = make(times="loss_history", accumulate=4)
    state = with_history(task.init(jax.random.key(0)), spread=False)
    after, _ = jax.jit(task.step)(state, {}, BATCH)
    history, keys = state.variables[diffusion.BY_LOSS], jax.random.split(step_key(state), 4)
    for i in range(4):
        part = {"image": BATCH["image"][i::4]}
        rows, t = rows_and_times(
            state.params["denoiser"],
            keys[i],
            lambda key: losses.sample_by_loss(key, 2, state.variables[diffusion.BY_LOSS], process=TABLE)[0],
            part,
        )
        history = losses.record_losses(history, t, rows)
    assert_close(after.variables[diffusion.BY_LOSS], history, rtol=1e-5)


def test_a_process_without_a_table_has_bins_of_its_own():
    state = make(PROCESSES["flow"](), times="loss_history", kind="flow").init(jax.random.key(0))
    assert state.variables[diffusion.BY_LOSS].losses.shape == (diffusion.BINS, 10)
    assert make().init(jax.random.key(0)).variables == {}


@pytest.mark.parametrize(
    "block, said",
    [
        ({"times": "loss"}, "task.times is 'loss'; there are .*, loss_history$"),
        ({"times": "loss_history", "uncertainty": True}, "task.uncertainty is set: both even out"),
    ],
)
def test_what_cannot_be_is_named(block, said):
    with pytest.raises(ValueError, match=said):
        make(**block)


# --- in the loop ---------------------------------------------------------------------------------------------------------


def config(**block):
    """A run in pixels that compiles in seconds. With five levels the history is full after a few steps."""
    c = tiny.config().unlock()
    c.task = {"name": "diffusion", "prediction": "eps", "weight": "simple", "drop": 0.0, **block}
    c.process = {"name": "discrete_vp", "betas": (0.1, 0.2, 0.3, 0.4, 0.6)}
    c.model = {"name": "dit", "patch_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2}
    c.sampler.update(name="euler", steps=1)
    c.ema.half_lives = (100,)
    c.train.update(images=128, checkpoint_every=80, validate_images=8)
    return c.lock()


@pytest.mark.slow
def test_a_run_by_loss_that_is_resumed_is_bit_for_bit_the_one_never_interrupted(tmp_path, monkeypatch):
    block = {"times": "loss_history"}
    loop.train(config(**block), tmp_path / "whole", quiet=True)

    class Killed(BaseException):
        pass

    real = checkpoint.Writer.save

    def save_then_die(self, state, meta):
        real(self, state, meta)
        if int(state.step) == 10:
            raise Killed

    monkeypatch.setattr(checkpoint.Writer, "save", save_then_die)
    with pytest.raises(Killed):
        loop.train(config(**block), tmp_path / "broken", quiet=True)
    monkeypatch.undo()
    loop.train(config(**block), tmp_path / "broken", quiet=True)
    whole, broken = stored(tmp_path / "whole", 16), stored(tmp_path / "broken", 16)
    assert_same_bits(whole, broken)
    count = next(value for name, value in whole.items() if "loss_history" in name and "count" in name)
    assert count.sum() == 128 and count.min() >= 10, "times were drawn by it before the end"


@pytest.mark.slow
def test_a_run_with_uncertainty_trains_resumes_and_draws(tmp_path):
    c = config(uncertainty=True)
    with c.unlocked():
        c.train.images = 80
    result = loop.train(c, tmp_path, quiet=True)
    assert result["finished"] and np.isfinite(result["uncertainty"]) and "grad_norm_uncertainty" in result
    params = checkpoint.restore_params(tmp_path, 10, "100")
    assert np.abs(params["uncertainty"]["weight"]).max() > 0
    run = restore.restore(tmp_path)
    generate = sampling.make_generate(run.model, run.experiment.sampler)
    keys = sampling.image_keys(0, np.arange(2))
    times = sampling.make_times(run.model, run.experiment.sampler)
    images = generate(run.params, run.frozen, keys, {"label": jnp.zeros(2, jnp.int32)}, times, jnp.float32(1))
    assert images.shape == (2, 32, 32, 3)


SCRIPT = """
import jax, numpy as np
from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.kernels import mesh
from tests.training.tasks.test_diffusion import BATCH, TABLE, make
for process, kind, parts in ((TABLE, "eps", 1), (PROCESSES["flow"](), "flow", 4)):  # 5 bins lie whole on every device, 100 are split
    task, ends = make(process, rate=0.1, times="loss_history", kind=kind), []
    for devices in (1, 4):
        m = mesh.make_mesh(1, -1, 1, devices=jax.devices()[:devices])
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        shardings = mesh.tree_shardings(shapes, m, (), 10)
        state = jax.jit(task.init, out_shardings=shardings)(jax.random.key(0))
        by_row, all_of = mesh.batch_sharding(m), mesh.replicated(m)
        step = jax.jit(task.step, in_shardings=(shardings, {}, by_row), out_shardings=(shardings, all_of))
        for _ in range(16):
            state, metrics = step(state, {}, mesh.shard_batch(BATCH, m))
        ends.append(state.variables["loss_history"])
    assert len({str(s.index) for s in ends[1].losses.addressable_shards}) == parts
    one, four = jax.device_get(ends)
    assert one.count.sum() == 16 * 8 and (parts > 1 or one.count.min() >= 10)
    np.testing.assert_array_equal(one.count, four.count)
    np.testing.assert_allclose(one.losses, four.losses, rtol=1e-5)
"""


@pytest.mark.slow
def test_the_history_is_the_same_on_four_devices():
    flags = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4"}
    root = pathlib.Path(__file__).parents[3]
    out = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
