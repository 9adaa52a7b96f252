"""Tokenizers from a folder: the published layouts, no network, and a vocabulary that is missing is an error."""

import json
import pathlib
import shutil
import socket
import warnings

import pytest
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from ldm_jax.weights.tokenizer import END, PADDING, check_padding, files_of, load

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


@pytest.mark.parametrize("length", [0, -1, "77", [77], None])
def test_a_length_that_is_no_number(published, length):
    (published / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"model_max_length": length}))
    if length is None:  # transformers takes the longest there is
        assert load(published).model_max_length > 1e6
        return
    with pytest.raises(ValueError, match=r"tokenizer: model_max_length is .*, expected a number of tokens"):
        load(published)


def test_code_in_the_folder_is_not_run(saved):
    (saved / "evil.py").write_text("raise SystemExit('ran')")
    config = CONFIG | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    assert type(load(saved)) is PreTrainedTokenizerFast


# The vocabulary of the published ones, in small: token 0 is '!'.
SMALL = {
    word: i
    for i, word in enumerate(["!", "!</w>", "a</w>", "f", "o", "x</w>", "fo", "fox</w>", "<|startoftext|>", END])
}
TEXTS = ("a fox", "a fox!", "a!! fox", "!")


def rows(tokenizer):
    return [tokenizer(text, padding="max_length", max_length=9, truncation=True)["input_ids"] for text in TEXTS]


def small(folder, pad=END, **special):
    """A folder as published, of a tokenizer that pads with `pad`."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(SMALL))
    (folder / "merges.txt").write_text("#version: 0.2\nf o\nfo x</w>\n")
    config = CONFIG | {"pad_token": pad, "bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("padding, pad", [("end", END), ("zero", "!")])
def test_one_vocabulary_is_padded_as_each_text_encoder_is(tmp_path, padding, pad):
    expected = rows(load(small(tmp_path / "expected", pad)))
    bare, saved = small(tmp_path / "bare"), tmp_path / "saved"
    (bare / "tokenizer_config.json").unlink()
    load(small(tmp_path / "end")).save_pretrained(saved)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(saved / "tokenizer.json", alone)
    for folder in (tmp_path / "expected", tmp_path / "end", small(tmp_path / "zero", "!"), bare, saved, alone):
        assert rows(load(folder, padding=padding)) == expected, folder
        # What is written is read the same by transformers itself, and knows how long a prompt may be.
        out = tmp_path / "out" / folder.name
        out.mkdir(parents=True)
        for name, content in files_of(folder, padding, 16).items():
            (out / name).write_text(content.read_text() if isinstance(content, pathlib.Path) else json.dumps(content))
        read = CLIPTokenizer.from_pretrained(out)
        assert rows(read) == expected and read.model_max_length == 16 and read.pad_token == pad, folder
    assert files_of(tmp_path / "expected", padding, 77)["vocab.json"] == tmp_path / "expected" / "vocab.json"


def test_a_folder_that_says_nothing_pads_with_the_end(tmp_path):
    folder = small(tmp_path / "a")
    load(folder).save_pretrained(tmp_path / "b")
    for path in tmp_path.glob("b/*config.json"):
        path.unlink()
    assert rows(load(tmp_path / "b")) == rows(load(folder))


def test_a_padding_that_no_such_encoder_is_published_with_is_said(tmp_path):
    folder = small(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"a: it pads with '<\|endoftext\|>', .* published with '!'"):
        check_padding(folder, load(folder), "zero")
    load(small(tmp_path / "b", "!")).save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="it reads '!' in a text as the padding of SD 2"):
        load(tmp_path / "saved", padding="end")
    with warnings.catch_warnings(action="error"):
        check_padding(folder, load(folder), "end")
        load(tmp_path / "saved", padding="zero")


@pytest.mark.data
def test_padding_is_that_of_the_published_folders(ldm_data):
    folders = {}
    for config in sorted((ldm_data / "published").glob("*/text_encoder*/config.json")):
        encoder = json.loads(config.read_text())
        if "CLIP" in str(encoder.get("architectures")):
            folder = config.parent.with_name(config.parent.name.replace("text_encoder", "tokenizer"))
            folders[folder] = PADDING[encoder["hidden_act"]]
    if len(folders) < 10:
        pytest.skip(f"{ldm_data}/published is not there")
    expected = {padding: rows(load(folder)) for folder, padding in folders.items()}
    assert expected["end"] != expected["zero"]
    for folder, padding in folders.items():
        assert rows(load(folder)) == expected[padding], folder
        if padding == "end":
            assert rows(load(folder, padding="zero")) == expected["zero"], folder
