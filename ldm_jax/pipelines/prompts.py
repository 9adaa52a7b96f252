"""Prompts to tokens and weights: `a (red:1.3) hat`, clipped to what the text encoder reads.

`(text:1.3)` gives the tokens inside a weight w, by which their states move away from those of the empty prompt,

    h <- h_empty + w (h - h_empty)

so that 1 changes nothing, exactly, and 0 leaves what no words would have said. `\\(` and `\\)` are parentheses; those without a number
are text, as they are to the published pipelines.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

WEIGHTED = re.compile(r"(?<!\\)\(((?:[^()\\]|\\.)*?):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")


class Tokens(NamedTuple):
    """ids i32[N, L], padded; weights f32[N, L], 1 but inside `(text:w)`."""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def weighted(self) -> bool:
        return bool((self.weights != 1).any())


def parse(prompt: str) -> list[tuple[str, float]]:
    """The prompt's fragments and their weights, in order; text alone has weight 1."""
    parts, at = [], 0
    for match in WEIGHTED.finditer(prompt):
        parts += [(prompt[at : match.start()], 1.0), (match[1], float(match[2]))]
        at = match.end()
    parts.append((prompt[at:], 1.0))
    return [(re.sub(r"\\([()])", r"\1", text), weight) for text, weight in parts if text]


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Tokens:
    """The prompts as `length` tokens each, marks of beginning and end included, padded as the tokenizer pads.

    A longer prompt is clipped with a warning that shows what was lost. tokenizer is one of transformers' that know the
    offsets of their tokens.
    """
    ids, weights = [], []
    for prompt in prompts:
        pieces = parse(prompt)
        plain = "".join(text for text, _ in pieces)
        # Tokenized as a whole, weighed by place: a fragment by itself may fall into other tokens.
        by_character = np.repeat([weight for _, weight in pieces], [len(text) for text, _ in pieces])
        whole = tokenizer(plain, return_offsets_mapping=True)
        if len(whole.input_ids) > length:
            ends = [end for _, end in whole.offset_mapping]
            kept = ends[length - tokenizer.num_special_tokens_to_add()]
            warnings.warn(f"the prompt is clipped to {length} tokens; lost: {plain[kept:].strip()!r}", stacklevel=3)
        row = tokenizer(plain, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True)
        ids.append(row.input_ids)
        weights.append([by_character[start] if end > start else 1.0 for start, end in row.offset_mapping])
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32))


def texts(what: str, given: str | Sequence[str] | None, count: int) -> list[str]:
    """`count` prompts from one, or from as many; None is the empty prompt. ValueError for another number."""
    given = [""] if given is None else [given] if isinstance(given, str) else list(given)
    if len(given) not in (1, count):
        raise ValueError(f"{what}: {len(given)} texts for {count} images; expected 1 or {count}")
    return given * count if len(given) == 1 else given
