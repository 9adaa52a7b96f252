"""Prompts to tokens and weights: `a (red:1.3) hat`, clipped to what the text encoder reads.

`(text:1.3)` gives the tokens inside a weight w, by which their states move away from those of the empty prompt,

    h <- h_empty + w (h - h_empty)

so that 1 changes nothing, exactly, and 0 leaves what no words would have said. The syntax is that of the galleries (AUTOMATIC1111's
web UI), as far as it has numbers:

    (a:1.3)  (a: .5 )  (a:-1)      a number before the closing parenthesis weighs all that they hold, and is not read
    ((a:1.2) b:1.5)                weights multiply: a by 1.8, b by 1.5
    (a)  ((a) b:1.5)               parentheses without a number are text, inside a weighted group as well
    (ratio 3:2)  \\(ratio 3:2\\)    the first weighs "ratio 3" by 2; a backslash makes a character text: \\( \\) \\[ \\] \\\\
    (a:1.2   a:1.2)   (a:1e3)      text: what is not closed, not opened, or no decimal number
    [a]  [a:b:0.5]  BREAK  AND     text, as they are to the published pipelines
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# What is no plain text: an escape, an opening, a closing with its number or without. The digits never back up (quadratic time).
MARK = re.compile(r"\\[()\[\]\\]|\(|:\s*([+-]?(?>[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)|\)")


LARGEST = float(np.finfo(np.float32).max)


class Tokens(NamedTuple):
    """ids i32[N, L], padded; weights f32[N, L], 1 but inside `(text:w)`."""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def weighted(self) -> bool:
        return bool((self.weights != 1).any())


def parse(prompt: str) -> list[tuple[str, float]]:
    """The prompt's fragments and their weights, in order; text alone has weight 1. Takes time in proportion to the prompt's length.

    ValueError for a weight, or a product of nested ones, that a float32 does not hold.
    """
    marks, opened, weighs = list(MARK.finditer(prompt)), [], {}
    for i, mark in enumerate(marks):
        if mark[0] == "(":
            opened.append(i)
        elif mark[0][-1] == ")" and mark[0][0] != "\\" and opened:
            opening = opened.pop()
            if mark[1] is not None:
                weighs[opening] = weighs[i] = float(mark[1])

    parts: list[tuple[list[str], float]] = [([], 1.0)]
    products, at = [1.0], 0

    def change() -> None:
        if parts[-1][1] != products[-1]:
            parts.append(([], products[-1]))

    for i, mark in enumerate(marks):
        parts[-1][0].append(prompt[at : mark.start()])
        at = mark.end()
        if i not in weighs:
            parts[-1][0].append(mark[0][1:] if mark[0][0] == "\\" else mark[0])
        elif mark[0] == "(":
            products.append(products[-1] * weighs[i])
            if not abs(products[-1]) <= LARGEST:
                raise ValueError(f"prompt: the weight {products[-1]:g} in {mark.string[at : at + 40]!r} is too large")
            change()
        else:
            products.pop()
            change()
    parts[-1][0].append(prompt[at:])
    return [(text, weight) for text, weight in (("".join(texts), weight) for texts, weight in parts) if text]


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
        whole = tokenizer(plain, return_offsets_mapping=True, verbose=False)
        if len(whole.input_ids) > length:
            ends = [end for _, end in whole.offset_mapping]
            kept = ends[length - tokenizer.num_special_tokens_to_add()]
            warnings.warn(f"the prompt is clipped to {length} tokens; lost: {plain[kept:].strip()!r}", stacklevel=3)
        row = tokenizer(plain, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True)
        ids.append(row.input_ids)
        weights.append([by_character[start] if end > start else 1.0 for start, end in row.offset_mapping])
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32))


def texts(what: str, lines: str | Sequence[str] | None, count: int) -> list[str]:
    """`count` prompts from one, or from as many; None is the empty prompt. ValueError for another number."""
    lines = [""] if lines is None else [lines] if isinstance(lines, str) else list(lines)
    if len(lines) not in (1, count):
        raise ValueError(f"{what}: {len(lines)} texts for {count} images; expected 1 or {count}")
    return lines * count if len(lines) == 1 else lines
