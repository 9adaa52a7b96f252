"""Averages, schedules, optimizers, keys: the arithmetic of a state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training import ema, optimizer, state


def test_an_average_forgets_half_in_its_half_life():
    emas = {"1000": {"w": jnp.array(1.0)}}
    for i in range(100):
        emas = ema.update(emas, {"w": jnp.array(0.0)}, jnp.float32(10 * i), 10, ramp=0.0)
    np.testing.assert_allclose(emas["1000"]["w"], 0.5, rtol=1e-4)


def test_the_ramp_shortens_early_averages():
    slow = ema.update({"1000000": {"w": jnp.array(1.0)}}, {"w": jnp.array(0.0)}, jnp.float32(100), 10, ramp=0.1)
    np.testing.assert_allclose(slow["1000000"]["w"], 0.5, rtol=1e-5)  # half-life 0.1 * 100 images, one step of 10


@pytest.mark.parametrize(
    "kind, images, expected",
    [
        ("constant", 0, 0.1),  # warm-up: one batch of ten
        ("constant", 500, 1.0),
        ("cosine", 100, 1.0),
        ("cosine", 550, 0.5),
        ("cosine", 1000, 0.0),
        ("linear", 550, 0.5),
        ("inverse_sqrt", 800, 0.5),
    ],
)
def test_schedules_count_images(kind, images, expected):
    rate = optimizer.make_schedule(
        1.0, schedule=kind, warmup_images=100, total_images=1000, decay_images=200, batch_size=10
    )
    np.testing.assert_allclose(rate(images // 10), expected, atol=1e-6)


@pytest.mark.parametrize("name", sorted(optimizer.OPTIMIZERS))
def test_every_optimizer_goes_down(name):
    # Muon's step has the root mean square of AdamW's, 0.2 of the rate: it wants a larger one here.
    tx, _ = optimizer.make_optimizer(
        name, learning_rate=0.3 if name == "muon" else 0.03, batch_size=1, total_images=1000, clip_norm=1.0
    )
    params = {"kernel": jnp.ones((4, 4)), "stack": {"kernel": jnp.ones((2, 4, 4))}, "bias": jnp.ones(4)}

    def loss(p):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))

    @jax.jit
    def run(params):
        def body(carry, _):
            params, opt = carry
            updates, opt = tx.update(jax.grad(loss)(params), opt, params)
            return (optax.apply_updates(params, updates), opt), None

        return jax.lax.scan(body, (params, tx.init(params)), None, length=40)[0][0]

    assert loss(run(params)) < 0.3 * loss(params)


def test_bad_optimizers_are_named():
    with pytest.raises(ValueError, match="optimizer 'adamx' is unknown"):
        optimizer.make_optimizer("adamx", learning_rate=1.0, batch_size=1, total_images=1)
    with pytest.raises(TypeError, match="b3"):
        optimizer.make_optimizer("adamw", learning_rate=1.0, batch_size=1, total_images=1, b3=0.1)
    with pytest.raises(ValueError, match="schedule 'cosin'"):
        optimizer.make_optimizer("adamw", learning_rate=1.0, batch_size=1, total_images=1, schedule="cosin")


def test_the_noise_of_a_step_is_a_function_of_the_step_alone():
    params = {"a": {"w": jnp.ones(2)}}
    s = state.create(jax.random.key(3), params, {"a": optax.sgd(0.1)}, state.Averages((10,)))
    one = state.step_key(s._replace(step=jnp.int32(5)))
    two = state.step_key(s._replace(step=jnp.int32(5), params=None))
    other = state.step_key(s._replace(step=jnp.int32(6)))
    assert jnp.array_equal(jax.random.key_data(one), jax.random.key_data(two))
    assert not jnp.array_equal(jax.random.key_data(one), jax.random.key_data(other))
