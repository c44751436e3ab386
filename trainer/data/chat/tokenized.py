"""What examples become on their way to tokens: texts first, so that many are tokenized at once, then tokens and what is learned.

Knows neither files nor templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.tokenizers import Encoded, Tokenizer


@dataclass(frozen=True, slots=True)
class Tokenized:
    """An example as the model sees it; the arrays are of equal length."""

    tokens: np.ndarray
    """`[length]`, int32."""

    trained: np.ndarray
    """`[length]`, bool: is this token learned, as what follows those before it?"""

    place: str = ""
    """For a message: where the example stands."""

    goes_on: bool = False
    """Is it of the same conversation as the example before it?"""


@dataclass(frozen=True, slots=True)
class RenderedText:
    """An example as texts to tokenize."""

    texts: list[str]
    finish: Callable[[Sequence[Encoded]], Tokenized]
    """From the tokens of the texts; UnusableError where they do not fit together."""


@dataclass(frozen=True, slots=True)
class Ids:
    """Tokens of a library that does not tell their places."""

    ids: list[int]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Not to be asked."""
        raise NotImplementedError


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """The tokens of each text and nothing else: no token for its begin or end. A text that stands there twice is read once."""
    different = list(dict.fromkeys(texts))
    if tokenizer.encode_batch is not None:
        found: Sequence[Encoded] = tokenizer.encode_batch(different)
    else:
        found = [Ids(tokenizer.encode(text)) for text in different]
    tokens = dict(zip(different, found, strict=True))
    return [tokens[text] for text in texts]


def tokenized(tokens: Sequence[int], trained: np.ndarray) -> Tokenized:
    """Both as arrays."""
    return Tokenized(np.array(tokens, np.int32), trained)
