"""Small prepared data, and a rank that reads it."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch import distributed

from trainer import data
from trainer.config import DatasetConfig
from trainer.data import cache

LENGTH = 16


def write(prefix, *, documents=60, seed=0):
    """Documents of 5 to 40 tokens, every token of the corpus another one."""
    chosen, token = random.Random(seed), 1000 * seed
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32)
    for _ in range(documents):
        count = chosen.randrange(5, 40)
        builder.add_item(torch.arange(token, token + count))
        builder.end_document()
        token += count
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def built(samples, **config):
    """Datasets of `samples` for training, validation and test."""
    config = DatasetConfig(sequence_length=LENGTH, **config)
    return data.build(config, tokenizer=None, vocab_size=100_000, samples=samples)


def contents(dataset, count=None):
    """All samples as rows of tokens and the last label."""
    samples = [dataset[number] for number in range(len(dataset) if count is None else count)]
    return torch.stack([torch.cat([sample["tokens"], sample["labels"][-1:]]) for sample in samples]).tolist()


def rank(prefixes, root):
    """What one of two ranks reads: of one node that shares a folder of indices, then of two nodes with a folder each."""
    cache.MIN_CACHED_ENTRIES = 1  # so that there are files
    distributed.init_process_group("gloo")
    number = distributed.get_rank()
    blend = [entry for prefix in prefixes for entry in (1.0, prefix)]
    rows = []
    for local, folder in ((number, "shared"), (0, f"own{number}")):
        os.environ["LOCAL_RANK"] = str(local)
        train, valid, _ = built((150, 20, 0), blend=blend, split="80,20,0", path_to_cache=str(root / folder))
        rows.append([contents(train), contents(valid)])
    return rows
