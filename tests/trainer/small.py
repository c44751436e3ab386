"""Small real runs: fixed tokens, a tiny model, and what happened at each step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STEPS, BATCH, MICRO_BATCH, SEQUENCE = 20, 4, 2, 32
LR, MIN_LR = 3e-3, 3e-4


@dataclass
class FixedTokens:
    """A dataset of one's own: sample i is made from the number i. Also an example of the protocol."""

    vocab: int
    sequence_length: int = SEQUENCE
    num_workers: int = 0

    def build(self, tokenizer: Any, vocab_size: int, samples: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        """Train, validation and test; the last two are other numbers."""
        return tuple(_Samples(self, first, count) for first, count in zip((0, 10**6, 2 * 10**6), samples, strict=True))


@dataclass
class _Samples(torch.utils.data.Dataset):
    told: FixedTokens
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = torch.Generator().manual_seed(self.first + int(index))
        # Few tokens, so that there is something to learn.
        tokens = torch.randint(0, self.told.vocab // 8, (self.told.sequence_length + 1,), generator=made)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.told.sequence_length),
            "position_ids": torch.arange(self.told.sequence_length),
        }


@dataclass
class History:
    """What each step did, as a callback of the loop."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    evaluations: list[tuple[str, float]] = field(default_factory=list)
    layers: list[dict[str, float]] = field(default_factory=list)
    """What layers reported."""

    weights: dict[str, Any] = field(default_factory=dict)

    def on_start(self, run: Any) -> None: ...

    def on_step(self, run: Any, step: Any) -> None:
        self.losses.append(step.loss)
        self.grad_norms.append(step.grad_norm)
        self.rates.append(step.lr)
        self.layers.append(dict(step.layer_metrics))

    def on_evaluation(self, run: Any, split: str, loss: float) -> None:
        self.evaluations.append((split, loss))

    def on_save(self, run: Any) -> None: ...

    def on_end(self, run: Any) -> None:
        self.weights = {
            f"{number}.{name}": parameter.detach().clone()
            for number, chunk in enumerate(run.chunks)
            for name, parameter in chunk.named_parameters()
        }


def settings(folder: Path, **changes: Any) -> Any:
    """A run over a saved model: `changes` are settings by their dotted names, with `__` for the dot."""
    from trainer.config import RunConfig
    from trainer.model import from_hf_config

    model = from_hf_config(json.loads((folder / "config.json").read_text()), source=str(folder))
    config = RunConfig(model=model, dataset=FixedTokens(model.vocab_size), mixed_precision="fp32")
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = STEPS, BATCH, MICRO_BATCH
    config.validation.eval_iters = 0
    config.optimizer.lr, config.optimizer.min_lr, config.optimizer.weight_decay = LR, MIN_LR, 0.1
    config.optimizer.adam_beta2, config.optimizer.clip_grad = 0.95, 1.0
    config.scheduler.lr_warmup_iters = 4
    config.dist.device = "cpu"
    config.checkpoint.pretrained_checkpoint = str(folder)
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        setattr(getattr(config, section) if setting else config, setting or section, value)
    return config


def train(folder: str, changes: dict[str, Any]) -> History:
    """Run on this rank; what it saw."""
    from trainer.loop import pretrain

    history = History()
    pretrain(settings(Path(folder), **changes), callbacks=[history])
    return history
