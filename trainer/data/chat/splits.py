"""Which examples are for training, for validation and for test: files of their own, splits of a folder, or shares; of one source
or of several.

Knows names and numbers of examples; opens nothing but the list of a folder's splits, and fetches what is on the Hub.
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
from trainer.data.records import names

SPLITS = ("train", "validation", "test")
_NAMES = (("train",), ("validation", "valid", "val", "dev"), ("test",))  # what folders call them


@dataclass(frozen=True, slots=True)
class Part:
    """The examples of one source that a split has."""

    source: Source
    share: tuple[float, float] = (0.0, 1.0)
    """From which to which fraction of the source's examples, in an order that the seed makes."""

    seed: int = 0

    def numbers(self, count: int) -> np.ndarray:
        """Which of `count` examples, ascending; int64, and none where the share is too small for one.

        Each example draws a number that depends on the seed and its own place alone, and the examples in the order of what
        they drew are cut by the shares. So parts of one source are disjoint, and all have their sizes to the example.
        """
        if self.share == (0.0, 1.0):
            return np.arange(count, dtype=np.int64)
        drawn = np.random.Generator(np.random.PCG64(self.seed)).random(count)
        order = np.argsort(drawn, kind="stable")
        return np.sort(order[round(self.share[0] * count) : round(self.share[1] * count)])


@dataclass(frozen=True, slots=True)
class Parts:
    """The examples of a run: for each split a part of each source that has some for it."""

    train: tuple[Part, ...]
    validation: tuple[Part, ...] = ()
    test: tuple[Part, ...] = ()
    weights: tuple[float, ...] | None = None
    """Of `train`; None for as many samples of each as it has."""

    def of(self, split: str) -> tuple[Part, ...]:
        """The parts of a split by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


_ONE_OF_THEM = "name the folder or file of one of them: `dataset.path`, `dataset.validation_path`, `dataset.test_path`"


def check_named(config: FinetuningDatasetConfig) -> None:
    """UserError where it is not said where the examples are, or said twice. Opens nothing."""
    if config.path is None and not config.blend:
        raise UserError("`dataset.path` is not set", hint="name the examples to learn from: `dataset.path=examples.jsonl`")
    if config.path is not None and config.blend:
        raise UserError("`dataset.path` and `dataset.blend` are both set", hint="use one of them")
    _weighted(config)


def parts(config: FinetuningDatasetConfig) -> Parts:
    """Validation and test have the files that `validation_path` and `test_path` name, else the folder's split of that name,
    else a share of the training examples; shares of those with examples of their own are left out. UserError where nothing is
    left to train on, or `split` is no split. To be called by one rank after another: it may fetch.
    """
    check_named(config)
    if not 0 <= config.random_seed < 2**32:
        raise UserError(f"`dataset.random_seed` is {config.random_seed}", hint=f"choose one from 0 to {2**32 - 1}")
    sources, weights = _weighted(config)
    given = [
        _given(config, one, known) for one, known in zip((config.validation_path, config.test_path), _NAMES[1:], strict=True)
    ]
    shared = [_of_source(config, hub.local(one, config.path_to_cache), given) for one in sources]
    of_split = [tuple(part for one in shared if (part := one[number])) for number in range(len(SPLITS))]
    validation, test = (found or rest for found, rest in zip(given, of_split[1:], strict=True))
    return Parts(of_split[0], validation, test, weights)


def _weighted(config: FinetuningDatasetConfig) -> tuple[list[str], tuple[float, ...] | None]:
    """Sources, and their weights if there are any."""
    told = [config.path] if config.path is not None else list(config.blend or ())
    sources, weights = told, None
    if any(not isinstance(one, str) for one in told):
        sources, weights = told[1::2], tuple(told[::2])
        if not _alternate(sources, weights):
            raise UserError(
                f"`{told}` is no blend",
                hint="it is a list of sources, or positive weights and sources in turns: `[0.3, a.jsonl, 0.7, b.jsonl]`",
            )
    twice = next((one for one in sources if sources.count(one) > 1), None)
    if twice:
        raise UserError(f"`dataset.blend` names `{twice}` twice", hint="name it once, with the sum of the weights")
    return sources, weights


def _alternate(sources: Sequence[Any], weights: Sequence[Any]) -> bool:
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one < math.inf for one in weights)
    return numbers and len(sources) == len(weights) and all(isinstance(one, str) for one in sources)


def _given(config: FinetuningDatasetConfig, told: str | Sequence[str] | None, wanted: tuple[str, ...]) -> tuple[Part, ...]:
    """What is named for a split."""
    found = [told] if isinstance(told, str) else told or []
    return tuple(Part(_whole(hub.local(one, config.path_to_cache), wanted)) for one in found)


def _of_source(
    config: FinetuningDatasetConfig, path: Path, given: Sequence[tuple[Part, ...]]
) -> tuple[Part | None, Part | None, Part | None]:
    """What a source has for each split, where that has nothing that is `given`."""
    train, *own = _splits(path)
    asked = _shares(config.split)
    taken = [bool(one) or source is not None for one, source in zip(given, own, strict=True)]
    left = [asked[0], *(0.0 if one else share for one, share in zip(taken, asked[1:], strict=True))]
    if not left[0]:
        raise UserError(
            f"`dataset.split` is `{config.split}`, which leaves nothing to train on", hint="its first entry is for training"
        )
    ends = [sum(left[:number]) / sum(left) for number in range(len(left))] + [1.0]
    shared = [Part(train, (ends[n], ends[n + 1]), config.random_seed) if left[n] else None for n in range(len(SPLITS))]
    return shared[0], _first(own[0], shared[1]), _first(own[1], shared[2])


def _first(own: Source | None, shared: Part | None) -> Part | None:
    return Part(own) if own else shared


def _splits(path: Path) -> tuple[Source, Source | None, Source | None]:
    """What is to be trained on, or shared; validation and test where a folder has them."""
    there = splits_of(path)
    found = [next((Source(path, name) for name in known if name in there), None) for known in _NAMES]
    if there and found[0] is None:
        raise UserError(f"`{path}` has no split `train`: it has {names(there)}", hint=_ONE_OF_THEM)
    return found[0] or Source(path), found[1], found[2]


def _whole(path: Path, wanted: tuple[str, ...]) -> Source:
    """Files for one split; of a folder of several the one of that name."""
    there = splits_of(path)
    name = next((one for one in wanted if one in there), None)
    if there and name is None:
        raise UserError(f"`{path}` has no split `{wanted[0]}`: it has {names(there)}", hint=_ONE_OF_THEM)
    return Source(path, name)


def _shares(split: str) -> list[float]:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 0 < len(shares) <= len(SPLITS) or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        raise UserError(f"`{split}` is not a split", hint="it is three shares for train, validation and test, as `95,5,0`")
    return shares + [0.0] * (len(SPLITS) - len(shares))
