"""What a run is, in eight lines before its first step. Knows words; the numbers are those of the run's own model and settings."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from trainer import device, parallel
from trainer.config import DatasetConfig, FinetuningDatasetConfig, RunConfig
from trainer.estimate import memory
from trainer.estimate.built import count_chunks
from trainer.formatting import duration, number, size, steps
from trainer.peft.attach import count
from trainer.settings.resolve import Resolved
from trainer.state import Run


def lines(run: Run, resolved: Resolved) -> list[str]:
    """All ranks call this: each adds its part of the parameters and of the memory."""
    config, left = run.config, run.config.train.train_iters - run.progress.iteration
    said = {
        "model": _model(config, *count(run.chunks)),
        "layout": _layout(config, resolved),
        "device": _device(config),
        "batch": _batch(config, resolved),
        "schedule": _schedule(config, left),
        "data": _data(config, run.datasets),
        "checkpoints": _checkpoints(config),
        "memory": _memory(run, resolved),
    }
    return [f"{name:<12} {text}" for name, text in said.items()]


def _model(config: RunConfig, trained: int, parameters: int) -> str:
    model = config.model
    padding = getattr(model, "padded_vocab_size", model.vocab_size) - model.vocab_size
    parameters -= padding * model.hidden_size * (1 if getattr(model, "share_embeddings_and_output_weights", False) else 2)
    described = (getattr(model, "hf_config", None) or {}).get("model_type")
    name = described or type(model).__name__
    sizes = f"{model.num_layers} layers of {model.hidden_size}" if model.num_layers else ""
    learned = f"{number(trained)} of them trained ({type(config.peft).__name__})" if config.peft is not None else ""
    return ", ".join(filter(None, (name, f"{parameters:,} parameters", learned, sizes)))


def _layout(config: RunConfig, resolved: Resolved) -> str:
    model = config.model
    sizes = {
        "TP": model.tensor_model_parallel_size,
        "PP": model.pipeline_model_parallel_size,
        "VPP": model.virtual_pipeline_model_parallel_size or 1,
        "CP": model.context_parallel_size,
        "EP": model.expert_model_parallel_size,
        "DP": resolved.data_parallel_size,
    }
    shape = " · ".join(f"{name} {ranks}" for name, ranks in sizes.items() if ranks > 1)
    each = "optimizer state divided among data-parallel ranks" if config.ddp.use_distributed_optimizer else ""
    ranks = f"{resolved.world_size} rank{'s' if resolved.world_size > 1 else ''}"
    return ", ".join(filter(None, (ranks, shape, each if resolved.data_parallel_size > 1 else "")))


def _device(config: RunConfig) -> str:
    kind = "CPU" if device.current().type == "cpu" else torch.cuda.get_device_name()
    return f"{kind}, {config.mixed_precision}"


def _batch(config: RunConfig, resolved: Resolved) -> str:
    train, length = config.train, config.dataset.sequence_length
    micro = f"{resolved.num_microbatches} microbatch{'es' if resolved.num_microbatches > 1 else ''} of {train.micro_batch_size}"
    tokens = train.global_batch_size * length
    return f"{tokens:,} tokens per step: {train.global_batch_size} sequences of {length}, {micro} on each rank"


def _schedule(config: RunConfig, left: int) -> str:
    train, told, optimizer = config.train, config.scheduler, config.optimizer
    tokens = number(train.train_iters * train.global_batch_size * config.dataset.sequence_length)
    length = f"{steps(train.train_iters)}, {tokens} tokens" + (f", {steps(left)} left" if left < train.train_iters else "")
    warm_up = f" after {steps(told.lr_warmup_iters)} of warm-up" if told.lr_warmup_iters else ""
    return f"{length}; learning rate {optimizer.lr:g} to {optimizer.min_lr:g}, {told.lr_decay_style}{warm_up}"


def _data(config: RunConfig, datasets: Any) -> str:
    told, check = config.dataset, config.validation
    if isinstance(told, FinetuningDatasetConfig):
        named = told.path or " ".join(str(one) for one in told.blend or ())
        source = f"{named}, {'packed rows' if told.packed else 'an example a row'}"
    elif isinstance(told, DatasetConfig):
        blend = told.blend or told.blend_per_split
        source = " ".join(str(one) for one in blend) if blend else "mock tokens, since `dataset.blend` is not set"
    else:
        source = type(told).__name__
    epoch = getattr(datasets[0], "per_epoch", None)
    epochs = (
        f", {config.train.train_iters * config.train.global_batch_size / epoch:.2g} epochs of {epoch:,} samples" if epoch else ""
    )
    checked = f"validation every {steps(check.eval_interval)}" if check.eval_interval else "validation at the end"
    return f"{source}{epochs}; {checked if datasets[1] is not None and check.eval_iters else 'no validation'}"


def _checkpoints(config: RunConfig) -> str:
    told = config.checkpoint
    if not told.save:
        return "nothing is saved: `checkpoint.save` is not set"
    when = [f"every {steps(told.save_interval)}"] if told.save_interval else []
    when += [f"every {duration(told.save_interval_in_mins * 60)}"] if told.save_interval_in_mins else []
    kept = f", the newest {told.keep_last} kept" if told.keep_last else ""
    return f"{told.save}, {' and '.join([*when, 'at the end'])}{kept}"


def _memory(run: Run, resolved: Resolved) -> str:
    """Of the fullest rank."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    found = memory.of_rank(run.config, count_chunks(run.chunks, run.config.model), rank, dist.get_world_size())
    most, card = parallel.largest([float(found.total)])[0], device.memory()
    if card is None:
        return f"{size(most)} in the fullest of {resolved.world_size} processes, estimated"
    return f"{size(most)} of the card's {size(card)}, estimated"
