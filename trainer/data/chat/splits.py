"""Assign examples to train, validation and test: by files, by the splits of a folder, or by shares of one or several sources.

Works on names and numbers of examples. It reads the split lists of folders and downloads Hub datasets, but no examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import UserError
from trainer.config import FinetuningDatasetConfig
from trainer.data import hub
from trainer.data.chat.sources import Source, splits_of
from trainer.data.records import list_some

SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = (("train",), ("validation", "valid", "val", "dev"), ("test",))  # in folders


@dataclass(frozen=True, slots=True)
class Subset:
    """The examples of one source that belong to one split."""

    source: Source
    share: tuple[float, float] = (0.0, 1.0)
    """The range of the source's examples, as fractions of their number, in an order drawn from `seed`."""

    seed: int = 0

    def numbers(self, count: int) -> np.ndarray:
        """Return which of `count` examples belong to this subset: int64, ascending, empty if the share is below one example.

        Each example draws a random number that depends only on the seed and its position. The examples, sorted by these numbers,
        are cut at the shares, so the subsets of a source are disjoint and their sizes are exact.
        """
        if self.share == (0.0, 1.0):
            return np.arange(count, dtype=np.int64)
        drawn = np.random.Generator(np.random.PCG64(self.seed)).random(count)
        order = np.argsort(drawn, kind="stable")
        return np.sort(order[round(self.share[0] * count) : round(self.share[1] * count)])


@dataclass(frozen=True, slots=True)
class SplitSubsets:
    """The subsets of a run, by split; a split has one subset per source that contributes to it."""

    train: tuple[Subset, ...]
    validation: tuple[Subset, ...] = ()
    test: tuple[Subset, ...] = ()
    weights: tuple[float, ...] | None = None
    """The weights of `train`; None if each subset counts by its samples."""

    def of(self, split: str) -> tuple[Subset, ...]:
        """Return the subsets of a split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


_NAME_A_SPLIT = "name the folder or file of one of them: `dataset.path`, `dataset.validation_path`, `dataset.test_path`"


def check_sources(config: FinetuningDatasetConfig) -> None:
    """Raise UserError if the source of the examples is missing or given twice. Opens no files."""
    if config.path is None and not config.blend:
        raise UserError("`dataset.path` is not set", hint="name the examples to learn from: `dataset.path=examples.jsonl`")
    if config.path is not None and config.blend:
        raise UserError("`dataset.path` and `dataset.blend` are both set", hint="use one of them")
    _sources_and_weights(config)


def find_subsets(config: FinetuningDatasetConfig) -> SplitSubsets:
    """Return the subsets of each split.

    Validation and test come from `validation_path` and `test_path`, else from the folder's split of that name, else from a share
    of the training examples; the share of a split with its own examples is ignored. Raises UserError if nothing is left to train
    on, or `dataset.split` is malformed. Ranks call this in turn, since it may download.
    """
    check_sources(config)
    if not 0 <= config.random_seed < 2**32:
        raise UserError(f"`dataset.random_seed` is {config.random_seed}", hint=f"choose one from 0 to {2**32 - 1}")
    sources, weights = _sources_and_weights(config)
    held_out = ((config.validation_path, _SPLIT_NAMES[1]), (config.test_path, _SPLIT_NAMES[2]))
    of_config = [_named_subsets(config, paths, names) for paths, names in held_out]
    of_sources = [_subsets_of(config, hub.local_path(source, config.path_to_cache), of_config) for source in sources]
    by_split = [tuple(subset for subsets in of_sources if (subset := subsets[number])) for number in range(len(SPLITS))]
    validation, test = (from_config or from_sources for from_config, from_sources in zip(of_config, by_split[1:], strict=True))
    return SplitSubsets(by_split[0], validation, test, weights)


def _sources_and_weights(config: FinetuningDatasetConfig) -> tuple[list[str], tuple[float, ...] | None]:
    """Return the sources, and their weights if the blend has any."""
    entries = [config.path] if config.path is not None else list(config.blend or ())
    sources, weights = entries, None
    if any(not isinstance(entry, str) for entry in entries):
        sources, weights = entries[1::2], tuple(entries[::2])
        if not _alternate(sources, weights):
            raise UserError(
                f"`{entries}` is not a blend",
                hint="it is a list of sources, or positive weights and sources alternating: `[0.3, a.jsonl, 0.7, b.jsonl]`",
            )
    duplicate = next((source for source in sources if sources.count(source) > 1), None)
    if duplicate:
        raise UserError(f"`dataset.blend` names `{duplicate}` twice", hint="name it once, with the sum of the weights")
    return sources, weights


def _alternate(sources: Sequence[Any], weights: Sequence[Any]) -> bool:
    positive = all(isinstance(item, (int, float)) and not isinstance(item, bool) and 0 < item < math.inf for item in weights)
    return positive and len(sources) == len(weights) and all(isinstance(source, str) for source in sources)


def _named_subsets(
    config: FinetuningDatasetConfig, paths: str | Sequence[str] | None, names: tuple[str, ...]
) -> tuple[Subset, ...]:
    """Return the subsets of a split that has paths of its own; `names` are those of the split in a folder of several."""
    listed = [paths] if isinstance(paths, str) else paths or []
    return tuple(Subset(_source_for(hub.local_path(path, config.path_to_cache), names)) for path in listed)


def _subsets_of(
    config: FinetuningDatasetConfig, path: Path, of_config: Sequence[tuple[Subset, ...]]
) -> tuple[Subset | None, Subset | None, Subset | None]:
    """Return what a source contributes to each split. Splits with `named` subsets or with a split of their own get no share."""
    train, *of_folder = _split_sources(path)
    shares = _shares(config.split)
    for number, (subsets, source) in enumerate(zip(of_config, of_folder, strict=True), 1):
        shares[number] = 0.0 if subsets or source else shares[number]
    if not shares[0]:
        raise UserError(
            f"`dataset.split` is `{config.split}`, which leaves nothing to train on", hint="its first entry is for training"
        )
    ends = [sum(shares[:number]) / sum(shares) for number in range(len(shares))] + [1.0]
    shared = [Subset(train, (ends[n], ends[n + 1]), config.random_seed) if shares[n] else None for n in range(len(SPLITS))]
    validation, test = (Subset(source) if source else subset for source, subset in zip(of_folder, shared[1:], strict=True))
    return shared[0], validation, test


def _split_sources(path: Path) -> tuple[Source, Source | None, Source | None]:
    """Return the source of training examples, and those of validation and test if the folder has such splits."""
    splits = splits_of(path)
    train, validation, test = (next((Source(path, name) for name in names if name in splits), None) for names in _SPLIT_NAMES)
    if splits and train is None:
        raise UserError(f"`{path}` has no split `train`: it has {list_some(splits)}", hint=_NAME_A_SPLIT)
    return train or Source(path), validation, test


def _source_for(path: Path, names: tuple[str, ...]) -> Source:
    """Return the source of one split: all of `path`, or in a folder of several splits the one with one of the `names`."""
    splits = splits_of(path)
    name = next((name for name in names if name in splits), None)
    if splits and name is None:
        raise UserError(f"`{path}` has no split `{names[0]}`: it has {list_some(splits)}", hint=_NAME_A_SPLIT)
    return Source(path, name)


def _shares(split: str) -> list[float]:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 0 < len(shares) <= len(SPLITS) or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        raise UserError(f"`{split}` is not a split", hint="it is three shares for train, validation and test, as `95,5,0`")
    return shares + [0.0] * (len(SPLITS) - len(shares))
