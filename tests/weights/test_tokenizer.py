"""Tokenizers from a folder: the published layouts, no network, and a vocabulary that is missing is an error."""

import json
import socket

import pytest
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from ldm_jax.weights.tokenizer import load

LETTERS = "abcdefghijklmnopqrstuvwxyz!"
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
MERGES = [("c", "a"), ("ca", "t</w>")]
BOS, EOS, CAT, PAD = 56, 57, 55, 26
CONFIG = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def saved(tmp_path):
    """A folder as transformers 5 writes it: tokenizer.json."""
    folder = tmp_path / "saved"
    CLIPTokenizer(vocab=VOCABULARY, merges=MERGES, model_max_length=77, pad_token="!").save_pretrained(folder)
    return folder


@pytest.fixture
def published(tmp_path):
    """A folder as the published pipelines hold it: vocab.json, merges.txt, tokenizer_config.json, in a subfolder."""
    folder = tmp_path / "pipeline" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


def test_both_layouts(saved, published):
    for tokenizer in (load(saved, vocab_size=58), load(str(published.parent), "tokenizer", vocab_size=100)):
        assert tokenizer.model_max_length == 77
        ids = tokenizer(["A cat", "c"], padding="max_length", max_length=6, truncation=True)["input_ids"]
        assert ids == [[BOS, 27, CAT, EOS, PAD, PAD], [BOS, 29, EOS, PAD, PAD, PAD]]
    (published / "tokenizer_config.json").unlink()
    assert load(published)("cat")["input_ids"] == [BOS, CAT, EOS]


def test_tokenizer_json_of_any_class(saved):
    (saved / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load(saved)
    assert type(tokenizer) is PreTrainedTokenizerFast and tokenizer("cat")["input_ids"] == [BOS, CAT, EOS]


def test_a_vocabulary_of_another_network(saved):
    for size in (57, 116):
        with pytest.raises(ValueError, match=rf"saved: 58 tokens; expected more than half of .* vocab_size {size}"):
            load(saved, vocab_size=size)
    assert len(load(saved, vocab_size=115)) == 58


def test_missing_files(published, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: not a folder; expected vocab.json \+ merges.txt or tokenizer.json"):
        load(tmp_path, "nowhere")
    (published / "vocab.json").unlink()
    # transformers itself loads a stub of two tokens from a folder of this kind.
    with pytest.raises(ValueError, match=r"tokenizer: expected vocab.json .* holds merges.txt, tokenizer_config.json"):
        load(published)
    (published / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"holds tokenizer_config.json"):
        load(published)
    (published / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds nothing"):
        load(published)


def test_a_stub_that_was_saved(tmp_path):
    CLIPTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its 2 tokens are all special ones; the vocabulary is missing"):
        load(tmp_path)


def test_broken_files(saved, published):
    for file, text, message in (
        (saved / "tokenizer.json", (saved / "tokenizer.json").read_text()[:300], r"cannot be read from tokenizer.json"),
        (published / "vocab.json", '{"a": 0, "b', r"cannot be read from merges.txt, vocab.json: "),
        (published / "tokenizer_config.json", "{", r"tokenizer_config.json: not JSON"),
        (published / "tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', r"tokenizer_class is 'GPT2Tok"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(file.parent)


def test_code_in_the_folder_is_not_run(saved):
    (saved / "evil.py").write_text("raise SystemExit('ran')")
    config = CONFIG | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    assert type(load(saved)) is PreTrainedTokenizerFast
