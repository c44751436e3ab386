"""Examples to learn answers from: from files of conversations, or of prompts and completions, to packed sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import FinetuningDatasetConfig
    from trainer.data import Splits
    from trainer.tokenizers import Tokenizer


def build(
    config: FinetuningDatasetConfig, *, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]
) -> Splits:
    """See `trainer.data.build`."""
    from trainer.data.chat import build  # noqa: PLC0415 - brings torch

    made: Any = build.build(config, tokenizer=tokenizer, vocab_size=vocab_size, samples=samples)
    return made
