"""The stages of an example: rendered texts, which are tokenized in batches, then tokens with a loss mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.tokenizers import Encoded, Tokenizer


@dataclass(frozen=True, slots=True)
class Tokenized:
    """An example in tokens, with a loss mask of the same length."""

    tokens: np.ndarray
    """`[length]`, int32."""

    trained: np.ndarray
    """`[length]`, bool: whether the model learns to predict this token."""

    location: str = ""
    """The file and line or row of the example, for messages."""

    continues_previous: bool = False
    """Whether the example is from the same conversation as the one before it."""


@dataclass(frozen=True, slots=True)
class RenderedText:
    """An example as texts to tokenize, and the function that makes a `Tokenized` of their tokens."""

    texts: list[str]
    finish: Callable[[Sequence[Encoded]], Tokenized]
    """Takes the tokens of `texts`. Raises UnusableError if they cannot be joined."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Tokens from a library that gives no character offsets."""

    ids: list[int]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Raise NotImplementedError."""
        raise NotImplementedError


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Return the tokens of each text, without begin or end tokens. Equal texts are tokenized once."""
    unique = list(dict.fromkeys(texts))
    if tokenizer.encode_batch is not None:
        encoded: Sequence[Encoded] = tokenizer.encode_batch(unique)
    else:
        encoded = [TokenIds(tokenizer.encode(text)) for text in unique]
    by_text = dict(zip(unique, encoded, strict=True))
    return [by_text[text] for text in texts]


def make_tokenized(tokens: Sequence[int], trained: np.ndarray) -> Tokenized:
    """Return an example of these tokens, as int32, and this mask."""
    return Tokenized(np.array(tokens, np.int32), trained)
