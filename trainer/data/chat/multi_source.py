"""Combine several sources of examples: one blended stream for training, and a dataset per source for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from trainer.data.blend import Blend
from trainer.data.chat.dataset import ExampleDataset
from trainer.data.chat.sources import Source


def blend_sources(
    datasets: Sequence[ExampleDataset], weights: Sequence[float] | None, samples: int, *, folder: Path
) -> ExampleDataset | Blend:
    """Return `samples` rows of the datasets in proportion to `weights`, or to the rows of each. A row has examples of one
    source, which depends only on the row's number and the weights. A long blend keeps its order in `folder`."""
    if len(datasets) == 1:
        return datasets[0].take(samples)
    weights = list(weights or (float(dataset.per_epoch) for dataset in datasets))
    return Blend(datasets, weights, samples=samples, folder=folder)


def evaluation_sets(named: Mapping[str, ExampleDataset], samples: int) -> ExampleDataset | dict[str, Dataset] | None:
    """Return `samples` rows of each dataset by name; the dataset itself for one, and None for none."""
    shares = {name: dataset.take(samples) for name, dataset in named.items()}
    return next(iter(shares.values()), None) if len(shares) < 2 else {**shares}


def unique_names(sources: Sequence[Source]) -> list[str]:
    """Return the last part of each path, or the whole path if several end alike."""
    short = [source.path.stem if source.path.is_file() else source.path.name for source in sources]
    counts = Counter(short)
    return [name if counts[name] == 1 else str(source.path) for name, source in zip(short, sources, strict=True)]
