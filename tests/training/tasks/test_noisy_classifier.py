"""The classifier of noisy data: what it learns at each noise level, and the gradient with which it guides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.diffusion import guidance
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import PROCESSES, corrupt
from ldm_jax.models import MODELS
from ldm_jax.training import spaces
from ldm_jax.training.state import Averages
from ldm_jax.training.task import Context
from ldm_jax.training.tasks import noisy_classifier

NETWORK = MODELS["noisy_classifier"](
    num_classes=3, block_out_channels=(8, 16), layers_per_block=1, attention_levels=1, attention_head_dim=8, norm_num_groups=4
)  # fmt: skip
FLOW = PROCESSES["flow"]()


def make(**options):
    context = Context(
        network=NETWORK,
        batch_size=64,
        space=spaces.images(4),
        optimizer=lambda: optax.adam(1e-2),
        schedule=lambda step: 1e-2,
        averages=Averages((1000,)),
        process=FLOW,
    )
    return noisy_classifier.make(context, **options)


def colours(n):
    """Images of one colour, red, green or blue, each of which is a class."""
    label = np.random.default_rng(0).integers(0, 3, n)
    image = np.full((n, 4, 4, 3), 64, np.uint8)
    image[np.arange(n), ..., label] = 192
    return {"image": image, "label": label.astype(np.int32)}


def test_it_names_the_class_the_better_the_less_noise_there_is():
    task, batch = make(), colours(64)
    step, state = jax.jit(task.step), jax.jit(task.init)(jax.random.key(0))
    losses = []
    for _ in range(40):
        state, metrics = step(state, task.frozen, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], np.log(3), rtol=1e-4, err_msg="it begins without an opinion")
    rows = jax.jit(task.validate)(state.params, task.frozen, batch, jax.random.key(1))
    assert {value.shape for value in rows.values()} == {(64,)}
    accuracy = [float(np.mean(rows[f"val_accuracy/t{level}"])) for level in noisy_classifier.LEVELS]
    assert accuracy[0] > 0.95 and accuracy[0] >= accuracy[2] >= accuracy[4], accuracy
    np.testing.assert_allclose(np.mean(rows["val_accuracy"]), np.mean(accuracy), rtol=1e-5)
    assert np.mean(rows["val_loss/t0.1"]) < np.mean(rows["val_loss"]) < np.mean(rows["val_loss/t0.9"])


class Posterior:
    """log p(y | x_t) of two points -m and m with the noise of a flow: logits +-alpha m x_t / sigma^2, summed over the channels."""

    m = 0.7

    @classmethod
    def apply(cls, variables, x, t):
        t = t / FLOW.time_input(1.0)
        x_t = x * jnp.sqrt((1 - t) ** 2 + t**2)[:, None]  # the task scales it
        half = jnp.sum(x_t, 1) * (1 - t) * cls.m / t**2
        return jnp.stack([-half, half], -1)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guidance_by_the_exact_posterior_is_the_exact_conditional_denoiser(scale):
    """Without a condition E[x | x_t] = m tanh(alpha m x_t / sigma^2) in one dimension; with y it is +-m."""
    t, label = jnp.asarray([0.5, 0.7, 0.9]), jnp.asarray([0, 1, 1])
    x_t = jnp.asarray([[0.3], [-0.2], [0.5]])

    def denoise(x_t, t):
        x = Posterior.m * jnp.tanh((1 - t)[:, None] * Posterior.m * x_t / t[:, None] ** 2)
        return Clean(x, (x_t - (1 - t)[:, None] * x) / t[:, None])

    log_prob = noisy_classifier.log_prob(Posterior, None, FLOW, label)
    np.testing.assert_allclose(
        jnp.exp(log_prob(x_t, t)) + jnp.exp(noisy_classifier.log_prob(Posterior, None, FLOW, 1 - label)(x_t, t)),
        1,
        rtol=1e-6,
    )
    guided = guidance.classifier(denoise, log_prob, FLOW, scale)(x_t, t)
    expected = Posterior.m * (2.0 * label[:, None] - 1) if scale else denoise(x_t, t).x
    np.testing.assert_allclose(guided.x, expected, rtol=1e-4)
    np.testing.assert_allclose(corrupt(FLOW, guided.x, guided.eps, t), x_t, atol=1e-5)


def test_the_network_sees_data_of_one_size_and_the_time():
    class Spy:
        @staticmethod
        def apply(variables, x, t):
            seen.append((float(jnp.std(x)), t))
            return jnp.zeros((len(x), 2))

    seen, key = [], jax.random.key(0)
    for name, t in (("vp_linear", 0.5), ("ve", 0.9), ("edm", 0.7)):
        process = PROCESSES[name]()
        x = process.sigma_data * jax.random.normal(key, (4, 32, 32, 3))
        t = jnp.full(4, t)
        x_t = corrupt(process, x, jax.random.normal(jax.random.key(1), x.shape), t)
        noisy_classifier.logits(Spy, None, process, x_t, t)
        assert abs(seen[-1][0] - 1) < 0.03, name
        np.testing.assert_allclose(seen[-1][1], process.time_input(t))


def test_what_is_off_is_named():
    with pytest.raises(ValueError, match=r"task\.times is 'sometimes'; there are uniform"):
        make(times="sometimes")
    context = Context(network=NETWORK.clone(in_channels=4), space=spaces.images(4), process=FLOW)
    with pytest.raises(ValueError, match=r"config\.model\.in_channels=4, but what is classified has shape \(4, 4, 3\)"):
        noisy_classifier.make(context)
