"""Captions: under which key they stand, what a value may be, the text files beside images, and the choice of one of several.

A caption is text; an image has none, one or several of them. Training chooses one at random each time, everything else reads the first.
"""

import ast
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.data.archive import Folder, Zip

# 'text' is Hugging Face's convention and comes before all others, which have no order among themselves.
KEYS = ("text", "texts", "caption", "captions", "prompt", "prompts", "description", "descriptions")
BESIDE = (".txt", ".caption")


def as_text(data: bytes, where: str) -> str:
    """The bytes of a text file as text: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Raises ValueError that names the file and the line of the first byte that is neither.
    """
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{where}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file in that encoding"
        ) from error


def read(value: Any, where: str) -> tuple[str, ...]:
    """The captions in a value of metadata: text or a number is one, a list is several, null and blanks are none.

    Text that spells a list of texts in Python or JSON, as tables hold it, is that list. Raises ValueError for anything else, and
    for text that is not Unicode.
    """
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        nested = next((v for v in value if isinstance(v, (list, tuple))), None)
        if nested is not None:
            raise ValueError(
                f"{where}: the caption {nested!r:.80} is a list within a list; expected text or a list of texts"
            )
        return tuple(caption for v in value for caption in read(v, where))
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        raise ValueError(
            f"{where}: the caption {value!r:.80} is a {type(value).__name__}; expected text or a list of texts"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the caption {text!r:.80} holds half a character; expected Unicode text") from error
    if text.startswith("[") and text.rstrip().endswith("]"):
        try:
            parsed = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            parsed = None
        if isinstance(parsed, list) and parsed and all(isinstance(v, str) for v in parsed):
            return tuple(v for v in parsed if v.strip())
    return (text,) if text.strip() else ()


def key_of(keys: Sequence[str], text_key: str, where: str) -> str | None:
    """The key of the captions among those of all rows: `text_key` where it is set, else 'text', else the only one of KEYS.

    Raises ValueError if `text_key` is not among them, or if several of KEYS are, without 'text'.
    """
    if text_key:
        if text_key not in keys:
            raise ValueError(
                f"{where}: no row has the key config.data.text_key='{text_key}'; there are {', '.join(keys)}"
            )
        return text_key
    there = [k for k in KEYS if k in keys]
    if len(there) > 1 and there[0] != "text":
        raise ValueError(
            f"{where}: holds captions as {', '.join(there)}; config.data.text_key says which of them to read"
        )
    return there[0] if there else None


def beside(archive: Folder | Zip, images: Sequence[str]) -> tuple[list[tuple[str, ...]], set[str]]:
    """(captions of each image, files that were read). NAME.txt or NAME.caption beside NAME.png holds one caption a line.

    A file that holds numbers alone is the output of a detector, and no caption. Raises ValueError for a file that is not UTF-8.
    """
    used, out = set(), []
    ends = [(n, n.rfind(".")) for n in archive.names]
    texts = {n[:at] + n[at:].lower(): n for n, at in ends if n[at:].lower() in BESIDE}
    for image in images if texts else ():
        stem = image[: image.rfind(".")]
        file = next((texts[stem + end] for end in BESIDE if stem + end in texts), None)
        captions = ()
        if file is not None:
            text = as_text(archive.read(file), archive.where(file))
            lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            if any(not _is_number(word) for line in lines for word in line.split()):
                captions = read([line.strip() for line in lines], archive.where(file))
                used.add(file)
        out.append(captions)
    return out if texts else [()] * len(images), used


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def draw(captions: Sequence[str], rng: np.random.Generator) -> str:
    """One of the captions at random, each with the same probability."""
    return captions[int(rng.integers(len(captions)))]
