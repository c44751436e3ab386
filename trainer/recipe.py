"""Define recipes, and the run that all of them start from. The files in `trainer/recipes` know models and machines.

Recipes can be listed without torch: megatron-core's settings are imported when a configuration is made.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
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
    """Fine-tuning of all parameters of `checkpoint.pretrained_checkpoint`, on the examples of `dataset.path`."""

    peft_config: Callable[[], RunConfig]
    """Fine-tuning of adapters: LoRA, unless `peft` is another method."""

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
        """Parameters of the model, tied weights counted once."""
        family = find(self.model["model_type"])
        sizes = make_model(family.CONFIG, self.model)
        tensors = Counter(id(rule) for rule, _ in in_order(family.RULES, sizes))  # of experts, tens of thousands
        return sum(math.prod(rule.shape(sizes)) * tensors[id(rule)] for rule in family.RULES if id(rule) in tensors)

    @property
    def summary(self) -> str:
        """A one-line description."""
        return inspect.getdoc(self.pretrain_config).partition("\n")[0]  # pyright: ignore[reportOptionalMemberAccess]


_SIZES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
}


def parallelism(layout: Mapping[str, Any]) -> str:
    """Return the sizes above 1 by which a layout divides a model: `TP8·PP4`."""
    return "·".join(f"{short}{layout[name]}" for name, short in _SIZES.items() if layout.get(name, 1) > 1)


@dataclass(frozen=True)
class Gpus:
    """The GPUs of 80 GB that a run of a recipe takes."""

    number: int
    """The fewest that it fits on; any power of 2 from there, which layouts divide."""

    gigabytes: int
    """What the fullest of them holds, as `mbtrain show` estimates it."""

    layout: Mapping[str, Any]
    """How they divide the model: fields of its provider."""

    def said_of(self, what: str) -> str:
        """Return the docstring of a run."""
        gpus = "one GPU" if self.number == 1 else f"{self.number} GPUs"
        divided = f" at {sizes}" if (sizes := parallelism(self.layout)) else ""
        more = "or any power of 2" + (" from there" if self.number > 1 else "")
        return f"{what}, on {gpus} of 80 GB {more}.\n\nPer GPU{divided}: {self.gigabytes} GB."


def on(number: int, gigabytes: int, *, tp: int = 1, pp: int = 1, ep: int = 1, **layout: Any) -> Gpus:
    """Return the GPUs of a run that divides layers by `tp`, the model into `pp` stages and experts by `ep`; `layout` is further
    fields of the provider."""
    if tp > 1:
        layout |= {"tensor_model_parallel_size": tp, "sequence_parallel": True}
    if pp > 1:
        layout |= {"pipeline_model_parallel_size": pp}
    if ep > 1:
        layout |= {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": 1}
    return Gpus(number, gigabytes, layout)


def recomputed() -> dict[str, Any]:
    """Return the settings with which layers keep their input alone, and are computed again in the backward pass."""
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def shape(hidden: int, ffn: int, layers: int, heads: int, groups: int, **rest: Any) -> dict[str, Any]:
    """Return the sizes of a model as most `config.json`s name them; `ffn` is the inner size of the feed-forward layers."""
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        **rest,
    }


def recipe(
    title: str,
    model: Mapping[str, Any],
    *,
    pretrain: Gpus,
    sft: Gpus,
    peft: Gpus,
    length: int = 4096,
    lr: float = 3e-4,
) -> Recipe:
    """Return the recipe of a model whose runs differ from others' in their numbers alone.

    `title` is the model's name, and the recipe's (`Qwen2.5 0.5B`: `qwen25_0_5b`); `model` its `config.json`. Pretraining is on
    sequences of `length` tokens, in batches and for as many steps as Llama 3's, at `lr`, which decays to a tenth; fine-tuning on
    4096 tokens.
    """
    family, *size = title.lower().split()

    def pretrain_config() -> RunConfig:
        run = {"sequence_length": length, "global_batch_size": 512, "train_iters": 1_200_000}
        return pretraining(model, **run, lr=lr, min_lr=lr / 10, **pretrain.layout)

    def sft_config() -> RunConfig:
        return tuning_all(model, **sft.layout)

    def peft_config() -> RunConfig:
        return tuning_adapters(model, **peft.layout)

    pretrain_config.__doc__ = pretrain.said_of(f"{title} from random weights")
    sft_config.__doc__ = sft.said_of(f"All of {title}")
    peft_config.__doc__ = peft.said_of(f"Adapters of {title}")
    return Recipe(
        name="_".join([family.replace(".", "").replace("-", ""), *size]).replace(".", "_").replace("-", "_"),
        model=model,
        layout=pretrain.layout,
        pretrain_config=pretrain_config,
        sft_config=sft_config,
        peft_config=peft_config,
        gpus=pretrain.number,
        sft_gpus=sft.number,
        peft_gpus=peft.number,
    )


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
    """Return a run from random weights with AdamW as in the Llama 3 paper: betas 0.9 and 0.95, weight decay 0.1, gradients
    clipped to a norm of 1, cosine decay after a warm-up.

    `model` is a `config.json`; `layout` are fields of its provider. Gradients are reduced in fp32, and optimizer states are
    sharded over the data-parallel ranks.
    """
    from trainer.config import DatasetConfig, TrainingConfig  # noqa: PLC0415 - brings torch

    config = _run(model, DatasetConfig(sequence_length=sequence_length), layout)
    config.train = TrainingConfig(train_iters=train_iters, global_batch_size=global_batch_size)
    config.optimizer.lr, config.optimizer.min_lr = lr, min_lr
    config.scheduler.lr_warmup_fraction = WARM_UP
    return config


def continuing(model: Mapping[str, Any], *, sequence_length: int = 4096) -> RunConfig:
    """Return a run that continues pretraining on plain text: a thousand steps at a small rate, after a short warm-up."""
    run = {"sequence_length": sequence_length, "global_batch_size": 32, "train_iters": 1000, "lr": 1e-5, "min_lr": 1e-6}
    config = pretraining(model, **run)
    config.scheduler.lr_warmup_fraction = WARM_UP_TUNING
    return config


def tuning_all(model: Mapping[str, Any], *, sequence_length: int = 4096, **layout: Any) -> RunConfig:
    """Return a run that fine-tunes every parameter at 5e-6, decayed to 0: small enough to keep most of what the model knows."""
    return _tuning(model, lr=5e-6, sequence_length=sequence_length, layout=layout)


def tuning_adapters(model: Mapping[str, Any], *, sequence_length: int = 4096, **layout: Any) -> RunConfig:
    """Return a run with LoRA of rank 32 beside every linear layer, at 1e-4: adapters start at zero and need about ten times the
    rate of the model's own parameters (Schulman et al. 2025, "LoRA Without Regret")."""
    from trainer.peft import LoRA  # noqa: PLC0415 - brings torch

    config = _tuning(model, lr=1e-4, sequence_length=sequence_length, layout=layout)
    config.peft = LoRA(dim=32, alpha=32)
    if config.model.mtp_num_layers:
        config.peft.exclude_modules = ["mtp.*"]  # which PEFT's model does not have
    return config


def _tuning(model: Mapping[str, Any], *, lr: float, sequence_length: int, layout: Mapping[str, Any]) -> RunConfig:
    """Return a run of a thousand steps over examples packed to `sequence_length`."""
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
    if config.model.num_moe_experts:
        config.model.moe_router_dtype = "fp32"
    optimizer = config.optimizer
    optimizer.weight_decay, optimizer.clip_grad = 0.1, 1.0
    optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps = 0.9, 0.95, 1e-8
    optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = True
    return config
