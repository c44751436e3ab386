"""Held-out data of which each sample is evaluated once: where they do not fill the last global batch, samples of which nothing
counts do. Knows how long an epoch is, and nothing of what samples hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from formats.errors import UserError


class Once(Dataset):
    """The first `samples` of a dataset, and then as many without a token that counts as fill whole global batches."""

    def __init__(self, dataset: Any, *, samples: int, global_batch_size: int) -> None:
        self.dataset, self.samples, self._batch = dataset, samples, global_batch_size

    def __len__(self) -> int:
        return -(-self.samples // self._batch) * self._batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < self.samples:
            return self.dataset[index]
        sample = self.dataset[0]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}

    def beginnings(self, count: int) -> Any:
        """What the dataset's first samples begin with, where it says that."""
        return getattr(self.dataset, "beginnings", lambda _: [])(count)


def once(dataset: Any, *, iterations: int | None, global_batch_size: int) -> Any:
    """`dataset` for evaluations of `iterations` global batches, or of one epoch where that is shorter, or `iterations` is None.

    One that does not say how long its epoch is, such as a blend, stays as it is. UserError where None needs to know.
    """
    epoch = getattr(dataset, "per_epoch", None)
    if dataset is None or (epoch is None and iterations is not None):
        return dataset
    if epoch is None:
        raise UserError(
            "`validation.eval_iters` is `None`, and the dataset does not say how many samples an epoch has",
            hint="set `validation.eval_iters` to a number of global batches",
        )
    samples = epoch if iterations is None else min(epoch, iterations * global_batch_size)
    if hasattr(dataset, "take"):
        dataset.take(samples)
    return Once(dataset, samples=samples, global_batch_size=global_batch_size)
