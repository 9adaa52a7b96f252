"""Tokenizers saved in a folder, read by transformers: CLIP's byte-pair encoding, and any in the `tokenizer.json` form.

Only what lies in the folder is read. transformers, when it does not find the vocabulary, gives a tokenizer of two special tokens and
says nothing: every prompt then becomes the same row. Here that is an error.
"""

import pathlib
from typing import Any

from ldm_jax.weights import files

CLIP_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
CLIP_FILES = {"vocab.json", "merges.txt"}
ANY_FILE = "tokenizer.json"
EXPECTED = f"expected vocab.json + merges.txt or {ANY_FILE}"


def load(path: str | pathlib.Path, subfolder: str | None = None, vocab_size: int | None = None) -> Any:
    """The tokenizer of transformers that the folder path/subfolder holds: tokenizer(texts, ...)['input_ids'].

    vocab_size: of the text encoder's config; a tokenizer has at most so many tokens and more than half of it. Raises
    ValueError for files that are missing or cannot be read, and for a vocabulary that is missing or another network's.
    """
    folder = pathlib.Path(path, subfolder or "")
    if not folder.is_dir():
        raise ValueError(f"tokenizer {folder}: not a folder; {EXPECTED} in it")
    held = {entry.name for entry in folder.iterdir()}
    reader = _reader(folder, held)
    try:
        tokenizer = reader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a broken file shows as ValueError, OSError, KeyError or tokenizers' plain Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sources = ", ".join(sorted(held & {*CLIP_FILES, ANY_FILE}))
        raise ValueError(f"tokenizer {folder}: cannot be read from {sources}: {reason}") from error
    size = len(tokenizer)
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError(f"tokenizer {folder}: its {size} tokens are all special ones; the vocabulary is missing")
    if vocab_size is not None and not vocab_size / 2 < size <= vocab_size:
        raise ValueError(
            f"tokenizer {folder}: {size} tokens; expected more than half of the text encoder's vocab_size {vocab_size} "
            "and no more than all of it"
        )
    return tokenizer


def _reader(folder: pathlib.Path, held: set[str]) -> type:
    """The class of transformers that reads `folder`, whose files are `held`.

    Not left to AutoTokenizer, which imports torch where it is installed and may offer to run code from the folder.
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
