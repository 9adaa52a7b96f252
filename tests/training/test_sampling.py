"""From noise to images: the end of the grid, guidance, and options of samplers, grids and guidances by name."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import guidance
from ldm_jax.diffusion.denoiser import make_denoiser, make_pair
from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.sampling.settings import NEUTRAL, Guidance, guide
from ldm_jax.training import conditions, experiment, sampling
from ldm_jax.training.conditioning import Conditioning
from ldm_jax.training.task import Context

POINT = 0.3


def model(name):
    """The exact network of a distribution that is one point."""

    class Net:
        @staticmethod
        def apply(variables, x, t, cond):
            return jnp.full_like(x, POINT)

    return sampling.Model(Net, Conditioning(), None, PROCESSES[name](), "x", (2, 2, 3))


def draw(model, **settings):
    settings = sampling.Settings(**{"name": "euler", "steps": 8, **settings})
    generate = jax.jit(sampling.make_generate(model, settings))
    keys = sampling.image_keys(0, np.arange(3))
    times = sampling.make_times(model, settings)
    return np.asarray(generate({"denoiser": {}}, {}, keys, {}, times, jnp.float32(1)))


@pytest.mark.parametrize("name", ["vp_linear", "ve", "edm"])
def test_an_image_holds_no_noise_where_the_grid_ends_early(name):
    np.testing.assert_allclose(draw(model(name)), POINT, atol=1e-4)


def test_options_reach_the_sampler_and_the_grid():
    plain, noisy = (draw(model("vp_linear"), name="ddim", options=o) for o in ({}, {"eta": 1.0}))
    assert np.abs(plain - noisy).max() < 1e-4  # one point: both end there
    # Where the network halves what it sees, another path ends elsewhere.
    halved = model("vp_linear")
    halved.denoiser.apply = staticmethod(lambda variables, x, t, cond: 0.5 * x)
    plain, noisy = (draw(halved, name="ddim", options=o) for o in ({}, {"eta": 1.0}))
    assert np.abs(plain - noisy).max() > 1e-2
    m = model("edm")
    grids = [sampling.make_times(m, sampling.Settings(grid="karras", grid_options=o)) for o in ({}, {"rho": 3.0})]
    assert np.abs(grids[0] - grids[1]).max() > 1e-3


def told(x, t, label):
    """A network without parameters, of the kind 'v'."""
    label = label.astype(jnp.float32).reshape(-1, 1, 1, 1)
    return jnp.tanh(x * (0.5 + 0.3 * label) + 0.4 * label) * (1 + 0.1 * t.reshape(-1, 1, 1, 1))


LABEL_OF_2 = conditions.make(Context(num_classes=2), {"label": {}})


class Told:
    @staticmethod
    def apply(variables, x, t, cond):
        return told(x, t, cond["label"])


LABELLED = sampling.Model(Told, LABEL_OF_2, None, PROCESSES["vp_linear"](), "v", (2, 2, 3))
LABELS = jnp.asarray([0, 1, 1])


VP = LABELLED.process


def apply(params, x, t, cond):
    return told(x, t, cond["label"])


def estimates():
    """(pair, plain) of the network."""
    cond = {"label": LABELS}
    return make_pair(apply, {}, VP, "v", cond, {"label": jnp.full(3, 2)}), make_denoiser(apply, {}, VP, "v", cond)


def by_hand(make):
    """scale -> images by the library's own calls; make(pair, scale, plain) -> Denoiser."""

    @jax.jit
    def images(scale):
        pair, plain = estimates()
        denoise = make(pair, scale, plain)
        keys = sampling.image_keys(0, np.arange(3))
        noise = jnp.stack([jax.random.normal(jax.random.fold_in(k, 0), (2, 2, 3)) for k in keys])
        step_keys = jnp.stack([jax.random.fold_in(k, 1) for k in keys])
        times = sampling.make_times(LABELLED, sampling.Settings(steps=4))
        # alpha^2 + sigma^2 = 1: the noise is x_T as it is.
        return denoise(sample(SAMPLERS["ddim"](eta=0.5), denoise, VP, noise, times, step_keys), times[-1]).x

    return images


# Settings, and the same guidance as a call of diffusion.guidance.
METHODS = {
    "plain": ({"guidance": 1.0}, lambda pair, w, plain: plain),
    "cfg": ({}, lambda pair, w, plain: guidance.cfg(pair, w)),
    "interval": (
        {"t_lo": 0.2, "t_hi": 0.8, "rescale": 0.7},
        lambda pair, w, plain: guidance.cfg(pair, w, 0.2, 0.8, rescale=0.7),
    ),
    "cfg_pp": ({"guidance_method": "cfg_pp"}, lambda pair, w, plain: guidance.cfg_pp(pair, w)),
    "cfg_pp at scale 1": (
        {"guidance": 1.0, "guidance_method": "cfg_pp"},
        lambda pair, w, plain: guidance.cfg_pp(pair, w),
    ),
    "cfg_zero": (
        {"guidance_method": "cfg_zero", "rescale": 0.3},
        lambda pair, w, plain: guidance.cfg_zero(pair, w, VP, kind="v", rescale=0.3),
    ),
    "cfg_zero's own kind": (
        {"guidance_method": "cfg_zero", "guidance_options": {"kind": "eps", "t_zero": 2.0}},
        lambda pair, w, plain: guidance.cfg_zero(pair, w, VP, 2.0, kind="eps"),
    ),
    "apg": (
        {"guidance_method": "apg", "guidance_options": {"eta": 0.25, "threshold": 0.5}, "t_hi": 0.9},
        lambda pair, w, plain: guidance.apg(pair, w, 0.25, 0.5, t_hi=0.9),
    ),
    "a schedule": (
        {"guidance_schedule": "cosine", "schedule_options": {"floor": 0.5}},
        lambda pair, w, plain: guidance.cfg(pair, guidance.dynamic(w, "cosine", 0.5)),
    ),
    "a schedule of CFG++": (
        {"guidance_method": "cfg_pp", "guidance_schedule": "powered_cosine", "schedule_options": {"power": 2.0}},
        lambda pair, w, plain: guidance.cfg_pp(pair, guidance.dynamic(w, guidance.powered_cosine(2.0), neutral=0.0)),
    ),
    "static": (
        {"threshold": "static", "threshold_options": {"low": -0.4}},
        lambda pair, w, plain: guidance.static_threshold(guidance.cfg(pair, w), VP, low=-0.4),
    ),
    "dynamic, unguided": (
        {"guidance": 1.0, "threshold": "dynamic", "threshold_options": {"percentile": 0.8, "floor": 0.3}},
        lambda pair, w, plain: guidance.dynamic_threshold(plain, VP, 0.8, 0.3),
    ),
}


@functools.cache
def unguided():
    return by_hand(lambda pair, w, plain: plain)(1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_guidance_named_in_the_settings_is_that_of_the_library(name):
    more, make = METHODS[name]
    settings = sampling.Settings(**{"name": "ddim", "steps": 4, "options": {"eta": 0.5}, "guidance": 3.0, **more})
    generate = jax.jit(sampling.make_generate(LABELLED, settings))
    keys, times, theirs = sampling.image_keys(0, np.arange(3)), sampling.make_times(LABELLED, settings), by_hand(make)
    for scale in (0.7, settings.guidance):  # an argument of the one compiled program
        ours = generate({"denoiser": {}}, {}, keys, {"label": LABELS}, times, jnp.float32(scale))
        np.testing.assert_allclose(ours, theirs(scale), rtol=2e-5, atol=2e-5)
    assert name == "plain" or np.abs(ours - unguided()).max() > 1e-2
    assert generate._cache_size() == 1


def test_every_method_needs_no_more_than_a_pair_and_scale_1_is_what_it_says():
    x_t, t = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 3)), jnp.float32), jnp.float32(0.6)
    pair, _ = estimates()
    for name, neutral in NEUTRAL.items():
        clean = guide(Guidance(name), pair, neutral, VP, "v")(x_t, t)
        np.testing.assert_allclose(clean.x, pair(x_t, t)[1 if name == "cfg_pp" else 0].x, atol=1e-5)


STAGE = object()


@pytest.mark.parametrize(
    "model, settings, said",
    [
        (model("ve"), {"guidance_method": "apg"}, "guidance method 'apg' needs a condition"),
        (model("flow")._replace(prediction="eps"), {}, "prediction is eps, and there is nothing but noise at t = 1"),
        (model("vp_cosine")._replace(prediction="score"), {"grid_options": {"start": 1.0}}, "prediction is score, and"),
        (model("ve")._replace(stage=STAGE), {"threshold": "dynamic"}, "this model draws latents"),
        (model("ve"), {"guidance_options": {"channels": 4}}, "guidance on 4 channels; the model has 3"),
    ],
)
def test_settings_that_do_not_fit_the_model(model, settings, said):
    with pytest.raises(ValueError, match=said):
        sampling.make_generate(model, sampling.Settings(**settings))


def test_a_run_from_before_a_key_of_the_sampler_has_its_default(tmp_path):
    old = {"name": "ddim", "options": {"eta": 1.0}, "steps": 7, "grid": "uniform", "grid_options": {}, "guidance": 2.0}
    old |= {"t_lo": 0.0, "t_hi": 1.0, "rescale": 0.5, "batch_size": 4}
    (tmp_path / "config.json").write_text(json.dumps({"task": {"name": "diffusion"}, "sampler": old}))
    settings = experiment.of_run(tmp_path).sampler
    assert settings == sampling.Settings("ddim", 7, guidance=2.0, rescale=0.5, options={"eta": 1.0})
    assert settings.guidance_method == "cfg" and settings.threshold == "none"
