"""Your own data: sums of two numbers, made up as they are read, of which only the answers are learned.

    python examples/dataset.py
    torchrun --nproc-per-node 2 examples/dataset.py    # the same losses, each process with half of each batch

In place of `config.dataset` goes any object with `sequence_length` and `build`; trainer/data/__init__.py says what they promise.
Shuffling, splitting over processes and going on after a stop come from the sample's number: sample 7 is always the same.
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
"""The token after the last byte, which fills up a line."""


@dataclass
class Sums:
    """What a run asks for data."""

    sequence_length: int = 16
    largest: int = 9

    def build(
        self,
        tokenizer: Any,  # noqa: ARG002 - the protocol's
        vocab_size: int,  # noqa: ARG002
        samples: tuple[int, int, int],
    ) -> tuple[Dataset[Any] | None, ...]:
        """Train, validation and test: sums from different seeds, None where no sample is wanted."""
        return tuple(Lines(self, seed, count) if count else None for seed, count in zip("abc", samples, strict=True))


@dataclass
class Lines(Dataset[Any]):
    """`3+4=7`, one per sample."""

    told: Sums
    seed: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Tokens, what follows each, and 1 for those that are to be learned: the answer, and that it ends there."""
        draw = random.Random(f"{self.seed}{index}")
        first, second = draw.randint(0, self.told.largest), draw.randint(0, self.told.largest)
        question, answer = f"{first}+{second}=", str(first + second)
        length = self.told.sequence_length
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
    """A tiny Llama that learns to add."""
    config = llama_tiny.pretrain_config()
    config.dataset = Sums()
    config.train.train_iters = 40
    config.train.global_batch_size = 32
    config.logger.log_interval = 10
    return config


if __name__ == "__main__":
    pretrain(settings())
