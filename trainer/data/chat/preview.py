"""Format examples and statistics of them as text, for `mbtrain preview`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from trainer.data.chat.tokenized import Tokenized
from trainer.tokenizers import Tokenizer

_BINS, _WIDTH = 8, 40
_BEFORE = 8  # tokens decoded as context: some tokenizers drop the first space of a text

type Highlight = Callable[[str], str]


def brackets(text: str) -> str:
    """Return the text in brackets, to highlight it without colors."""
    return f"⟦{text}⟧"


def example_text(example: Tokenized, tokenizer: Tokenizer, *, highlight: Highlight, separator: str = "") -> str:
    """Return the whole text of an example, special tokens included. `highlight` is applied to runs of learned tokens, and
    `separator` is put between the tokens of a run. Line ends and control characters are made visible."""
    tokens, trained = example.tokens.tolist(), example.trained
    ends = [*np.flatnonzero(np.diff(trained)) + 1, len(tokens)]
    starts = [0, *ends[:-1]]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        pieces = _pieces(tokens, start, end, tokenizer) if separator else [_decode(tokens, start, end, tokenizer)]
        text = separator.join(_visible(piece) for piece in pieces)
        parts.append(highlight(text) if trained[start] else text)
    return "".join(parts)


def _decode(tokens: Sequence[int], start: int, end: int, tokenizer: Tokenizer) -> str:
    first = max(start - _BEFORE, 0)
    return tokenizer.decode(tokens[first:end])[len(tokenizer.decode(tokens[first:start])) :]


def _pieces(tokens: Sequence[int], start: int, end: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of each token, or of several tokens that only together are whole characters."""
    begin = start
    for stop in range(start + 1, end + 1):
        text = _decode(tokens, begin, stop, tokenizer)
        if "�" not in text or stop == end:
            yield text
            begin = stop


def _visible(text: str) -> str:
    return "".join(_SHOWN.get(letter, letter if letter.isprintable() else ascii(letter)[1:-1]) for letter in text)


_SHOWN = {"\n": "↵\n", "\t": "→\t"}


def histogram(lengths: Sequence[int]) -> list[str]:
    """Return a line for each range of lengths, in tokens, with a bar for the number of examples in it."""
    edges = np.unique(np.linspace(0, max(lengths), _BINS + 1).round().astype(int))
    counts = np.histogram(lengths, edges + 0.5)[0].tolist()
    names = [f"{low + 1:,}-{high:,}" if low + 1 < high else f"{high:,}" for low, high in pairwise(edges)]
    wide = max(len(name) for name in names)
    bars = ["█" * -(-_WIDTH * count // max(counts)) for count in counts]
    return [f"{name:>{wide}}  {bar} {count:,}" for name, bar, count in zip(names, bars, counts, strict=True)]


def fill_line(lengths: Sequence[int], sequence_length: int) -> str:
    """Return a line that says how full sequences of one example each would be, in %."""
    share = 100 * sum(lengths) / (len(lengths) * sequence_length)
    return f"unpacked, with one example per sequence, {share:.1f} % of {sequence_length} tokens would be filled"
