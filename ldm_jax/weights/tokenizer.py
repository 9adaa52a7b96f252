"""Tokenizers in a folder, read by transformers: CLIP's byte-pair encoding, and any tokenizer in the form of `tokenizer.json`.

Only files of the folder are read. If the vocabulary is missing, transformers silently makes a tokenizer of two special tokens, and all
prompts become the same row. Here that is an error.

Text encoders share one vocabulary but differ in the padding after the end of a prompt. OpenAI's (SD 1, and the first of SDXL) was
trained with <|endoftext|> again, OpenCLIP's (SD 2, the second of SDXL, and its refiner) with token 0, which is '!'. With the wrong
one a network draws another picture.
"""

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from ldm_jax.weights import files

CLIP_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
CLIP_FILES = {"vocab.json", "merges.txt"}
ANY_FILE = "tokenizer.json"
SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")
EXPECTED = f"expected vocab.json + merges.txt or {ANY_FILE}"
END = "<|endoftext|>"
# The padding of CLIP's text encoders, the end token or token 0. The activation distinguishes OpenAI's encoder from OpenCLIP's.
PADDING = {"quick_gelu": "end", "gelu": "zero"}


def load(
    path: str | pathlib.Path, subfolder: str | None = None, vocab_size: int | None = None, padding: str | None = None
) -> Any:
    """The tokenizer of transformers in the folder path/subfolder: tokenizer(texts, ...)['input_ids'].

    vocab_size  of the text encoder's config: the tokenizer must have more than half as many tokens, and at most as many
    padding     'end' or 'zero'; None: as the folder says, or <|endoftext|> where it does not say

    Raises ValueError for files that are missing or cannot be read, for a vocabulary that is missing or that of another network, and
    where there is no padding token.
    """
    folder = pathlib.Path(path, subfolder or "")
    if not folder.is_dir():
        raise ValueError(f"tokenizer {folder}: not a folder; {EXPECTED} in it")
    held = {entry.name for entry in folder.iterdir()}
    reader = _reader(folder, held)
    try:
        tokenizer = reader.from_pretrained(str(folder), local_files_only=True)
        token = pad_token(tokenizer, padding) if padding else tokenizer.pad_token or pad_token(tokenizer, "end")
        if token != tokenizer.pad_token:
            # The token is not set afterwards: then it would be read as special in the middle of a text too ('a fox!').
            tokenizer = reader.from_pretrained(str(folder), local_files_only=True, pad_token=token)
    except Exception as error:  # a broken file raises ValueError, OSError, KeyError, or a plain Exception of tokenizers
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sources = ", ".join(sorted(held & {*CLIP_FILES, ANY_FILE}))
        raise ValueError(f"tokenizer {folder}: cannot be read from {sources}: {reason}") from error
    length = tokenizer.model_max_length
    if type(length) not in (int, float) or not length >= 1:
        raise ValueError(f"tokenizer {folder}: model_max_length is {length!r:.100}, expected a number of tokens")
    size = len(tokenizer)
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError(f"tokenizer {folder}: its {size} tokens are all special ones; the vocabulary is missing")
    if vocab_size is not None and not vocab_size / 2 < size <= vocab_size:
        raise ValueError(
            f"tokenizer {folder}: {size} tokens; expected more than half of the text encoder's vocab_size {vocab_size} "
            "and no more than all of it"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        raise ValueError(f"tokenizer {folder}: it has no padding token and no {END} to take for one")
    zero = tokenizer.convert_ids_to_tokens(0)
    if padding == "end" and zero not in (END, tokenizer.bos_token) and zero in tokenizer.get_added_vocab():
        warnings.warn(
            f"tokenizer {folder}: it reads {zero!r} in a text as the padding of SD 2 and SDXL's second text encoder; this text encoder "
            "was trained on it as a word: take CLIP-L's tokenizer, or leave it out of the prompts",
            stacklevel=2,
        )
    return tokenizer


def pad_token(tokenizer: Any, padding: str) -> str | None:
    """The token that 'end' or 'zero' stands for; None where the vocabulary has no end token."""
    if padding == "zero":
        return tokenizer.convert_ids_to_tokens(0)
    return tokenizer.eos_token or (END if END in tokenizer.get_vocab() else None)


def check_padding(folder: pathlib.Path, tokenizer: Any, padding: str | None) -> None:
    """Warn where the tokenizer of a pipeline pads in another way than its text encoder was trained with. diffusers does so silently."""
    if padding and (expected := pad_token(tokenizer, padding)) != tokenizer.pad_token:
        warnings.warn(
            f"tokenizer {folder}: it pads with {tokenizer.pad_token!r}, and such a text encoder is published with {expected!r} "
            f"({' or '.join(SPECIAL_FILES)} says which)",
            stacklevel=2,
        )


def files_of(folder: pathlib.Path, padding: str, length: int) -> Mapping[str, pathlib.Path | dict[str, Any]]:
    """{name: the file to copy, or the JSON to write}: a folder from which transformers makes the tokenizer of `load` with `padding`.

    length: how many tokens the text encoder reads, for a folder that does not say it.
    """
    tokenizer, as_saved = load(folder, padding=padding), load(folder)
    names = (*sorted(CLIP_FILES), ANY_FILE, *SPECIAL_FILES, "added_tokens.json")
    held = {name: folder / name for name in names if (folder / name).is_file()}
    complete = SPECIAL_FILES[0] in held and as_saved.model_max_length <= length
    if complete and as_saved.pad_token == tokenizer.pad_token:
        return held
    config, special = (files.read_json(held[name]) if name in held else {} for name in SPECIAL_FILES)
    config |= {"pad_token": tokenizer.pad_token, "model_max_length": min(tokenizer.model_max_length, length)}
    config.setdefault("tokenizer_class", CLIP_CLASSES[0])
    for name in ("bos_token", "eos_token", "unk_token"):
        config.setdefault(name, getattr(tokenizer, name))
    held[SPECIAL_FILES[0]] = {name: value for name, value in config.items() if value is not None}
    if special:
        held[SPECIAL_FILES[1]] = special | {"pad_token": tokenizer.pad_token}
    return held


def _reader(folder: pathlib.Path, held: set[str]) -> type:
    """The class of transformers that reads `folder`, whose files are `held`.

    AutoTokenizer is not used: it imports torch where that is installed, and it may offer to run code from the folder.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    if not (held >= CLIP_FILES or ANY_FILE in held):
        raise ValueError(f"tokenizer {folder}: {EXPECTED}; the folder holds {', '.join(sorted(held)) or 'nothing'}")
    name = CLIP_CLASSES[0] if held >= CLIP_FILES else None
    if "tokenizer_config.json" in held:
        name = files.read_json(folder / "tokenizer_config.json").get("tokenizer_class") or name
    if name in CLIP_CLASSES:
        return CLIPTokenizer
    if ANY_FILE in held:
        return PreTrainedTokenizerFast
    raise ValueError(f"tokenizer {folder}: tokenizer_class is {name!r}; expected {CLIP_CLASSES[0]!r} or a {ANY_FILE}")
