"""Several sources of examples: one stream of samples for training, and a set for each where a model is evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from trainer.config import FinetuningDatasetConfig
from trainer.data.blend import Blend
from trainer.data.chat.dataset import Examples
from trainer.data.chat.sources import Source


def blend(
    config: FinetuningDatasetConfig,
    sources: Mapping[Source, Examples],
    weights: Sequence[float] | None,
    samples: int,
    *,
    told: Sequence[str],
) -> Dataset:
    """So many samples of the sources by their weights, or by how many rows each has. Each row is of one source, and which it is
    depends on its number and the weights alone. `told` becomes the summary."""
    opened = list(sources.values())
    if len(opened) == 1:
        opened[0].summary = tuple(told)
        return opened[0].take(samples)
    folder = Path(config.path_to_cache or f"{next(iter(sources)).path}.cache")
    found = Blend(opened, list(weights or (float(one.per_epoch) for one in opened)), samples=samples, folder=folder)
    found.summary = tuple(told)
    return found


def by_name(sources: Mapping[Source, Examples], samples: int) -> Examples | dict[str, Dataset] | None:
    """So many samples of each source, by its name; without names where there is one; None where there is none."""
    found = {name: one.take(samples) for name, one in zip(_names(list(sources)), sources.values(), strict=True)}
    return next(iter(found.values()), None) if len(found) < 2 else {**found}


def _names(sources: Sequence[Source]) -> list[str]:
    """Of files and folders their last names, or whole paths where those are the same."""
    short = [one.path.stem if one.path.is_file() else one.path.name for one in sources]
    counted = Counter(short)
    return [name if counted[name] == 1 else str(one.path) for name, one in zip(short, sources, strict=True)]
