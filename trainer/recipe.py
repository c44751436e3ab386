"""What a recipe is, and the run that all of them start from. The files in `trainer/recipes` know models and machines."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import DatasetConfig, RunConfig, TrainingConfig
from trainer.model import from_hf_config
from trainer.settings.places import place

WARM_UP = 8_000 / 1_200_000
"""The share of all steps that the Llama 3 paper warms up for (arXiv:2407.21783, section 3.4.1). A share, so that a run cut
short to ten steps has a warm-up too."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model with settings that fit a machine. Each call makes a new configuration, which is the caller's to change."""

    name: str
    pretrain_config: Callable[[], RunConfig]
    """From random weights, on mock data until `dataset.blend` is given."""

    gpus: int
    """The fewest GPUs of 80 GB that it fits on, or 0 if a CPU is enough."""

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return inspect.getdoc(self.pretrain_config).partition("\n")[0]  # pyright: ignore[reportOptionalMemberAccess]


def pretraining(
    model: Mapping[str, Any],
    *,
    sequence_length: int,
    global_batch_size: int,
    train_iters: int,
    lr: float,
    min_lr: float,
    **layout: Any,
) -> RunConfig:
    """Training from random weights with AdamW as in the Llama 3 paper: betas 0.9 and 0.95, weight decay 0.1, gradients
    clipped to a norm of 1, cosine decay after a warm-up.

    `model` is a `config.json`; `layout` are fields of its provider. Gradients are reduced in fp32, and optimizer states lie
    spread over the data-parallel ranks.
    """
    config = RunConfig(
        model=from_hf_config(copy.deepcopy(dict(model))),
        train=TrainingConfig(train_iters=train_iters, global_batch_size=global_batch_size),
        dataset=DatasetConfig(sequence_length=sequence_length),
    )
    for name, value in layout.items():
        place(config, f"model.{name}").put(value)
    optimizer = config.optimizer
    optimizer.lr, optimizer.min_lr, optimizer.weight_decay, optimizer.clip_grad = lr, min_lr, 0.1, 1.0
    optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps = 0.9, 0.95, 1e-8
    optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = True
    config.scheduler.lr_warmup_fraction = WARM_UP
    return config
