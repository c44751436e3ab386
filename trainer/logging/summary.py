"""The summary of a run before its first step, in eight lines: its model, layout, device, batch, schedule, data, checkpoints and
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from trainer import collectives, device
from trainer.config import (
    CheckpointConfig,
    DatasetConfig,
    FinetuningDatasetConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from trainer.estimate import memory
from trainer.estimate.built import count_chunks
from trainer.formatting import duration, number, size, steps
from trainer.layers.pattern import is_hybrid, symbols
from trainer.peft.attach import count
from trainer.settings.resolve import Resolved


def lines(resolved: Resolved, *, chunks: Sequence[Any], datasets: Sequence[Any], iteration: int) -> list[str]:
    """Return the lines. All ranks call this: each adds its part of the parameters and of the memory."""
    config, remaining = resolved.config, resolved.config.train.train_iters - iteration
    texts = {
        "model": _model(config.model, config.peft, *count(chunks)),
        "layout": _layout(config.model, resolved, divided=config.ddp.use_distributed_optimizer),
        "device": _device(config.mixed_precision),
        "batch": _batch(config.train, config.dataset.sequence_length, resolved.num_microbatches),
        "schedule": _schedule(config, remaining),
        "data": f"{_source(config.dataset)}{_epochs(config.train, datasets[0])}; {_validation(config.validation, datasets[1])}",
        "checkpoints": _checkpoints(config.checkpoint),
        "memory": _memory(resolved, chunks),
    }
    return [f"{name:<12} {text}" for name, text in texts.items()]


def _model(model: Any, peft: Any, trained: int, parameters: int) -> str:
    padding = getattr(model, "padded_vocab_size", model.vocab_size) - model.vocab_size
    parameters -= padding * model.hidden_size * (1 if getattr(model, "share_embeddings_and_output_weights", False) else 2)
    described = (getattr(model, "hf_config", None) or {}).get("model_type")
    name = described or type(model).__name__
    sizes = f"{model.num_layers} layers of {model.hidden_size}" if model.num_layers else ""
    learned = f"{number(trained)} of them trained ({type(peft).__name__})" if peft is not None else ""
    return ", ".join(filter(None, (name, f"{parameters:,} parameters", learned, sizes, _kinds(model))))


def _kinds(model: Any) -> str:
    """Return the layout of a hybrid, and the kinds of its layers."""
    if not is_hybrid(model):
        return ""
    return f"layout hybrid: {''.join(symbols(model))}"


def _layout(model: Any, resolved: Resolved, *, divided: bool) -> str:
    sizes = {
        "TP": model.tensor_model_parallel_size,
        "PP": model.pipeline_model_parallel_size,
        "VPP": model.virtual_pipeline_model_parallel_size or 1,
        "CP": model.context_parallel_size,
        "EP": model.expert_model_parallel_size,
        "DP": resolved.data_parallel_size,
    }
    shape = " · ".join(f"{name} {ranks}" for name, ranks in sizes.items() if ranks > 1)
    optimizer = "optimizer state divided among data-parallel ranks" if divided and resolved.data_parallel_size > 1 else ""
    ranks = f"{resolved.world_size} rank{'s' if resolved.world_size > 1 else ''}"
    return ", ".join(filter(None, (ranks, shape, optimizer)))


def _device(mixed_precision: str) -> str:
    kind = "CPU" if device.current().type == "cpu" else torch.cuda.get_device_name()
    return f"{kind}, {mixed_precision}"


def _batch(train: TrainingConfig, length: int, num_microbatches: int) -> str:
    micro = f"{num_microbatches} microbatch{'es' if num_microbatches > 1 else ''} of {train.micro_batch_size}"
    tokens = train.global_batch_size * length
    return f"{tokens:,} tokens per step: {train.global_batch_size} sequences of {length}, {micro} on each rank"


def _schedule(config: RunConfig, remaining: int) -> str:
    train, schedule, optimizer = config.train, config.scheduler, config.optimizer
    tokens = number(train.train_iters * train.global_batch_size * config.dataset.sequence_length)
    length = f"{steps(train.train_iters)}, {tokens} tokens" + (
        f", {steps(remaining)} left" if remaining < train.train_iters else ""
    )
    warm_up = f" after {steps(schedule.lr_warmup_iters)} of warm-up" if schedule.lr_warmup_iters else ""
    return f"{length}; learning rate {optimizer.lr:g} to {optimizer.min_lr:g}, {schedule.lr_decay_style}{warm_up}"


def _source(dataset: Any) -> str:
    if isinstance(dataset, FinetuningDatasetConfig):
        named = dataset.path or " ".join(str(entry) for entry in dataset.blend or ())
        return f"{named}, {'packed rows' if dataset.packed else 'an example a row'}"
    if isinstance(dataset, DatasetConfig):
        blend = dataset.blend or dataset.blend_per_split
        return " ".join(str(entry) for entry in blend) if blend else "mock tokens, since `dataset.blend` is not set"
    return type(dataset).__name__


def _epochs(train: TrainingConfig, dataset: Any) -> str:
    epoch = getattr(dataset, "per_epoch", None)
    if not epoch:
        return ""
    epochs = train.train_iters * train.global_batch_size / epoch
    return f", {epochs:,.0f} epochs of {epoch:,} samples" if epochs >= 10 else f", {epochs:.2g} epochs of {epoch:,} samples"


def _validation(validation: ValidationConfig, held_out: Any) -> str:
    if held_out is None or not validation.eval_iters:
        return "no validation"
    return f"validation every {steps(validation.eval_interval)}" if validation.eval_interval else "validation at the end"


def _checkpoints(checkpoint: CheckpointConfig) -> str:
    if not checkpoint.save:
        return "nothing is saved: `checkpoint.save` is not set"
    when = [f"every {steps(checkpoint.save_interval)}"] if checkpoint.save_interval else []
    when += [f"every {duration(checkpoint.save_interval_in_mins * 60)}"] if checkpoint.save_interval_in_mins else []
    retention = f", the newest {checkpoint.keep_last} kept" if checkpoint.keep_last else ""
    return f"{checkpoint.save}, {' and '.join([*when, 'at the end'])}{retention}"


def _memory(resolved: Resolved, chunks: Sequence[Any]) -> str:
    """Return the estimate for the fullest rank."""
    config, stage = resolved.config, parallel_state.get_pipeline_model_parallel_rank()
    estimate = memory.of_rank(config, count_chunks(chunks, config.model), stage, dist.get_world_size())
    most, card = collectives.largest([float(estimate.total)])[0], device.memory()
    if card is None:
        return f"{size(most)} in the fullest of {resolved.world_size} processes, estimated"
    return f"{size(most)} of the card's {size(card)}, estimated"
