"""Prompts: what the parentheses mean, and what is clipped."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from ldm_jax.pipelines import prompts
from tests.pipelines import published as tiny


@pytest.mark.parametrize(
    "prompt, fragments",
    [
        ("a fox", [("a fox", 1.0)]),
        ("a (red:1.3) fox", [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]),
        ("(a:.5)(b:-1)", [("a", 0.5), ("b", -1.0)]),
        ("(red) [fox] (1:2", [("(red) [fox] (1:2", 1.0)]),
        (r"\(red:1.3\) (x \(y\):2)", [("(red:1.3) ", 1.0), ("x (y)", 2.0)]),
        ("time 12:30 (at noon: 2 )", [("time 12:30 ", 1.0), ("at noon", 2.0)]),
        ("", []),
    ],
)
def test_weights_are_read(prompt, fragments):
    assert prompts.parse(prompt) == fragments


def test_tokens_carry_the_weights_of_their_words():
    tokenizer = tiny.tokenizer()
    plain = prompts.tokenize(tokenizer, ["ab cd e"], tiny.LENGTH)
    weighed = prompts.tokenize(tokenizer, ["ab (CD:1.5) e"], tiny.LENGTH)
    np.testing.assert_array_equal(plain.ids, weighed.ids)
    assert not plain.weighted and weighed.weighted
    np.testing.assert_allclose(weighed.weights[0, :8], [1, 1, 1, 1.5, 1.5, 1, 1, 1])
    theirs = tokenizer(["ab cd e"], padding="max_length", max_length=tiny.LENGTH).input_ids
    np.testing.assert_array_equal(plain.ids, theirs)


def test_a_long_prompt_is_clipped_and_says_what_is_lost():
    with pytest.warns(UserWarning, match=r"clipped to 16 tokens; lost: 'pq r'"):
        tokens = prompts.tokenize(tiny.tokenizer(), ["abcdefghijklmno pq r"[1:]], tiny.LENGTH)
    assert tokens.ids.shape == (1, 16) and tokens.ids[0, -1] == 1


def test_texts_are_one_or_as_many_as_images():
    assert prompts.texts("prompts", "a", 2) == ["a", "a"] and prompts.texts("negative", None, 1) == [""]
    with pytest.raises(ValueError, match="prompts: 2 texts for 3 images"):
        prompts.texts("prompts", ["a", "b"], 3)


def test_a_weight_moves_the_states_from_those_of_the_empty_prompt(tmp_path):
    import diffusers

    from ldm_jax import pipelines
    from ldm_jax.pipelines.conditions import encode

    diffusers.StableDiffusionPipeline(
        unet=tiny.unet(), scheduler=diffusers.DDIMScheduler(**tiny.DDIM), **tiny.sd_parts()
    ).save_pretrained(tmp_path)
    parts = pipelines.load(tmp_path)
    (plain, half, none, empty) = (
        np.asarray(encode(parts, parts.text[0], [text])[0][0]) for text in ("a fox", "a (fox:0.5)", "a (fox:0)", "")
    )
    np.testing.assert_array_equal(half[:2], plain[:2])
    np.testing.assert_allclose(half[2:5], (plain + empty)[2:5] / 2, atol=1e-6)
    np.testing.assert_allclose(none[2:5], empty[2:5], atol=1e-6)
