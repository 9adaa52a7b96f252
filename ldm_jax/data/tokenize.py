"""Text -> token ids of a fixed length. `bytes`: pad 0, bos 1, eos 2, byte b -> b + 3."""

import json
import math
import pathlib
import re
import textwrap
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

PAD, BOS, EOS, OFFSET = 0, 1, 2, 3


class Tokenizer(NamedTuple):
    """`encode(text) -> i32[length]`, padded with `pad_id`; a text that is too long loses its end but keeps the eos.

    `fits(text)` says whether `encode` clips nothing, `unknown(text)` lists the words that are not in the vocabulary and are all read
    as the same token.
    """

    vocab_size: int
    length: int
    encode: Callable[[str], np.ndarray]
    pad_id: int
    fits: Callable[[str], bool]
    unknown: Callable[[str], list[str]] = lambda text: []


def lost(
    tokenizer: Tokenizer, texts: Iterable[str], what: str = "prompts", seconds: float = math.inf, shown: int = 8
) -> list[str]:
    """A line on words that are not in the vocabulary, and a line on texts that are clipped; [] where nothing is lost.

    It looks at the texts in order, for at most so many seconds. The line names at most `shown` words.
    """
    start, count, strange, clipped, words = time.monotonic(), 0, 0, [], {}
    for text in texts:
        unknown = tokenizer.unknown(text)
        strange += bool(unknown)
        words |= dict.fromkeys(unknown)
        clipped += [] if tokenizer.fits(text) else [text]
        count += 1
        if time.monotonic() - start > seconds:
            break
    lines = []
    if words:
        named = ", ".join(map(repr, list(words)[:shown])) + (
            f" and {len(words) - shown} more" if len(words) > shown else ""
        )
        lines.append(
            f"{strange} of {count} {what}: words that the tokenizer does not know, read as one and the same: {named}"
        )
    if clipped:
        first = textwrap.shorten(clipped[0], 60, placeholder="...") or clipped[0][:60]
        lines.append(
            f"{len(clipped)} of {count} {what}: the end is lost, being longer than the {tokenizer.length} tokens that are read: "
            f"{first!r}" + (" and others" if len(clipped) > 1 else "")
        )
    return lines


def byte_tokenizer(length: int = 104) -> Tokenizer:
    """The UTF-8 bytes of the text between bos and eos. Raises ValueError if `length` leaves no room for a byte."""
    if length < 3:
        raise ValueError(f"tokenizer length {length} is too short; expected at least 3 (bos, one byte, eos)")

    def encode(text: str) -> np.ndarray:
        data = text.encode("utf-8")[: length - 2]
        data = np.frombuffer(data.decode("utf-8", errors="ignore").encode("utf-8"), np.uint8)  # no half character
        tokens = np.full(length, PAD, np.int32)
        tokens[0] = BOS
        tokens[1 : 1 + len(data)] = data.astype(np.int32) + OFFSET
        tokens[1 + len(data)] = EOS
        return tokens

    return Tokenizer(256 + OFFSET, length, encode, PAD, lambda text: len(text.encode("utf-8")) <= length - 2)


def decode_bytes(tokens: np.ndarray) -> str:
    """The text of byte tokens, special tokens left out."""
    tokens = np.asarray(tokens)
    return (tokens[tokens >= OFFSET] - OFFSET).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def huggingface(path: str, length: int = 77) -> Tokenizer:
    """The tokenizer saved in the folder `path` (or its cached hub name), read by transformers.

    Raises ValueError if there is none, or if it has no vocabulary: without the vocabulary files transformers silently gives a
    tokenizer of a few special tokens, and every text becomes 'unknown'.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer '{path}': cannot be loaded ({str(error).splitlines()[0]})") from error
    size = len(tokenizer)
    probe = tokenizer("a small red circle above a large blue square", add_special_tokens=False)["input_ids"]
    if size < 256 or not probe or all(i in tokenizer.all_special_ids for i in probe):
        raise ValueError(f"tokenizer '{path}': only {size} tokens, its vocabulary files are missing")
    config = pathlib.Path(path) / "config.json"
    declared = json.loads(config.read_text()).get("vocab_size") if config.is_file() else None
    if declared and not declared / 2 < size <= declared:
        raise ValueError(f"tokenizer '{path}': {size} tokens, but its config.json has vocab_size {declared}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

    def encode(text: str) -> np.ndarray:
        tokens = tokenizer(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
        return np.asarray(tokens, np.int32)

    def fits(text: str) -> bool:
        return len(tokenizer(text, verbose=False)["input_ids"]) <= length

    # A byte-level vocabulary has a token for everything: its unknown token, if any, is the token of the end.
    strange = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None

    def unknown(text: str) -> list[str]:
        if strange is None or strange not in tokenizer(text, verbose=False)["input_ids"]:
            return []
        return [word for word in text.split() if strange in tokenizer(word, add_special_tokens=False)["input_ids"]]

    return Tokenizer(size, length, encode, tokenizer.pad_token_id, fits, unknown)


def words(vocabulary: str, length: int = 24) -> Tokenizer:
    """Whole words of a small closed language; `vocabulary` separates them by blanks, and a comma is a word too.

    pad 0, bos 1, eos 2, unknown 3, then the vocabulary in order. A text takes a fifth of the tokens of `bytes`, and the model need not
    learn to spell. Raises ValueError for a vocabulary without a word or with one twice.
    """
    entries = vocabulary.split()
    if not entries or len(set(entries)) != len(entries):
        raise ValueError(f"tokenizer vocabulary '{vocabulary}': expected at least one word, none of them twice")
    if length < 3:
        raise ValueError(f"tokenizer length {length} is too short; expected at least 3 (bos, one word, eos)")
    number = {word: 4 + i for i, word in enumerate(entries)}

    def split(text: str) -> list[str]:
        return re.findall(r"[^\s,]+|,", text.lower())

    def encode(text: str) -> np.ndarray:
        numbers = [number.get(word, 3) for word in split(text)][: length - 2]
        tokens = np.full(length, PAD, np.int32)
        tokens[: len(numbers) + 2] = [BOS, *numbers, EOS]
        return tokens

    def fits(text: str) -> bool:
        return len(split(text)) <= length - 2

    def unknown(text: str) -> list[str]:
        return [word for word in split(text) if word not in number]

    return Tokenizer(4 + len(entries), length, encode, PAD, fits, unknown)


TOKENIZERS = {"words": words, "bytes": byte_tokenizer, "huggingface": huggingface}
