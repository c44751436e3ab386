"""Examples and figures about them as text, for a person who asks what a model would learn. Knows no terminal and no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from trainer.data.chat.tokenized import Tokenized
from trainer.tokenizers import Tokenizer

_BINS, _WIDTH = 8, 40
_BEFORE = 8  # tokens that are decoded with those after them: some tokenizers leave a text's first space out

type Mark = Callable[[str], str]


def brackets(text: str) -> str:
    """What is learned, where there are no colors."""
    return f"⟦{text}⟧"


def example_text(example: Tokenized, tokenizer: Tokenizer, *, mark: Mark, separator: str = "") -> str:
    """The whole text of an example, special tokens included, with what is learned as `mark` shows it and `separator` between
    the tokens of a stretch. Line ends and control characters can be seen."""
    tokens, trained = example.tokens.tolist(), example.trained
    ends = [*np.flatnonzero(np.diff(trained)) + 1, len(tokens)]
    starts = [0, *ends[:-1]]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        pieces = _pieces(tokens, start, end, tokenizer) if separator else [_between(tokens, start, end, tokenizer)]
        text = separator.join(_visible(piece) for piece in pieces)
        parts.append(mark(text) if trained[start] else text)
    return "".join(parts)


def _between(tokens: Sequence[int], start: int, end: int, tokenizer: Tokenizer) -> str:
    first = max(start - _BEFORE, 0)
    return tokenizer.decode(tokens[first:end])[len(tokenizer.decode(tokens[first:start])) :]


def _pieces(tokens: Sequence[int], start: int, end: int, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token; of several together where only they make whole characters."""
    begun = start
    for stop in range(start + 1, end + 1):
        text = _between(tokens, begun, stop, tokenizer)
        if "�" not in text or stop == end:
            yield text
            begun = stop


def _visible(text: str) -> str:
    return "".join(_SHOWN.get(letter, letter if letter.isprintable() else ascii(letter)[1:-1]) for letter in text)


_SHOWN = {"\n": "↵\n", "\t": "→\t"}


def histogram(lengths: Sequence[int]) -> list[str]:
    """A line for each range of lengths, in tokens, and a bar as long as there are examples in it."""
    edges = np.unique(np.linspace(0, max(lengths), _BINS + 1).round().astype(int))
    counts = np.histogram(lengths, edges + 0.5)[0].tolist()
    names = [f"{low + 1:,}-{high:,}" if low + 1 < high else f"{high:,}" for low, high in pairwise(edges)]
    wide = max(len(name) for name in names)
    bars = ["█" * -(-_WIDTH * count // max(counts)) for count in counts]
    return [f"{name:>{wide}}  {bar} {count:,}" for name, bar, count in zip(names, bars, counts, strict=True)]


def filling(lengths: Sequence[int], sequence_length: int) -> str:
    """How full sequences are that hold an example each."""
    share = 100 * sum(lengths) / (len(lengths) * sequence_length)
    return f"one to a sequence, examples would fill {share:.1f} % of {sequence_length} tokens"
