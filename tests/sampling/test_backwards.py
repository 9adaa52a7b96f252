"""Noise backwards for data of any rank, guided by another network as well, in batches that change no row."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import guidance
from ldm_jax.diffusion.exact import Gaussian
from ldm_jax.diffusion.grids import uniform
from ldm_jax.diffusion.process import vp_linear
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.sampling import keys
from ldm_jax.sampling.draw import Plan, draw
from ldm_jax.sampling.model import Model
from ldm_jax.sampling.settings import Rule

PROCESS = vp_linear()
EXACT = Gaussian(np.full(2, 0.4), np.full(2, 0.5), np.eye(2)).denoiser(PROCESS)


def apply(params, x_t, t, cond):
    """A network that predicts x, exact for Gaussian data; the process hands it 999 t."""
    return params * EXACT(x_t, t / 999).x


def toward(denoise, params, cond):
    """Guidance by log p(y | x_t) = -|x_t - y|^2 / 2."""
    y = cond["y"]
    return guidance.classifier(denoise, lambda x, t: -0.5 * jnp.sum((x - y) ** 2, (1, 2)), PROCESS, 2.0)


def test_sound_is_drawn_as_images_are_and_a_transform_acts_on_the_estimate():
    """Rows of two axes [n, C], by a stochastic sampler, beside the same made by hand."""
    model, count = Model(apply, PROCESS, "x", transforms=(toward,)), 5
    rows = keys.numbered(3, count)
    x, y = keys.noise(rows, (7, 2)), jnp.linspace(-1, 1, count)[:, None, None] * jnp.ones((count, 7, 2))
    times = np.asarray(uniform(PROCESS, 6))
    options = {"conds": [{"y": y}], "batch_size": 2}
    drawn = draw(Plan(model, Rule("euler_ancestral")), jnp.float32(1), x, times, keys.step_keys(rows), **options)
    assert drawn.shape == (count, 7, 2)

    def network(x_t, t):
        return EXACT(x_t, t)

    denoise = toward(network, None, {"y": y})
    by_hand = sample(
        SAMPLERS["euler_ancestral"](), denoise, PROCESS, x, jnp.asarray(times, jnp.float32), keys.step_keys(rows)
    )
    np.testing.assert_allclose(drawn, by_hand, atol=2e-4)
    plain = draw(
        Plan(model._replace(transforms=()), Rule("euler_ancestral")),
        jnp.float32(1),
        x,
        times,
        keys.step_keys(rows),
        **options,
    )
    assert np.abs(plain - drawn).max() > 0.1


def test_what_ticks_is_every_call_of_the_denoiser(monkeypatch):
    from ldm_jax.sampling import draw as drawing

    seen = []
    monkeypatch.setattr(drawing, "tqdm", lambda **options: Bar(seen, options))
    rows = keys.numbered(0, 3)
    plan = Plan(Model(apply, PROCESS, "x"), Rule("heun"))
    x = keys.noise(rows, (4, 2))
    draw(plan, jnp.float32(1), x, uniform(PROCESS, 3), rows, [{}], batch_size=2, quiet=False)
    jax.effects_barrier()
    assert seen[0]["total"] == 3 * 2 * 2 == seen.count("tick")


class Bar:
    def __init__(self, seen, options):
        self.seen = seen
        seen.append(options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def update(self):
        self.seen.append("tick")
