"""What a recipe is, and the run that all of them start from. The files in `trainer/recipes` know models and machines."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import DatasetConfig, FinetuningDatasetConfig, RunConfig, TrainingConfig
from trainer.model import from_hf_config
from trainer.peft import LoRA
from trainer.settings.places import place

WARM_UP = 8_000 / 1_200_000
"""The share of all steps that the Llama 3 paper warms up for (arXiv:2407.21783, section 3.4.1). A share, so that a run cut
short to ten steps has a warm-up too."""


WARM_UP_TUNING = 0.03
"""The share of a fine-tuning run's steps that it warms up for."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model with settings that fit a machine. Each call makes a new configuration, which is the caller's to change."""

    name: str
    pretrain_config: Callable[[], RunConfig]
    """From random weights, on mock data until `dataset.blend` is given."""

    sft_config: Callable[[], RunConfig]
    """All parameters of a model that is there (`checkpoint.pretrained_checkpoint`), on the examples of `dataset.path`."""

    peft_config: Callable[[], RunConfig]
    """Adapters beside it: LoRA, until `peft` says otherwise."""

    gpus: int
    """The fewest GPUs of 80 GB that pretraining fits on, or 0 if a CPU is enough."""

    sft_gpus: int
    """The same for fine-tuning all parameters."""

    peft_gpus: int
    """The same for adapters."""

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
    config = _run(model, DatasetConfig(sequence_length=sequence_length), layout)
    config.train = TrainingConfig(train_iters=train_iters, global_batch_size=global_batch_size)
    config.optimizer.lr, config.optimizer.min_lr = lr, min_lr
    config.scheduler.lr_warmup_fraction = WARM_UP
    return config


def tuning_all(model: Mapping[str, Any], *, sequence_length: int = 4096, **layout: Any) -> RunConfig:
    """Every parameter, at a small rate that leaves most of what the model knows: 5e-6, down to nothing."""
    return _tuning(model, lr=5e-6, sequence_length=sequence_length, layout=layout)


def tuning_adapters(model: Mapping[str, Any], *, sequence_length: int = 4096, **layout: Any) -> RunConfig:
    """LoRA of rank 32 beside every linear layer, at 1e-4: adapters start at nothing and want a rate some ten times that of the
    model's own parameters (Schulman et al. 2025, "LoRA Without Regret")."""
    config = _tuning(model, lr=1e-4, sequence_length=sequence_length, layout=layout)
    config.peft = LoRA(dim=32, alpha=32)
    return config


def _tuning(model: Mapping[str, Any], *, lr: float, sequence_length: int, layout: Mapping[str, Any]) -> RunConfig:
    """A thousand steps over examples packed to `sequence_length`."""
    config = _run(model, FinetuningDatasetConfig(sequence_length=sequence_length), layout)
    config.train = TrainingConfig(train_iters=1000, global_batch_size=32)
    config.optimizer.lr, config.optimizer.min_lr = lr, 0.0
    config.scheduler.lr_warmup_fraction = WARM_UP_TUNING
    return config


def _run(model: Mapping[str, Any], dataset: Any, layout: Mapping[str, Any]) -> RunConfig:
    config = RunConfig(model=from_hf_config(copy.deepcopy(dict(model))), dataset=dataset)
    for name, value in layout.items():
        place(config, f"model.{name}").put(value)
    optimizer = config.optimizer
    optimizer.weight_decay, optimizer.clip_grad = 0.1, 1.0
    optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps = 0.9, 0.95, 1e-8
    optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = True
    return config
