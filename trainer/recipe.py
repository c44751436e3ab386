"""What a recipe is, and the run that all of them start from. The files in `trainer/recipes` know models and machines.

Recipes can be listed without torch: megatron-core's settings are imported when a configuration is made.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from converter.config import make_model
from converter.families import find
from converter.rules import in_order

if TYPE_CHECKING:
    from trainer.config import RunConfig

WARM_UP = 8_000 / 1_200_000
"""The share of all steps that the Llama 3 paper warms up for (arXiv:2407.21783, section 3.4.1). A share, so that a run cut
short to ten steps has a warm-up too."""


WARM_UP_TUNING = 0.03
"""The share of a fine-tuning run's steps that it warms up for."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model with settings that fit a machine. Each call makes a new configuration, which is the caller's to change."""

    name: str
    model: Mapping[str, Any]
    """Its `config.json`."""

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

    layout: Mapping[str, Any] = field(default_factory=dict)
    """How pretraining divides the model: fields of its provider."""

    precision: str = "bf16_mixed"
    """`mixed_precision` of pretraining."""

    @property
    def parameters(self) -> int:
        """All of the model's, tied weights counted once."""
        family = find(self.model["model_type"])
        sizes = make_model(family.CONFIG, self.model)
        return sum(math.prod(rule.shape(sizes)) for rule, _ in in_order(family.RULES, sizes) if rule.when(sizes))

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
    from trainer.config import DatasetConfig, TrainingConfig  # noqa: PLC0415 - brings torch

    config = _run(model, DatasetConfig(sequence_length=sequence_length), layout)
    config.train = TrainingConfig(train_iters=train_iters, global_batch_size=global_batch_size)
    config.optimizer.lr, config.optimizer.min_lr = lr, min_lr
    config.scheduler.lr_warmup_fraction = WARM_UP
    return config


def continuing(model: Mapping[str, Any], *, sequence_length: int = 4096) -> RunConfig:
    """More training of a model that is there, on plain text: a thousand steps at a small rate, after a short warm-up."""
    run = {"sequence_length": sequence_length, "global_batch_size": 32, "train_iters": 1000, "lr": 1e-5, "min_lr": 1e-6}
    config = pretraining(model, **run)
    config.scheduler.lr_warmup_fraction = WARM_UP_TUNING
    return config


def tuning_all(model: Mapping[str, Any], *, sequence_length: int = 4096, **layout: Any) -> RunConfig:
    """Every parameter, at a small rate that leaves most of what the model knows: 5e-6, down to nothing."""
    return _tuning(model, lr=5e-6, sequence_length=sequence_length, layout=layout)


def tuning_adapters(model: Mapping[str, Any], *, sequence_length: int = 4096, **layout: Any) -> RunConfig:
    """LoRA of rank 32 beside every linear layer, at 1e-4: adapters start at nothing and want a rate some ten times that of the
    model's own parameters (Schulman et al. 2025, "LoRA Without Regret")."""
    from trainer.peft import LoRA  # noqa: PLC0415 - brings torch

    config = _tuning(model, lr=1e-4, sequence_length=sequence_length, layout=layout)
    config.peft = LoRA(dim=32, alpha=32)
    return config


def _tuning(model: Mapping[str, Any], *, lr: float, sequence_length: int, layout: Mapping[str, Any]) -> RunConfig:
    """A thousand steps over examples packed to `sequence_length`."""
    from trainer.config import FinetuningDatasetConfig, TrainingConfig  # noqa: PLC0415 - brings torch

    config = _run(model, FinetuningDatasetConfig(sequence_length=sequence_length), layout)
    config.train = TrainingConfig(train_iters=1000, global_batch_size=32)
    config.optimizer.lr, config.optimizer.min_lr = lr, 0.0
    config.scheduler.lr_warmup_fraction = WARM_UP_TUNING
    return config


def _run(model: Mapping[str, Any], dataset: Any, layout: Mapping[str, Any]) -> RunConfig:
    from trainer.config import RunConfig  # noqa: PLC0415 - brings torch
    from trainer.model import from_hf_config  # noqa: PLC0415
    from trainer.settings.fields import field_path  # noqa: PLC0415

    config = RunConfig(model=from_hf_config(copy.deepcopy(dict(model))), dataset=dataset)
    for name, value in layout.items():
        field_path(config, f"model.{name}").set(value)
    optimizer = config.optimizer
    optimizer.weight_decay, optimizer.clip_grad = 0.1, 1.0
    optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps = 0.9, 0.95, 1e-8
    optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = True
    return config
