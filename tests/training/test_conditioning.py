"""Conditions: what a dropped row has, which rows are dropped, what several give together, and what a network does not take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import MODELS
from ldm_jax.training import conditioning, conditions
from ldm_jax.training.conditioning import Condition, Conditioning
from ldm_jax.training.task import Context

KEY = jax.random.key(0)


class Text:
    """A text encoder whose states are the tokens themselves."""

    def init(self, key, tokens):
        return {"params": {"key": jax.random.key_data(key)}}

    def apply(self, variables, tokens):
        return {"text": tokens[..., None], "text_mask": tokens != 0}


class Tokenizer:
    @staticmethod
    def encode(text):
        return np.array([1, 2, 0], np.int32)


CONTEXT = Context(num_classes=4, text=Text(), tokenizer=Tokenizer())
BATCH = {"label": jnp.array([0, 1, 2]), "tokens": jnp.full((3, 3), 7)}


def made(**blocks):
    return conditions.make(CONTEXT, blocks)


def test_dropped_rows_have_the_null_class_and_the_empty_caption():
    takes = made(text={}, label={})
    keys = jax.random.split(KEY, 3)
    values = conditioning.read(takes, {}, BATCH, keys)
    where = jnp.array([True, False, True])
    some = conditioning.dropped(takes, values, {"label": where, "text": where})
    cond = conditioning.encode(takes, {"text": {}}, {}, some)
    assert cond["label"].tolist() == [4, 1, 4]
    assert cond["text"][..., 0].tolist() == [[1, 2, 0], [7, 7, 7], [1, 2, 0]]
    kept = conditioning.complete(takes, {"text": {}}, {}, BATCH, keys)
    assert kept["label"].tolist() == [0, 1, 2] and kept["text"].min() == 7
    away = conditioning.encode(takes, {"text": {}}, {}, conditioning.away(takes, values))
    assert away["label"].tolist() == [4, 4, 4] and away["text"][1, :, 0].tolist() == [1, 2, 0]
    assert takes.num_classes == 4 and takes.takes == {"labels", "prompts"} and not takes.rows
    # The text encoder's parameters come from the key itself, as those of runs from before there were others.
    np.testing.assert_array_equal(conditioning.init(takes, KEY)["text"]["key"], jax.random.key_data(KEY))


def test_conditions_are_dropped_together_or_each_by_itself():
    rows = 4000
    together = conditioning.drops(made(text={}, label={}), KEY, 0.3, rows)
    # As they were when there was one probability alone.
    expected = jax.random.bernoulli(KEY, 0.3, (rows,))
    assert all(np.array_equal(together[name], expected) for name in ("text", "label"))
    mixed = conditioning.drops(made(text={}, label={"drop": 0.2}), KEY, 0.3, rows)
    np.testing.assert_array_equal(mixed["text"], expected)
    label = np.asarray(mixed["label"])
    for mean, p in ((label.mean(), 0.2), ((label & np.asarray(expected)).mean(), 0.06)):
        assert abs(mean - p) < 4 * (p * (1 - p) / rows) ** 0.5, "its own probability, and independent of the others"
    assert not conditioning.drops(made(label={"drop": 0.0}), KEY, 0.3, rows)
    assert set(conditioning.drops(made(text={}, label={"drop": 0.2}), KEY, 0.0, rows)) == {"label"}
    # Row i does not depend on how many rows there are.
    np.testing.assert_array_equal(conditioning.drops(made(label={"drop": 0.2}), KEY, 0.0, 8)["label"], label[:8])


def test_what_is_never_dropped_is_kept_in_what_is_guided_away_from():
    takes = made(text={}, label={"drop": 0.0})
    values = conditioning.read(takes, {}, BATCH, jax.random.split(KEY, 3))
    away = conditioning.away(takes, values)
    assert away["label"].tolist() == [0, 1, 2] and away["text"][0].tolist() == [1, 2, 0]
    assert conditioning.conditional(takes) and not conditioning.conditional(made(label={"drop": 0.0}))


def constant(name, **entries):
    """A condition whose entries are these, whatever the batch is."""
    return Condition(
        name,
        read=lambda frozen, batch, keys: jnp.zeros(len(keys)),
        encode=lambda params, frozen, value: {
            key: jnp.broadcast_to(jnp.asarray(e), (len(value), *np.shape(e))) for key, e in entries.items()
        },
        null=np.float32(0),
    )


def test_text_and_channels_of_several_conditions_are_joined_in_order():
    takes = Conditioning(
        (
            constant("a", text=np.ones((2, 5), "f4"), channels=np.zeros((4, 4, 1), "f4")),
            constant("b", text=2 * np.ones((1, 5), "f4"), text_mask=np.array([False]), label=np.int32(3)),
            constant("c", channels=np.ones((4, 4, 2), "f4")),
        )
    )
    cond = conditioning.complete(takes, {}, {}, {}, jax.random.split(KEY, 3))
    assert cond["text"][0, :, 0].tolist() == [1, 1, 2] and cond["text_mask"][0].tolist() == [True, True, False]
    assert cond["channels"][0, 0, 0].tolist() == [0, 1, 1] and cond["label"].tolist() == [3, 3, 3]
    shapes = conditioning.entries(takes, {})
    assert conditioning.channels(shapes) == {"a": 1, "c": 2}
    with pytest.raises(ValueError, match=r"config\.condition\.b and config\.condition\.d both give cond\['label'\]"):
        more = conditioning.entries(Conditioning((*takes.conditions, constant("d", label=np.int32(1)))), {})
        conditioning.check(more, None, "dit")


@pytest.mark.parametrize(
    "entries, said",
    [
        ({"label": np.int32(0)}, r"gives cond\['label'\], which config\.model \(dit\) does not take; it takes text"),
        ({"text": np.ones((2, 5), "f4")}, r"gives cond\['text'\] of width 5; config\.model \(dit\) takes 8"),
    ],
)
def test_an_entry_that_the_network_does_not_take_is_named(entries, said):
    with pytest.raises(ValueError, match=r"config\.condition\.mine " + said):
        network = MODELS["dit"](text_dim=8)
        conditioning.check(conditioning.entries(Conditioning((constant("mine", **entries),)), {}), network, "dit")
    conditioning.check(
        conditioning.entries(Conditioning((constant("mine", text=np.ones((2, 8), "f4")),)), {}), network, "dit"
    )
