"""Use your own data: sums of two numbers, generated as they are read; only the answers are learned.

    python examples/dataset.py
    torchrun --nproc-per-node 2 examples/dataset.py    # the same losses, each process with half of each batch

`config.dataset` may be any object with `sequence_length` and `build`; trainer/data/__init__.py specifies both. Shuffling, data
parallelism and resuming use sample numbers only: sample 7 is always the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from trainer import RunConfig, pretrain
from trainer.recipes import llama_tiny

END = 256
"""The token that ends a line and pads it."""


@dataclass
class Sums:
    """The dataset section of a run: builds the three datasets."""

    sequence_length: int = 16
    largest: int = 9

    def build(
        self,
        tokenizer: Any,  # noqa: ARG002 - part of the interface
        vocab_size: int,  # noqa: ARG002
        samples: tuple[int, int, int],
    ) -> tuple[Dataset[Any] | None, ...]:
        """Return the train, validation and test datasets, with different seeds; None if no samples are needed."""
        return tuple(Lines(self, seed, count) if count else None for seed, count in zip("abc", samples, strict=True))


@dataclass
class Lines(Dataset[Any]):
    """A dataset with one sum per sample, such as `3+4=7`."""

    config: Sums
    seed: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return tokens, labels, positions and the loss mask, which is 1 for the answer and the token that ends it."""
        draw = random.Random(f"{self.seed}{index}")
        first, second = draw.randint(0, self.config.largest), draw.randint(0, self.config.largest)
        question, answer = f"{first}+{second}=", str(first + second)
        length = self.config.sequence_length
        text = [*(question + answer).encode(), *[END] * length][: length + 1]
        labels = torch.tensor(text[1:])
        positions = torch.arange(length)
        counts = (positions >= len(question) - 1) & (positions <= len(question) + len(answer) - 1)
        return {
            "tokens": torch.tensor(text[:-1]),
            "labels": labels,
            "loss_mask": counts.float(),
            "position_ids": positions,
        }


def settings() -> RunConfig:
    """Return a run of a tiny Llama that learns to add."""
    config = llama_tiny.pretrain_config()
    config.dataset = Sums()
    config.train.train_iters = 40
    config.train.global_batch_size = 32
    config.logger.log_interval = 10
    return config


if __name__ == "__main__":
    pretrain(settings())
