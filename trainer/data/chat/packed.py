"""Folders that `mbtrain pack` makes: tokens of examples, and rows of them, for many runs.

A folder has a store (`trainer.data.chat.store`) for each split, `OUT/train`, or for each source of a split, `OUT/train/0`,
`OUT/train/1`, …, in the order of `dataset.blend`. `about.json` of each says what source it is of and its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from formats.errors import UserError
from formats.home import expanded
from trainer.config import FinetuningDatasetConfig
from trainer.data import cache
from trainer.data.chat import packing, store
from trainer.data.chat.dataset import ExampleDataset
from trainer.data.chat.examples import tokenizer_identity
from trainer.data.chat.multi_source import blend_sources, evaluation_sets, unique_names
from trainer.data.chat.split_datasets import (
    empty_split,
    example_numbers,
    make_dataset,
    summary_lines,
    tokenized_store,
)
from trainer.data.chat.splits import SPLITS, SplitSubsets, Subset, find_subsets
from trainer.data.chat.store import Store
from trainer.data.chat.tokenized import Tokenized
from trainer.data.interface import Splits
from trainer.settings import paths
from trainer.tokenizers import Tokenizer


def is_packed(path: Path) -> bool:
    """Return whether `pack` made this folder."""
    return bool(_stores(path / "train"))


def _stores(folder: Path) -> list[Path]:
    """Return the stores of a split: the folder itself, or one subfolder for each of several sources."""
    if store.is_store(folder):
        return [folder]
    numbered = [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and store.is_store(path)]
    return sorted(numbered, key=lambda path: int(path.name))


@dataclass(frozen=True, slots=True)
class PackedSplit:
    """The figures of one source of one split that `pack` wrote."""

    split: str
    source: str
    """The source's name, unique in its split."""

    weight: float | None
    """The source's share of the rows that a run trains on; None if it counts by its rows."""

    examples: int
    tokens: int
    trained: int
    rows: int
    filled: float
    """The fraction of the rows that is tokens of examples, not padding."""

    said: str
    reasons: tuple[str, ...]


def pack(
    config: FinetuningDatasetConfig, out: Path, *, tokenizer: Tokenizer, vocab_size: int, note: Callable[[str], None]
) -> list[PackedSplit]:
    """Write the tokens of all examples, and rows packed by best-fit decreasing, into the folder `out`, one subfolder per split.

    A run reads the folder as `dataset.path`, and mixes several sources by the weights of `dataset.blend`. `note` takes a line for
    each source and split that the default shares leave without examples. Raises UserError if `out` exists or an example cannot
    be used.
    """
    out, config = Path(expanded(out)), replace(config)
    paths.expand_section(config)
    if out.exists():
        raise UserError(f"`{out}` exists", hint="choose another folder, or remove it")
    splits: list[PackedSplit] = []

    def write(folder: Path) -> None:
        subsets = find_subsets(config)
        for split in SPLITS:
            tokenized = (
                (subset, tokenized_store(subset.source, folder / "all", tokenizer, config, vocab_size))
                for subset in subsets.of(split)
            )
            splits.extend(_pack_split(config, subsets, split, list(tokenized), folder / split, note=note))
        rmtree(folder / "all")

    try:
        created = cache.write_folder(out, write)
    except OSError as error:
        raise UserError(f"cannot write `{out}`: {error.strerror}", hint="choose a folder that can be written") from error
    if not created:
        raise UserError(f"`{out}` appeared while it was being written", hint="choose another folder, or remove it")
    return splits


def _pack_split(
    config: FinetuningDatasetConfig,
    subsets: SplitSubsets,
    split: str,
    tokenized: Sequence[tuple[Subset, Store]],
    folder: Path,
    *,
    note: Callable[[str], None],
) -> Iterator[PackedSplit]:
    """Write the sources of a split that have examples for it, and yield what was written."""
    parts = []
    for subset, stored in tokenized:
        numbers = example_numbers(subset, stored)
        if len(numbers):
            parts.append((subset.source, stored, numbers))
        else:
            note(empty_split(split, config, len(stored)))
    weights = subsets.weights if split == "train" else None
    for number, (name, (_, stored, numbers)) in enumerate(zip(unique_names([part[0] for part in parts]), parts, strict=True)):
        description = {"source": name, "sources": len(parts), "weight": weights[number] if weights and len(parts) > 1 else None}
        part_folder = folder if len(parts) == 1 else folder / str(number)
        packed, rows = _pack_source(config, stored, numbers, part_folder, description)
        counts = (packed.about[name] for name in ("examples", "tokens", "trained"))
        filled = packing.efficiency(packed.lengths, rows, capacity=config.sequence_length)
        yield PackedSplit(
            split, name, description["weight"], *counts, rows, filled, stored.about["said"], tuple(stored.about["reasons"])
        )


def _pack_source(
    config: FinetuningDatasetConfig, stored: Store, numbers: np.ndarray, folder: Path, description: dict[str, Any]
) -> tuple[Store, int]:
    """Write the examples `numbers` and their rows; return the new store and the number of its rows."""
    folder.mkdir(parents=True)
    multiple = config.pad_to_multiple_of or 1
    lengths = packing.pad_lengths(stored.lengths[numbers], multiple=multiple)
    rows = packing.best_fit_decreasing(lengths, capacity=config.sequence_length)
    description |= {name: stored.about[name] for name in ("made_of", "said", "reasons")}
    description |= {"sequence_length": config.sequence_length, "pad_to_multiple_of": multiple, "rows": len(rows)}
    examples = (Tokenized(*stored[number]) for number in numbers.tolist())
    store.write(folder, examples, vocab_size=stored.about["vocab_size"], about=lambda: description)
    for name, array in zip(store.ROWS, (rows.examples, rows.starts), strict=True):
        store.save_array(folder / name, array)
    return store.open_store(folder), len(rows)


def open_packed(
    config: FinetuningDatasetConfig, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]
) -> Splits:
    """Return the datasets of the folder `dataset.path`. Raises UserError if it was packed for other settings or is incomplete."""
    folder = Path(config.path or "")
    for name in ("validation_path", "test_path"):
        if getattr(config, name):
            raise UserError(
                f"`dataset.{name}` is `{getattr(config, name)}`, but `{folder}` has packed examples of all splits",
                hint="leave it out, or give it to `mbtrain pack`",
            )
    train, validation, test = (
        _open_split(config, folder / split, tokenizer, vocab_size) if count else {}
        for split, count in zip(SPLITS, samples, strict=True)
    )
    blended = None
    if train:
        weights = [dataset.store.about.get("weight") for dataset in train.values()]
        explicit_weights = None if None in weights else weights
        blended = blend_sources(
            list(train.values()), explicit_weights, samples[0], folder=Path(config.path_to_cache or f"{folder}.cache")
        )
        blended.summary = tuple(summary_lines({f"`{name}`": dataset for name, dataset in train.items()}))
    return blended, evaluation_sets(validation, samples[1]), evaluation_sets(test, samples[2])


def _open_split(
    config: FinetuningDatasetConfig, folder: Path, tokenizer: Tokenizer | None, vocab_size: int
) -> dict[str, ExampleDataset]:
    """Return the datasets of a split by the name of their source; empty if nothing was packed for it."""
    datasets: dict[str, ExampleDataset] = {}
    for path in _stores(folder):
        stored = store.open_store(path)
        _check_fits(stored, config, tokenizer, vocab_size)
        dataset = make_dataset(config, stored, np.arange(len(stored)), split=folder.name, rows=stored.rows)
        datasets[stored.about.get("source", folder.name)] = dataset
        expected = stored.about.get("sources", 1)
    if datasets and len(datasets) != expected:
        raise UserError(
            f"`{folder}` has {len(datasets)} of {expected} sources", hint="copy the whole folder, or pack the examples again"
        )
    return datasets


def _check_fits(stored: Store, config: FinetuningDatasetConfig, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Raise UserError if the run's settings, tokenizer or vocabulary differ from those of the packed folder."""
    advice = "pack the examples again"
    settings = {**asdict(config), "pad_to_multiple_of": config.pad_to_multiple_of or 1}
    for name in ("sequence_length", "pad_to_multiple_of"):
        if settings[name] != stored.about[name]:
            raise UserError(
                f"`dataset.{name}` is `{settings[name]}`, but `{stored.folder}` was packed with `{stored.about[name]}`",
                hint=f"set `dataset.{name}={stored.about[name]}`, or {advice}",
            )
    if not config.packed:
        raise UserError(f"`dataset.packed` is `False`, but `{stored.folder}` has packed examples", hint="leave it out")
    if tokenizer is not None and tokenizer_identity(tokenizer) != stored.about["made_of"]["tokenizer"]:
        raise UserError(
            f"`{stored.folder}` was packed with another tokenizer than this run's",
            hint=f"set `tokenizer.tokenizer_model` to the one it was packed with, or {advice}",
        )
    if stored.about["largest"] >= vocab_size:
        raise UserError(
            f"`{stored.folder}` has the token id {stored.about['largest']}, but the vocabulary has {vocab_size}",
            hint=f"{advice} with the model's tokenizer",
        )
