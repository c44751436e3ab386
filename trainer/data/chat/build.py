"""Build the train, validation and test datasets of a `FinetuningDatasetConfig`, and the folders of `mbtrain pack`.

Examples come from files, whose tokens are cached, or from a folder with tokens and rows that `mbtrain pack` made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import blake3
import numpy as np

from formats.errors import UserError
from formats.home import expanded
from trainer.config import FinetuningDatasetConfig
from trainer.data import cache
from trainer.data.chat import packing, store
from trainer.data.chat.dataset import ExampleDataset
from trainer.data.chat.examples import Counts, Tokenized, identity, read_examples, tokenizer_identity
from trainer.data.chat.multi_source import blend_sources, evaluation_sets
from trainer.data.chat.sources import Source
from trainer.data.chat.splits import SPLITS, Subset, check_sources, find_subsets
from trainer.data.chat.store import Store
from trainer.data.interface import Splits
from trainer.settings import paths
from trainer.tokenizers import Tokenizer


def build(
    config: FinetuningDatasetConfig, *, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]
) -> Splits:
    """Return the datasets as `trainer.data.build` does. Training has another order in each epoch; validation and test have the
    same
    order, and repeat. The `summary` of the training dataset describes the sources."""
    if _is_prepacked(config):
        return cache.first_rank_first(lambda: _open_packed(config, Path(config.path or ""), tokenizer, vocab_size, samples))
    return cache.first_rank_first(lambda: _build_from_files(config, require_tokenizer(tokenizer), vocab_size, samples))


def check(config: FinetuningDatasetConfig) -> None:
    """Raise UserError if there are no training examples. Every rank calls this."""
    check_sources(config)
    if not _is_prepacked(config):
        cache.first_rank_first(lambda: [subset.source.files() for subset in find_subsets(config).train])


def _is_prepacked(config: FinetuningDatasetConfig) -> bool:
    return config.path is not None and is_packed(Path(config.path))


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
            folder = Path(config.path_to_cache or f"{subset.source.path}.cache")
            stored = _tokenized_store(subset.source, folder, tokenizer, config, vocab_size)
            numbers = _example_numbers(subset, stored)
            if len(numbers):
                datasets[subset.source] = _dataset(config, stored, numbers, split=split, folder=folder)
            else:
                notes.append(_empty_split(split, config, len(stored)))
        return datasets

    train, validation, test = (open_split(split, count) for split, count in zip(SPLITS, samples, strict=True))
    summary = [*_summary_lines(train), *notes]
    blended = blend_sources(config, train, subsets.weights, samples[0], summary=summary) if train else None
    return blended, evaluation_sets(validation, samples[1]), evaluation_sets(test, samples[2])


def _example_numbers(subset: Subset, stored: Store) -> np.ndarray:
    """Return the examples of the subset's conversations, int64, ascending."""
    groups = stored.groups
    return np.flatnonzero(np.isin(groups, subset.numbers(int(groups[-1]) + 1)))


def _dataset(
    config: FinetuningDatasetConfig, stored: Store, numbers: np.ndarray, *, split: str, **further: Any
) -> ExampleDataset:
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


def _summary_lines(train: Mapping[Source, ExampleDataset]) -> Iterator[str]:
    """Yield lines that describe each source and the packing."""
    for source, examples in train.items():
        about, name = examples.store.about, f"{source.name}: " if len(train) > 1 else ""
        filled = f"{100 * examples.efficiency:.1f} % of {'packed ' if examples.packed else ''}rows filled"
        yield from (f"{name}{about['said']}; {filled}", *about["reasons"])


def _empty_split(split: str, config: FinetuningDatasetConfig, count: int) -> str:
    """Return a note if the default shares leave no examples for validation or test. Raises UserError otherwise."""
    message = f"`dataset.split={config.split}` of {count} examples leaves none for {split}"
    if split == "train" or config.split != FinetuningDatasetConfig.split:
        raise UserError(message, hint="change its share, or use more examples")
    return f"note: {message}"


_TOKENIZATION_VERSION = 4
"""The version of how examples become tokens: a part of the cache key, so that tokens of an earlier version are made again."""


def _tokenized_store(
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


def is_packed(path: Path) -> bool:
    """Return whether `pack` made this folder."""
    return store.is_store(path / "train")


@dataclass(frozen=True, slots=True)
class PackedSplit:
    """The figures of one split that `pack` wrote."""

    split: str
    examples: int
    tokens: int
    trained: int
    rows: int
    filled: float
    """The fraction of the rows that is tokens of examples, not padding."""

    said: str
    reasons: tuple[str, ...]


def pack(config: FinetuningDatasetConfig, out: Path, *, tokenizer: Tokenizer, vocab_size: int) -> list[PackedSplit]:
    """Write the tokens of all examples, and rows packed by best-fit decreasing, into the folder `out`, one subfolder per split.

    A run reads the folder as `dataset.path`. Raises UserError if `out` exists or an example cannot be used.
    """
    if config.blend or isinstance(config.validation_path, list) or isinstance(config.test_path, list):
        raise UserError("`mbtrain pack` packs one source per split, and several are set", hint="pack one: `dataset.path`")
    out, config = Path(expanded(out)), replace(config)
    paths.expand_section(config)
    if out.exists():
        raise UserError(f"`{out}` exists", hint="choose another folder, or remove it")
    done: list[PackedSplit] = []

    def write(folder: Path) -> None:
        subsets = find_subsets(config)
        for split in SPLITS:
            for subset in subsets.of(split):
                stored = _tokenized_store(subset.source, folder / "all", tokenizer, config, vocab_size)
                done.extend(_pack_split(config, subset, stored, folder / split, split=split))
        rmtree(folder / "all")

    try:
        created = cache.write_folder(out, write)
    except OSError as error:
        raise UserError(f"cannot write `{out}`: {error.strerror}", hint="choose a folder that can be written") from error
    if not created:
        raise UserError(f"`{out}` appeared while it was being written", hint="choose another folder, or remove it")
    return done


def _pack_split(
    config: FinetuningDatasetConfig, subset: Subset, stored: Store, folder: Path, *, split: str
) -> Iterator[PackedSplit]:
    numbers = _example_numbers(subset, stored)
    if not len(numbers):
        _empty_split(split, config, len(stored))
        return
    folder.mkdir()
    multiple = config.pad_to_multiple_of or 1
    lengths = packing.pad_lengths(stored.lengths[numbers], multiple=multiple)
    rows = packing.best_fit_decreasing(lengths, capacity=config.sequence_length)
    about = {name: stored.about[name] for name in ("made_of", "said", "reasons")}
    about |= {"sequence_length": config.sequence_length, "pad_to_multiple_of": multiple, "rows": len(rows)}
    examples = (Tokenized(*stored[number]) for number in numbers.tolist())
    store.write(folder, examples, vocab_size=stored.about["vocab_size"], about=lambda: about)
    for name, array in zip(store.ROWS, (rows.examples, rows.starts), strict=True):
        store.save_array(folder / name, array)
    packed = store.open_store(folder)
    filled = packing.efficiency(packed.lengths, len(rows), capacity=config.sequence_length)
    counts = (packed.about[name] for name in ("examples", "tokens", "trained"))
    yield PackedSplit(split, *counts, len(rows), filled, about["said"], tuple(about["reasons"]))


def _open_packed(
    config: FinetuningDatasetConfig, folder: Path, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]
) -> Splits:
    for name in ("validation_path", "test_path"):
        if getattr(config, name):
            raise UserError(
                f"`dataset.{name}` is `{getattr(config, name)}`, but `{folder}` has packed examples of all splits",
                hint="leave it out, or give it to `mbtrain pack`",
            )
    datasets: list[ExampleDataset | None] = []
    for split, count in zip(SPLITS, samples, strict=True):
        if not count or not store.is_store(folder / split):
            datasets.append(None)
            continue
        stored = store.open_store(folder / split)
        _check_fits(stored, config, tokenizer, vocab_size)
        datasets.append(_dataset(config, stored, np.arange(len(stored)), split=split, rows=stored.rows).take(count))
    train, validation, test = datasets
    if train is not None:
        train.summary = tuple(_summary_lines({Source(folder): train}))
    return train, validation, test


def _check_fits(stored: Store, config: FinetuningDatasetConfig, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Raise UserError if the run's settings, tokenizer or vocabulary differ from those of the packed folder."""
    again = "pack the examples again"
    settings = {**asdict(config), "pad_to_multiple_of": config.pad_to_multiple_of or 1}
    for name in ("sequence_length", "pad_to_multiple_of"):
        if settings[name] != stored.about[name]:
            raise UserError(
                f"`dataset.{name}` is `{settings[name]}`, but `{stored.folder}` was packed with `{stored.about[name]}`",
                hint=f"set `dataset.{name}={stored.about[name]}`, or {again}",
            )
    if not config.packed:
        raise UserError(f"`dataset.packed` is `False`, but `{stored.folder}` has packed examples", hint="leave it out")
    if tokenizer is not None and tokenizer_identity(tokenizer) != stored.about["made_of"]["tokenizer"]:
        raise UserError(
            f"`{stored.folder}` was packed with another tokenizer than this run's",
            hint=f"set `tokenizer.tokenizer_model` to the one it was packed with, or {again}",
        )
    if stored.about["largest"] >= vocab_size:
        raise UserError(
            f"`{stored.folder}` has the token id {stored.about['largest']}, but the vocabulary has {vocab_size}",
            hint=f"{again} with the model's tokenizer",
        )
