"""One step: gradients in parts, variables, players that move together or in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.training.state import Averages, create, step_key
from ldm_jax.training.step import accumulated, make_step, merged, value_and_grad
from ldm_jax.training.task import Context

X, Y = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)
CONTEXT = Context(batch_size=12, averages=Averages((10,)), schedule=lambda step: 0.5)


def quadratic(params, state, frozen, batch, key):
    del frozen, key
    rows = jnp.mean(jnp.square(batch["x"] @ params["w"] - batch["y"]), 1)
    variables = {
        "seen": state.variables["seen"] + len(rows),
        "mean": 0.9 * state.variables["mean"] + 0.1 * jnp.mean(rows),
    }
    return jnp.mean(rows), {"loss": jnp.mean(rows), "rows": rows}, variables


def test_accumulated_gradients_are_those_of_the_whole_batch():
    params, batch = {"w": jnp.ones((3, 3))}, {"x": X, "y": Y}
    state = create(jax.random.key(0), params, {}, Averages(), {"seen": jnp.zeros(()), "mean": jnp.zeros(())})
    key, grad = jax.random.key(0), value_and_grad(quadratic)
    (whole, m1, v1), (parts, m2, v2) = (accumulated(grad, n)(params, state, None, batch, key) for n in (1, 4))
    np.testing.assert_allclose(whole["w"], parts["w"], rtol=1e-5)
    np.testing.assert_allclose(m1["loss"], m2["loss"], rtol=1e-6)
    np.testing.assert_allclose(m1["rows"].reshape(3, 4).T.ravel(), m2["rows"], rtol=1e-5)
    assert v1["seen"] == v2["seen"] == 12, "variables go from part to part"
    means = np.asarray(m2["rows"]).reshape(4, 3).mean(1)
    np.testing.assert_allclose(v2["mean"], sum(0.1 * 0.9**i * m for i, m in enumerate(means[::-1])), rtol=1e-5)


def test_finish_sees_every_row_and_sets_parameters_in_the_averages_too():
    tx = {
        "net": optax.partition({"moves": optax.sgd(0.5), "still": optax.set_to_zero()}, {"w": "moves", "book": "still"})
    }

    def loss(params, state, frozen, batch, key):
        total, metrics, _ = quadratic(params["net"], state, frozen, batch, key)
        return total, metrics, {}

    def finish(state, rows, key):
        assert rows.keys() == {"rows"} and rows["rows"].shape == (12,)
        return {"seen": jnp.sum(rows["rows"])}, {"net": {"book": state.params["net"]["book"] + 1.0}}

    state = create(
        jax.random.key(0),
        {"net": {"w": jnp.ones((3, 3)), "book": jnp.zeros(2)}},
        tx,
        Averages((10,)),
        {"seen": jnp.zeros(()), "mean": jnp.float32(7.0)},
    )
    step = make_step(CONTEXT._replace(accumulate=3), value_and_grad(loss), tx, finish)
    after, metrics = jax.jit(step)(state, None, {"x": X, "y": Y})
    assert set(metrics) == {"loss", "learning_rate", "grad_norm"}
    np.testing.assert_allclose(after.variables["seen"] / 12, metrics["loss"], rtol=1e-5)
    assert after.variables["mean"] == 7.0, "what is not named stays"
    assert after.params["net"]["book"].tolist() == after.ema["10"]["net"]["book"].tolist() == [1.0, 1.0]
    average, moved = after.ema["10"]["net"]["w"], after.params["net"]["w"]
    assert np.all((average - 1.0) * (moved - average) > 0), "an average is between the parameters before and after"


def test_a_loss_reads_the_averages_and_the_step():
    """As a consistency target does."""

    def loss(params, state, frozen, batch, key):
        target = state.ema["10"]["a"]["w"] + state.step
        error = jnp.sum(jnp.square(params["a"]["w"] - jax.lax.stop_gradient(target)))
        return 0.5 * error, {"loss": error}, {}

    tx = {"a": optax.sgd(1.0)}
    state = create(jax.random.key(0), {"a": {"w": jnp.ones(2)}}, tx, Averages((10,)))
    state = state._replace(step=jnp.int32(3), ema={"10": {"a": {"w": 5 * jnp.ones(2)}}})
    after, _ = jax.jit(make_step(CONTEXT, value_and_grad(loss), tx))(state, None, {})
    assert after.params["a"]["w"].tolist() == [8.0, 8.0] and after.step == 4


def test_two_players_move_together_or_in_turn():
    """g minimizes g c, the critic minimizes -g c, each with a rate of 0.5 from g = c = 1."""

    def player(name, sign):
        def grad(params, state, frozen, batch, key):
            value, grads = jax.value_and_grad(lambda moved: sign * jnp.prod(jnp.stack([*(params | moved).values()])))(
                {name: params[name]}
            )
            return grads, {f"loss_{name}": value}, {f"key_{name}": jax.random.key_data(key)}

        return grad

    generator, critic = player("g", 1.0), player("c", -1.0)

    def both(*args):
        one, other = generator(*args), critic(*args)
        return tuple(a | b for a, b in zip(one, other))

    tx = {name: optax.sgd(0.5) for name in ("g", "c")}
    state = create(jax.random.key(0), {"g": jnp.ones(()), "c": jnp.ones(())}, tx, Averages((10,)))
    for turns, c, g in ((both, 1.5, 0.5), ((critic, generator), 1.5, 0.25), ((critic, critic, generator), 2.0, 0.0)):
        after, metrics = jax.jit(make_step(CONTEXT, turns, tx))(state, None, {})
        assert (after.params["c"], after.params["g"], after.step) == (c, g, 1)
        assert {"grad_norm_g", "grad_norm_c", "loss_g", "loss_c"} <= metrics.keys()
        same_key = np.array_equal(after.variables["key_g"], after.variables["key_c"])
        assert same_key == (turns is both), "each turn has its noise"
    first = jax.random.key_data(step_key(state))
    assert np.array_equal(jax.jit(make_step(CONTEXT, both, tx))(state, None, {})[0].variables["key_g"], first)


def test_a_part_of_a_tree_is_replaced():
    tree = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merged(tree, {"a": {"y": 5}}) == {"a": {"x": 1, "y": 5}, "b": 3}
    assert tree["a"]["y"] == 2
