"""Mock data for trial runs and benchmarks.

megatron-core's MockGPTDataset does not fit: its tokens ignore the seed, and its order depends on the number of samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Mock(Dataset):
    """Sequences that count from a random token with a random step from 1 to 7, modulo the vocabulary, so that a loss falls."""

    samples: int
    sequence_length: int
    vocab_size: int
    seed: int
    split: int

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        random = np.random.default_rng((self.seed, self.split, index))
        start, step = int(random.integers(self.vocab_size)), int(random.integers(1, 8))
        text = (start + step * torch.arange(self.sequence_length + 1)) % self.vocab_size
        return {
            "tokens": text[:-1].clone(),
            "labels": text[1:].clone(),
            "loss_mask": torch.ones(self.sequence_length),
            "position_ids": torch.arange(self.sequence_length),
        }
