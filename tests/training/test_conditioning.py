"""What a row is conditioned on that was dropped: the null class, the empty caption."""

import jax.numpy as jnp
import numpy as np

from ldm_jax.training import conditioning


class Text:
    """A text encoder whose states are the tokens themselves."""

    def apply(self, variables, tokens):
        return {"text": tokens[..., None], "text_mask": tokens != 0}


def test_dropped_rows_have_the_null_class_and_the_empty_caption():
    takes = conditioning.Conditioning(4, Text(), np.array([1, 2, 0]))
    batch = {"label": jnp.array([0, 1, 2]), "tokens": jnp.full((3, 3), 7)}
    cond = conditioning.condition(takes, {"text": {}}, batch, jnp.array([True, False, True]))
    assert cond["label"].tolist() == [4, 1, 4]
    assert cond["text"][..., 0].tolist() == [[1, 2, 0], [7, 7, 7], [1, 2, 0]]
    kept = conditioning.condition(takes, {"text": {}}, batch)
    assert kept["label"].tolist() == [0, 1, 2] and kept["text"].min() == 7
    nothing = conditioning.nothing(takes, {"text": {}}, 2)
    assert nothing["label"].tolist() == [4, 4] and nothing["text"][1, :, 0].tolist() == [1, 2, 0]
