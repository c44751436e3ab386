"""Tokenize a source, choose the examples of a split, and make a dataset of them; for `build` and `packed`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from formats.errors import UserError
from trainer.config import FinetuningDatasetConfig
from trainer.data import cache
from trainer.data.chat import store
from trainer.data.chat.dataset import ExampleDataset
from trainer.data.chat.examples import Counts, identity, read_examples
from trainer.data.chat.sources import Source
from trainer.data.chat.splits import Subset
from trainer.data.chat.store import Store
from trainer.tokenizers import Tokenizer


def example_numbers(subset: Subset, stored: Store) -> np.ndarray:
    """Return the examples of the subset's conversations, int64, ascending."""
    groups = stored.groups
    return np.flatnonzero(np.isin(groups, subset.numbers(int(groups[-1]) + 1)))


def make_dataset(
    config: FinetuningDatasetConfig, stored: Store, numbers: np.ndarray, *, split: str, **further: Any
) -> ExampleDataset:
    """Return the examples `numbers` of a store as the settings want them: shuffled for training, else in order."""
    return ExampleDataset(
        stored,
        numbers,
        sequence_length=config.sequence_length,
        packed=config.packed,
        multiple=config.pad_to_multiple_of or 1,
        seed=config.random_seed,
        shuffled=split == "train",
        **further,
    )


def summary_lines(train: Mapping[str, ExampleDataset]) -> Iterator[str]:
    """Yield lines that describe each source and the packing; names are given if there are several."""
    for name, examples in train.items():
        description, prefix = examples.store.about, f"{name}: " if len(train) > 1 else ""
        filled = f"{100 * examples.efficiency:.1f} % of {'packed ' if examples.packed else ''}rows filled"
        yield from (f"{prefix}{description['said']}; {filled}", *description["reasons"])


def empty_split(split: str, config: FinetuningDatasetConfig, count: int) -> str:
    """Return a note if the default shares leave no examples for validation or test. Raises UserError otherwise."""
    message = f"`dataset.split={config.split}` of {count} examples leaves none for {split}"
    if split == "train" or config.split != FinetuningDatasetConfig.split:
        raise UserError(message, hint="change its share, or use more examples")
    return f"note: {message}"


_TOKENIZATION_VERSION = 4
"""The version of how examples become tokens: a part of the cache key, so that tokens of an earlier version are made again."""


def tokenized_store(
    source: Source, folder: Path, tokenizer: Tokenizer, config: FinetuningDatasetConfig, vocab_size: int
) -> Store:
    """Return the tokenized examples of a source, from the cache if nothing that they depend on has changed."""
    made_of = _identity(source, tokenizer, config)
    key = blake3.blake3(
        json.dumps([store.VERSION, _TOKENIZATION_VERSION, vocab_size, made_of], sort_keys=True).encode()
    ).hexdigest()[:32]
    counts = Counts()
    try:
        return store.open_or_write(
            folder,
            f"tokens-{key}",
            lambda: read_examples(source, tokenizer, config, counts=counts),
            vocab_size=vocab_size,
            about=lambda: {"made_of": made_of, "said": str(counts), "reasons": counts.reasons()},
        )
    except OSError as error:
        raise cache.cannot_write(folder, "tokens", error) from error


def _identity(source: Source, tokenizer: Tokenizer, config: FinetuningDatasetConfig) -> dict[str, Any]:
    return {**identity(source, tokenizer, config), "split": source.split}
