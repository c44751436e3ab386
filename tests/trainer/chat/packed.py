"""The same examples with several in a row, and with one in each: what both runs computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.trainer import small
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat.dataset import ExampleDataset
from trainer.data.chat.packing import Rows

EACH, LONGEST = 4, 24
"""Examples in a row, and tokens in the longest."""


@dataclass
class Drawn:
    """Examples made from their numbers, of many lengths, half of their tokens learned: a store without a file."""

    count: int
    vocab: int = 384
    longest: int = LONGEST

    @property
    def lengths(self) -> np.ndarray:
        return np.random.default_rng(0).integers(2, self.longest + 1, self.count)

    def __getitem__(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        made = np.random.default_rng(example + 1)
        length = int(self.lengths[example])
        trained = made.random(length) < 0.5
        trained[-1] = True  # none is without
        return made.integers(0, self.vocab // 8, length), trained


@dataclass(kw_only=True)
class Given(FinetuningDatasetConfig):
    """Fine-tuning on `Drawn`: `EACH` in a row, or one."""

    sequence_length: int = EACH * LONGEST
    num_workers: int = 0
    count: int = 96
    """Of examples."""

    longest: int = LONGEST

    def build(self, tokenizer: Any, vocab_size: int, samples: tuple[int, int, int]) -> Any:
        multiple = self.pad_to_multiple_of or 1
        rows = Rows(np.arange(self.count), np.arange(0, self.count + 1, EACH)) if self.packed else None
        settings = {"sequence_length": self.sequence_length, "packed": self.packed, "multiple": multiple, "seed": 1}
        made = [
            ExampleDataset(Drawn(self.count, longest=self.longest), np.arange(self.count), rows=rows, shuffled=False, **settings)
            for _ in samples
        ]
        return tuple(dataset.take(count) if count else None for dataset, count in zip(made, samples, strict=True))


@dataclass
class Seen(small.History):
    """A history, and every gradient of the first step."""

    gradients: dict[str, Any] = field(default_factory=dict)
    work: list[tuple[float, float]] = field(default_factory=list)

    def on_step(self, run: Any, step: Any) -> None:
        super().on_step(run, step)
        self.work.append(step.work)
        if not self.gradients:
            self.gradients = {
                f"{number}.{name}": parameter.main_grad.detach().cpu().clone()
                for number, chunk in enumerate(run.chunks)
                for name, parameter in chunk.named_parameters()
            }


def train(folder: str, packed: bool, changes: dict[str, Any]) -> Seen:
    """Six steps over the same examples, 16 in each, on this rank."""
    from trainer.loop import pretrain

    given = changes.get("dataset") or Given()
    given.packed = packed
    rows = 16 // EACH if packed else 16
    settings = {
        "dataset": given,
        "train__train_iters": 6,
        "train__global_batch_size": rows,
        "train__micro_batch_size": 1 if packed else 4,
        "validation__eval_iters": 1,
    }
    seen = Seen()
    pretrain(small.settings(Path(folder), **{**settings, **changes}), callbacks=[seen])
    return seen
