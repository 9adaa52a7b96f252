"""A run that a classifier guides: with exact networks it draws the class that is asked for; what does not fit is named."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.evaluation import generate
from ldm_jax.sampling.model import to_uint8
from ldm_jax.training import classifier_guidance, conditions, drawable, facts, restore, sampling
from ldm_jax.training.task import Context

FLOW, POINT, SHAPE = PROCESSES["flow"](), 0.6, (2, 2, 3)
SETTINGS = sampling.Settings(name="heun", steps=8)


def half_logit(x_t, t):
    """Of data that is -POINT or POINT everywhere, with the noise of a flow: E[x | x_t] = POINT tanh(h), p(1 | x_t) = sigmoid(2 h)."""
    return POINT * (1 - t) * jnp.sum(x_t, (1, 2, 3)) / t**2


class Denoiser:
    """Knows no classes."""

    @staticmethod
    def apply(variables, x, t, cond):
        assert not cond, "the class is the classifier's business"
        return jnp.ones_like(x) * POINT * jnp.tanh(half_logit(x, t / FLOW.time_input(1.0)))[:, None, None, None]


class Labelled:
    """Knows the classes 0 and 1, and the null class."""

    @staticmethod
    def apply(variables, x, t, cond):
        unconditional = Denoiser.apply(variables, x, t, {})
        y = cond["label"][:, None, None, None]
        return jnp.where(y == 2, unconditional, POINT * (2.0 * y - 1))


class Posterior:
    """The exact classifier, where params are 1."""

    num_classes = 2

    @staticmethod
    def apply(variables, x, t):
        t = t / FLOW.time_input(1.0)
        x_t = x * jnp.sqrt((1 - t) ** 2 + t**2)[:, None, None, None]  # the task scales it
        h = half_logit(x_t, t) * variables["params"]
        return jnp.stack([-h, h], -1)


EXPERIMENT = types.SimpleNamespace(
    network=Posterior,
    process=FLOW,
    record={"process": {"name": "flow"}},
    input=types.SimpleNamespace(resolution=2),
)
CLASSIFIER = classifier_guidance.Classifier("DIR", EXPERIMENT, jnp.float32(1), {}, "sha")


def run(denoiser=Denoiser, classes=0):
    takes = conditions.make(Context(num_classes=classes), {"label": {}} if classes else {})
    model = sampling.Model(denoiser, takes, None, FLOW, "x", SHAPE)
    return restore.Restored(EXPERIMENT, model, {"denoiser": {}}, {}, 1, "", {"class_names": ["low", "high"]})


def drawn(run, settings=SETTINGS, labels=(1, 0), count=8, seed=0):
    what = generate.asked(run, count, labels)
    shared = {"count": count, "seed": seed, "tokenizer": None, "batch_size": 4, "quiet": True}
    return np.concatenate([*generate.draw(run, settings, what, **shared)])


def asked_for(labels):
    return np.broadcast_to(to_uint8(POINT * (2.0 * np.asarray(labels) - 1))[:, None, None, None], (len(labels), *SHAPE))


def test_the_classifier_alone_says_what_a_denoiser_without_classes_draws():
    plain = drawn(run(), labels=())
    assert len(np.unique(plain.reshape(8, -1), axis=0)) > 1, "without it either class is drawn"
    off = classifier_guidance.guided(run(), CLASSIFIER, 0.0)
    np.testing.assert_array_equal(drawn(off), plain)
    assert off.model.classifier(plain, {}, {}) is plain, "no classifier is computed at scale 0"
    by_turns = drawn(classifier_guidance.guided(run(), CLASSIFIER, 1.0))
    np.testing.assert_array_equal(by_turns, asked_for([1, 0] * 4))
    in_turn = drawn(classifier_guidance.guided(run(), CLASSIFIER, 1.0), labels=())
    np.testing.assert_array_equal(in_turn, asked_for([0, 1] * 4), err_msg="every class in turn unless labels are given")


def test_guidance_zero_draws_the_null_class_which_the_classifier_guides():
    labelled, null = run(Labelled, 2), SETTINGS._replace(guidance=0.0)
    np.testing.assert_array_equal(drawn(labelled, null), drawn(run(), labels=()))
    np.testing.assert_array_equal(drawn(labelled), asked_for([1, 0] * 4), err_msg="its labels do without")
    np.testing.assert_array_equal(
        drawn(classifier_guidance.guided(labelled, CLASSIFIER, 1.0), null), asked_for([1, 0] * 4)
    )


def test_one_compiled_program_serves_every_scale_and_every_classifier():
    guided = [classifier_guidance.guided(run(), CLASSIFIER, scale) for scale in (1.0, 0.02)]
    guided.append(classifier_guidance.guided(run(), CLASSIFIER._replace(params=jnp.float32(0)), 1.0))
    assert guided[0].model == guided[1].model == guided[2].model
    compiled = jax.jit(sampling.make_generate(guided[0].model, SETTINGS))
    keys, labels = sampling.image_keys(0, np.arange(4)), jnp.asarray([1, 0, 1, 0])
    times = sampling.make_times(guided[0].model, SETTINGS)
    strong, weak, blind = (
        np.asarray(compiled(one.params, {}, keys, {"label": labels}, times, jnp.float32(1))) for one in guided
    )
    assert compiled._cache_size() == 1
    assert np.abs(strong - weak).max() > 0.1, "a scale that is near zero"
    off = classifier_guidance.guided(run(), CLASSIFIER, 0.0)
    plain = jax.jit(sampling.make_generate(off.model, SETTINGS))(
        off.params, {}, keys, {"label": labels}, times, jnp.float32(1)
    )
    np.testing.assert_allclose(blind, plain, atol=1e-5, err_msg="a classifier without an opinion changes nothing")


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_pipelines_draw_what_ldm_sample_draws(guidance):
    guided = classifier_guidance.guided(run(Labelled, 2), CLASSIFIER, 1.0)
    pipeline, settings = _pipeline(guided), SETTINGS._replace(guidance=guidance)
    images = pipeline.draw(4, [1, 0], steps=8, guidance=guidance, sampler="heun")
    np.testing.assert_allclose(images, drawn(guided, settings, count=4) / 255, atol=1.01 / 255)


def test_inversion_is_not_guided():
    labels = [1, 0]
    pictures = np.random.default_rng(0).uniform(0, 1, (2, *SHAPE)).astype(np.float32)
    there = {"images": pictures, "labels": labels, "num": 2, "steps": 4}
    plain, guided = (
        _pipeline(one, grid_options={"end": 0.1}).invert(None, **there)  # at 0 the eps of a point is not finite
        for one in (run(Labelled, 2), classifier_guidance.guided(run(Labelled, 2), CLASSIFIER, 3.0))
    )
    assert np.isfinite(plain).all()
    np.testing.assert_array_equal(plain, guided)


def _pipeline(run, **settings):
    experiment = types.SimpleNamespace(
        tokenizer=None, sampler=SETTINGS._replace(**settings), input=types.SimpleNamespace(resolution=SHAPE[0])
    )
    return drawable.pipeline(run._replace(experiment=experiment), "run")


STAGE = {facts.FIRST_STAGE: "0123456789abcdef", facts.MEAN: [0.0], facts.STD: [1.0]}


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"process": PROCESSES["vp_cosine"](), "record": {"process": {"name": "vp_cosine"}}},
            r"--classifier=DIR was trained with config\.process \{'name': 'vp_cosine'\}; expected that of the run, "
            r"\{'name': 'flow'\}",
        ),
        ({"input": types.SimpleNamespace(resolution=4)}, "trained on images of 4 pixels; the run draws 2"),
        ({"network": types.SimpleNamespace(num_classes=3)}, "names 3 classes; the run has 2"),
        ({"facts": STAGE}, "was trained on latents 0123456789ab; the run draws pixels: expected one first stage"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    stated = change.pop("facts", {})
    other = types.SimpleNamespace(**(vars(EXPERIMENT) | change))
    with pytest.raises(ValueError, match=said):
        classifier_guidance.check(run(Labelled, 2), CLASSIFIER._replace(experiment=other, facts=stated))
    classifier_guidance.check(run(Labelled, 2), CLASSIFIER)


def test_latents_are_those_of_one_first_stage_with_one_whitening(monkeypatch):
    now = {**STAGE, facts.MEAN: [0.5]}
    monkeypatch.setattr(classifier_guidance.open_stage, "facts_of", lambda stage: now)
    classifier_guidance.check(run(), CLASSIFIER._replace(facts=dict(now)))
    for stated, said in (
        (STAGE, "another whitening mean"),
        (
            {**now, facts.FIRST_STAGE: "f" * 64},
            "was trained on latents ffffffffffff; the run draws latents 0123456789ab",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            classifier_guidance.check(run(), CLASSIFIER._replace(facts=stated))
