"""Prompts: what the parentheses mean, and what is clipped."""

import time

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
        # Nested, with parentheses that are text.
        ("((a:1.5) b:2)", [("a", 3.0), (" b", 2.0)]),
        ("(a (b:1.5) c:2) d", [("a ", 2.0), ("b", 3.0), (" c", 2.0), (" d", 1.0)]),
        ("(((a:1.5):2):-1)", [("a", -3.0)]),
        ("((red) hat:1.3)", [("(red) hat", 1.3)]),
        ("(masterpiece, (best quality):1.2)", [("masterpiece, (best quality)", 1.2)]),
        ("(((a:1.5)))", [("((", 1.0), ("a", 1.5), ("))", 1.0)]),
        # What is not closed or not opened leaves the rest as it is.
        ("(a, (b:1.2)", [("(a, ", 1.0), ("b", 1.2)]),
        ("(a:1.2), b) c:1.3)", [("a", 1.2), (", b) c:1.3)", 1.0)]),
        # Numbers.
        ("(a:1.)(b:+2)(c:0)(:5)", [("a", 1.0), ("b", 2.0), ("c", 0.0)]),
        ("(ratio 3:2)", [("ratio 3", 2.0)]),
        (r"\(ratio 3:2\)", [("(ratio 3:2)", 1.0)]),
        ("(a:1e3) (a:nan) (a:1.2.3) (a:b)", [("(a:1e3) (a:nan) (a:1.2.3) (a:b)", 1.0)]),
        # Text to the published pipelines, and here.
        (r"[a] [a:b:0.5] \[c\] BREAK d AND e \f \\", [("[a] [a:b:0.5] [c] BREAK d AND e \\f \\", 1.0)]),
        (r"a\\(b:2)", [("a\\", 1.0), ("b", 2.0)]),
    ],
)
def test_weights_are_read(prompt, fragments):
    assert prompts.parse(prompt) == fragments


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 10_000 + "a" + ":1.0001)" * 10_000,
        "(" * 100_000 + ")" * 50_000,
        "(:" * 50_000 + "1" * 100_000,
        "(a:" + " " * 100_000,
        "\\" * 100_000,
    ],
    ids=["nested", "parentheses", "digits", "blanks", "escapes"],
)
def test_long_prompts_take_linear_time(prompt):
    start = time.process_time()
    parts = prompts.parse(prompt)
    assert time.process_time() - start < 5
    assert len(parts) == 1 and (parts[0][1] == 1 or parts[0] == ("a", pytest.approx(1.0001**10_000)))


@pytest.mark.parametrize("prompt", [f"(a:{'9' * 400})", f"((a:{'9' * 30}):{'9' * 30})"])
def test_a_weight_that_no_float_holds_is_refused(prompt):
    with pytest.raises(ValueError, match=r"prompt: the weight \S+ in 'a:9+.*' is too large"):
        prompts.parse(prompt)


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
    parts = pipelines.load(tmp_path).parts
    (plain, half, none, empty) = (
        np.asarray(encode(parts, parts.text[0], [text])[0][0]) for text in ("a fox", "a (fox:0.5)", "a (fox:0)", "")
    )
    np.testing.assert_array_equal(half[:2], plain[:2])
    np.testing.assert_allclose(half[2:5], (plain + empty)[2:5] / 2, atol=1e-6)
    np.testing.assert_allclose(none[2:5], empty[2:5], atol=1e-6)
