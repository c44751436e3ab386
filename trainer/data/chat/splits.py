"""Which examples are for training, for validation and for test: files of their own, splits of a folder, or shares.

Knows names and numbers of examples; opens nothing but the list of a folder's splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formats.errors import UserError
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat.sources import Source, splits_of
from trainer.data.documents import names

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


_ONE_OF_THEM = "name the folder or file of one of them: `dataset.path`, `dataset.validation_path`, `dataset.test_path`"

type Parts = tuple[Part | None, Part | None, Part | None]


def path_of(config: FinetuningDatasetConfig) -> Path:
    """Where the examples are; UserError where that is not said. Opens nothing."""
    if config.path is None:
        raise UserError("`dataset.path` is not set", hint="name the examples to learn from: `dataset.path=examples.jsonl`")
    return Path(config.path)


def parts(config: FinetuningDatasetConfig) -> Parts:
    """For train, validation and test: what each has; None for one that has nothing.

    Validation and test have the files that `validation_path` and `test_path` name, else the folder's split of that name,
    else a share of the training examples; shares of those with examples of their own are left out. UserError where nothing is
    left to train on, or `split` is no split.
    """
    if not 0 <= config.random_seed < 2**32:
        raise UserError(f"`dataset.random_seed` is {config.random_seed}", hint=f"choose one from 0 to {2**32 - 1}")
    train, *own = _sources(config, path_of(config))
    asked = _shares(config.split)
    left = [asked[0], *(0.0 if source else share for source, share in zip(own, asked[1:], strict=True))]
    if not left[0]:
        raise UserError(
            f"`dataset.split` is `{config.split}`, which leaves nothing to train on", hint="its first entry is for training"
        )
    ends = [sum(left[:number]) / sum(left) for number in range(len(left))] + [1.0]
    shared = [Part(train, (ends[n], ends[n + 1]), config.random_seed) if left[n] else None for n in range(len(SPLITS))]
    return shared[0], _first(own[0], shared[1]), _first(own[1], shared[2])


def _first(own: Source | None, shared: Part | None) -> Part | None:
    return Part(own) if own else shared


def _sources(config: FinetuningDatasetConfig, path: Path) -> tuple[Source, Source | None, Source | None]:
    """What is to be trained on, or shared; validation and test where they have their own."""
    there = splits_of(path)
    found = [next((Source(path, name) for name in known if name in there), None) for known in _NAMES]
    if there and found[0] is None:
        raise UserError(
            f"`{path}` has no split `train`: it has {names(there)}",
            hint=_ONE_OF_THEM,
        )
    given = (config.validation_path, config.test_path)
    own = [_whole(Path(one), wanted) if one else known for one, wanted, known in zip(given, _NAMES[1:], found[1:], strict=True)]
    return found[0] or Source(path), own[0], own[1]


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
