"""Limit an evaluation to one epoch: each sample counts once, and samples with a zero loss mask fill the last global batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from formats.errors import UserError


class OneEpoch(Dataset):
    """The first `samples` samples of a dataset, padded to whole global batches with samples whose loss mask is zero."""

    def __init__(self, dataset: Any, *, samples: int, global_batch_size: int) -> None:
        self.dataset, self.samples, self._global_batch_size = dataset, samples, global_batch_size

    def __len__(self) -> int:
        return -(-self.samples // self._global_batch_size) * self._global_batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < self.samples:
            return self.dataset[index]
        sample = self.dataset[0]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}

    def beginnings(self, count: int) -> Any:
        """Return the prompts of the first samples if the dataset has `beginnings`, else an empty list."""
        return getattr(self.dataset, "beginnings", lambda _: [])(count)


def limit_to_one_epoch(dataset: Any, *, iterations: int | None, global_batch_size: int) -> Any:
    """Return `dataset` limited to `iterations` global batches or one epoch, whichever is shorter; None means one epoch.

    A dataset without `per_epoch`, such as a blend, is returned unchanged; UserError if `iterations` is None then.
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
    return OneEpoch(dataset, samples=samples, global_batch_size=global_batch_size)
