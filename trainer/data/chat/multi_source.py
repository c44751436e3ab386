"""Combine several sources of examples: one blended stream for training, and a dataset per source for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from trainer.config import FinetuningDatasetConfig
from trainer.data.blend import Blend
from trainer.data.chat.dataset import ExampleDataset
from trainer.data.chat.sources import Source


def blend_sources(
    config: FinetuningDatasetConfig,
    sources: Mapping[Source, ExampleDataset],
    weights: Sequence[float] | None,
    samples: int,
    *,
    summary: Sequence[str],
) -> Dataset:
    """Return `samples` rows of the sources in proportion to `weights`, or to the rows of each. A row has examples of one source,
    which depends only on the row's number and the weights. `summary` becomes that of the dataset."""
    datasets = list(sources.values())
    if len(datasets) == 1:
        datasets[0].summary = tuple(summary)
        return datasets[0].take(samples)
    folder = Path(config.path_to_cache or f"{next(iter(sources)).path}.cache")
    weights = list(weights or (float(dataset.per_epoch) for dataset in datasets))
    blended = Blend(datasets, weights, samples=samples, folder=folder)
    blended.summary = tuple(summary)
    return blended


def evaluation_sets(sources: Mapping[Source, ExampleDataset], samples: int) -> ExampleDataset | dict[str, Dataset] | None:
    """Return `samples` rows of each source by name; the dataset itself for one source, and None for none."""
    named = {name: dataset.take(samples) for name, dataset in zip(_names(list(sources)), sources.values(), strict=True)}
    return next(iter(named.values()), None) if len(named) < 2 else {**named}


def _names(sources: Sequence[Source]) -> list[str]:
    """Return the last part of each path, or the whole path if several end alike."""
    short = [source.path.stem if source.path.is_file() else source.path.name for source in sources]
    counts = Counter(short)
    return [name if counts[name] == 1 else str(source.path) for name, source in zip(short, sources, strict=True)]
