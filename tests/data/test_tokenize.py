"""Byte tokens, and transformers' tokenizers with the trap of the missing vocabulary."""

import json

import numpy as np
import pytest

from ldm_jax.data.shapes import CAPTION_BYTES
from ldm_jax.data.tokenize import TOKENIZERS, decode_bytes, lost


def test_bytes():
    tokenizer = TOKENIZERS["bytes"](8)
    assert tokenizer.encode("ab").tolist() == [1, 100, 101, 2, 0, 0, 0, 0]
    assert tokenizer.encode("").tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert tokenizer.encode("").dtype == np.int32 and tokenizer.pad_id == 0
    assert (tokenizer.vocab_size, tokenizer.length) == (259, 8)
    assert tokenizer.encode("\u00ff").max() < tokenizer.vocab_size
    assert decode_bytes(tokenizer.encode("grün")) == "grün"


def test_too_long_texts_keep_their_eos_and_whole_characters():
    tokenizer = TOKENIZERS["bytes"](8)
    assert tokenizer.encode("abcdefghij").tolist() == [1, 100, 101, 102, 103, 104, 105, 2]
    assert decode_bytes(tokenizer.encode("abcdeé")) == "abcde"
    assert tokenizer.fits("abcdef") and not tokenizer.fits("abcdefg") and not tokenizer.fits("abcdeé")
    assert TOKENIZERS["bytes"]().length >= CAPTION_BYTES + 2
    with pytest.raises(ValueError, match="tokenizer length 2 is too short"):
        TOKENIZERS["bytes"](2)


def _words(folder, count: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "a small red circle above large blue square <pad> <unk>".split()[:: 1 if count > 20 else -1]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(words + [f"w{i}" for i in range(count - len(words))]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def test_huggingface_folder(tmp_path):
    _words(tmp_path, 400)
    tokenizer = TOKENIZERS["huggingface"](str(tmp_path), length=6)
    assert tokenizer.vocab_size == 400 and tokenizer.pad_id == 8
    assert tokenizer.encode("a small red circle").tolist() == [0, 1, 2, 3, 8, 8]
    assert tokenizer.encode("a small red circle").dtype == np.int32
    (tmp_path / "config.json").write_text('{"vocab_size": 900}')
    with pytest.raises(ValueError, match=r"400 tokens, but its config.json has vocab_size 900"):
        TOKENIZERS["huggingface"](str(tmp_path))
    assert len(tokenizer.encode("a " * 50)) == 6 and not tokenizer.fits("a " * 50) and tokenizer.fits("a")


def test_what_a_tokenizer_loses_of_texts_is_said(tmp_path):
    _words(tmp_path, 400)
    texts = [
        "a small red circle",
        "A small dog, red",
        "a dog with a cat",
        "a",
        "a small red circle above a blue square",
    ]
    closed, open_ = TOKENIZERS["words"]("a small red circle above blue square ,", length=8), TOKENIZERS["bytes"](24)
    assert lost(closed, texts, "captions") == [
        "2 of 5 captions: words that the tokenizer does not know, read as one and the same: 'dog', 'with', 'cat'",
        "1 of 5 captions: the end is lost, being longer than the 8 tokens that are read: "
        "'a small red circle above a blue square'",
    ]
    assert lost(closed, texts[:1]) == [] == lost(open_, ["näht", "❤"])
    assert lost(closed, ["a b c d e f g"], shown=2)[0].endswith("the same: 'b', 'c' and 4 more")
    (line,) = lost(open_, ["word " * 40] * 2)
    assert (
        line.startswith("2 of 2 prompts: the end is lost") and line.endswith("word...' and others") and len(line) < 200
    )
    (line,) = lost(TOKENIZERS["huggingface"](str(tmp_path), length=8), ["a small dog", "red cat", "red circle"])
    assert line.startswith("2 of 3 prompts: words") and line.endswith(": 'dog', 'cat'")
    assert "1 of 1 prompts" in lost(closed, ["x"] * 1000, seconds=-1)[0], "no more texts than there is time for"


def test_a_vocabulary_that_is_not_there_is_seen(tmp_path):
    """A CLIP folder with its config but without vocab.json loads as a stub of a few special tokens."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vocab_size": 49408}))
    with pytest.raises(
        ValueError, match=r"tokenizer '.*': (only \d+ tokens, its vocabulary files are missing|cannot be loaded)"
    ):
        TOKENIZERS["huggingface"](str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        TOKENIZERS["huggingface"](str(tmp_path / "empty"))
