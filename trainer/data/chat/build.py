"""Build the train, validation and test datasets of a `FinetuningDatasetConfig`.

Examples come from files, whose tokens are cached, or from a folder with tokens and rows that `mbtrain pack` made.
"""

from __future__ import annotations

from pathlib import Path

from formats.errors import UserError
from trainer.config import FinetuningDatasetConfig
from trainer.data import cache
from trainer.data.chat import packed
from trainer.data.chat.dataset import ExampleDataset
from trainer.data.chat.multi_source import blend_sources, evaluation_sets, unique_names
from trainer.data.chat.sources import Source
from trainer.data.chat.split_datasets import (
    empty_split,
    example_numbers,
    make_dataset,
    summary_lines,
    tokenized_store,
)
from trainer.data.chat.splits import SPLITS, check_sources, find_subsets
from trainer.data.interface import Splits
from trainer.tokenizers import Tokenizer


def build(
    config: FinetuningDatasetConfig, *, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]
) -> Splits:
    """Return the datasets as `trainer.data.build` does. Training has another order in each epoch; validation and test have the
    same order, and repeat. The `summary` of the training dataset describes the sources."""
    if _is_prepacked(config):
        return cache.first_rank_first(lambda: packed.open_packed(config, tokenizer, vocab_size, samples))
    return cache.first_rank_first(lambda: _build_from_files(config, require_tokenizer(tokenizer), vocab_size, samples))


def check(config: FinetuningDatasetConfig) -> None:
    """Raise UserError if there are no training examples. Every rank calls this."""
    check_sources(config)
    if not _is_prepacked(config):
        cache.first_rank_first(lambda: [subset.source.files() for subset in find_subsets(config).train])


def _is_prepacked(config: FinetuningDatasetConfig) -> bool:
    return config.path is not None and packed.is_packed(Path(config.path))


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer. Raises UserError if it is None."""
    if tokenizer is None:
        raise UserError(
            "the examples need a tokenizer, and none is set",
            hint="name a folder with `tokenizer.json`: `tokenizer.tokenizer_model=DIR`",
        )
    return tokenizer


def _build_from_files(
    config: FinetuningDatasetConfig, tokenizer: Tokenizer, vocab_size: int, samples: tuple[int, int, int]
) -> Splits:
    subsets, notes = find_subsets(config), list[str]()

    def open_split(split: str, count: int) -> dict[Source, ExampleDataset]:
        """Return the datasets of a split by source."""
        datasets: dict[Source, ExampleDataset] = {}
        for subset in subsets.of(split) if count else ():
            folder = _cache_folder(config, subset.source)
            stored = tokenized_store(subset.source, folder, tokenizer, config, vocab_size)
            numbers = example_numbers(subset, stored)
            if len(numbers):
                datasets[subset.source] = make_dataset(config, stored, numbers, split=split, folder=folder)
            else:
                notes.append(empty_split(split, config, len(stored)))
        return datasets

    train, *held_out = (open_split(split, count) for split, count in zip(SPLITS, samples, strict=True))
    blended = None
    if train:
        folder = _cache_folder(config, next(iter(train)))
        blended = blend_sources(list(train.values()), subsets.weights, samples[0], folder=folder)
        blended.summary = (*summary_lines({source.name: dataset for source, dataset in train.items()}), *notes)
    validation, test = (
        evaluation_sets(dict(zip(unique_names(list(datasets)), datasets.values(), strict=True)), count)
        for datasets, count in zip(held_out, samples[1:], strict=True)
    )
    return blended, validation, test


def _cache_folder(config: FinetuningDatasetConfig, source: Source) -> Path:
    return Path(config.path_to_cache or f"{source.path}.cache")
