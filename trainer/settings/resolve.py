"""Resolve a run's configuration: fill every open field, and refuse everything that cannot run.

Runs before processes start, and again in each of them with the same result. The configuration passed in is not changed.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from formats.errors import UserError
from trainer.config import (
    CheckpointConfig,
    DatasetConfig,
    FinetuningDatasetConfig,
    RunConfig,
    SchedulerConfig,
    TrainingConfig,
)
from trainer.settings import (
    architecture,
    checks,
    contradictions,
    cross_entropy,
    cuda_graphs,
    experts,
    hf_config,
    hybrid,
    kernels,
    overlap,
    paths,
    precision,
    ranges,
    refused,
    unsupported,
)
from trainer.settings.defaults import Default, apply_defaults
from trainer.settings.precision import Machine


@dataclass(frozen=True, slots=True)
class Resolved:
    """A run's configuration with every field decided."""

    config: RunConfig
    explanations: tuple[Default, ...]
    """Settings that were filled in, with the reason for each."""

    warnings: tuple[str, ...]
    world_size: int
    data_parallel_size: int
    """Copies of the model, context-parallel ranks not counted."""

    num_microbatches: int
    """Microbatches per step on each rank."""


def resolve(
    config: RunConfig, *, world_size: int, device: str, machine: Machine | None = None, steps: int | None = None
) -> Resolved:
    """Return a copy of a run's configuration with every field decided, for `world_size` processes on `cpu` or `gpu`.

    Raises UserError for whatever would fail later. `machine` defaults to what this process finds. `steps` is the number of steps
    that `train.num_epochs` amounts to, once the data is known; until then the schedule follows `train.train_iters`.
    """
    run = _copy(config)
    machine = machine or precision.find_machine(device)
    paths.expand(run)
    _check_sections(run, machine)
    defaults = apply_defaults(run, _first_defaults(run, steps)) + precision.apply(run.mixed_precision, run)
    copies = _check_layout(run, world_size)
    microbatches = checks.num_microbatches(run.train, run.model, copies)
    context = checks.parallel_size(run.model, checks.CP)
    defaults += apply_defaults(run, overlap.defaults(run, data_parallel=copies * context, device=device))
    contradictions.check_deterministic(run.model)
    defaults += apply_defaults(run, kernels.defaults(run.model, machine))
    cross_entropy.check(run.model, machine)
    defaults += apply_defaults(run, _schedule(run.scheduler, run.optimizer, run.train))
    if run.train.num_epochs is None or steps is not None:
        checks.check_schedule(run.scheduler, run.optimizer)
    contradictions.check(run.model, run.ddp, mixed_precision=run.mixed_precision)
    cuda_graphs.check(run, world_size=world_size)
    checks.check_saving(run.checkpoint)
    defaults += apply_defaults(run, _save_intervals(run.checkpoint))
    defaults += _finalize(run, machine)
    warnings_ = (
        *_warnings(run.model, microbatches),
        *_unknown_length(run.train, steps),
        *hf_config.notes(run.model),
        *cross_entropy.notes(run.model, machine),
    )
    return Resolved(run, tuple(defaults), warnings_, world_size, copies, microbatches)


def _check_sections(config: RunConfig, machine: Machine) -> None:
    """Refuse what is wrong whatever the layout is."""
    ranges.check(config)
    checks.check_attention(config.model)
    architecture.check(config)
    hybrid.check(config)
    checks.check_optimizer(config.optimizer, config.ddp)
    unsupported.check(config, machine.device)
    checks.check_peft(config.peft, config.model)
    precision.check(config.mixed_precision, machine)
    checks.check_device(config.model, machine)
    experts.check(config.model, machine)
    checks.check_packed(config, machine)


def _first_defaults(config: RunConfig, steps: int | None) -> list[Default]:
    """Return the defaults that checks of the layout rely on."""
    return [
        *_epochs(config.train, steps),
        *_virtual_stages(config.model),
        *_distributed_optimizer(config.ddp, config.optimizer),
        *experts.defaults(config.model),
        *_per_token_loss(config.model, config.dataset),
        *padded_examples(config.model, config.dataset),
    ]


def _finalize(config: RunConfig, machine: Machine) -> list[Default]:
    """Have megatron-core check and derive its fields. Returns the defaults that follow from what it derives."""
    kernels_elsewhere = kernels.elsewhere(config.model, machine)
    with kernels.hidden(config.model, machine):
        _validate(config)
    checks.check_prediction(config.model)
    return apply_defaults(config, kernels_elsewhere) + hf_config.follow(config.model)


def _copy(config: RunConfig) -> RunConfig:
    """Copy deeply, except for a dataset of the user's own: it may hold open files, and is not changed."""
    parts = {part.name: getattr(config, part.name) for part in fields(config)}
    is_ours = isinstance(config.dataset, (DatasetConfig, FinetuningDatasetConfig))
    dataset = {} if is_ours else {"dataset": parts.pop("dataset")}
    return type(config)(**copy.deepcopy(parts), **dataset)


def _check_layout(config: RunConfig, world_size: int) -> int:
    copies = checks.data_parallel_size(config.model, world_size)
    checks.check_tensor_parallel(config.model)
    checks.check_pipeline(config.model)
    checks.check_sequence(config.model, config.dataset)
    checks.check_samples(config)
    checks.check_precision_sizes(config)
    return copies


def _epochs(train: TrainingConfig, steps: int | None) -> list[Default]:
    if steps is None:
        return []
    return [Default("train.train_iters", steps, f"`train.num_epochs={train.num_epochs}` of this data")]


def _virtual_stages(model: Any) -> list[Default]:
    """Derive virtual stages from the pipeline layout. One virtual stage becomes None: for 1, megatron-core would choose its
    interleaved schedule."""
    setting, virtual = f"model.{checks.VPP}", getattr(model, checks.VPP, None)
    if virtual == 1:
        return [Default(setting, None, "one virtual stage is an ordinary one")]
    layout = getattr(model, "pipeline_model_parallel_layout", None)
    if not isinstance(layout, (str, list)) or virtual is not None:
        return []
    with refused.user_errors("model", model, _stages_of):
        stages = _stages_of(model)
    virtual = stages.virtual_pipeline_model_parallel_size
    return [Default(setting, virtual, "as `model.pipeline_model_parallel_layout` says")] if virtual > 1 else []


def _stages_of(model: Any) -> Any:
    layout = model.pipeline_model_parallel_layout
    return PipelineParallelLayerLayout(layout, checks.parallel_size(model, checks.PP)) if layout is not None else None


def _distributed_optimizer(ddp: Any, optimizer: Any) -> list[Default]:
    """Set the field that megatron-core has in two sections to the same value in both."""
    on = ddp.use_distributed_optimizer or optimizer.use_distributed_optimizer
    why = "`ddp.use_distributed_optimizer` and `optimizer.use_distributed_optimizer` are one switch"
    return [Default(f"{section}.use_distributed_optimizer", on, why) for section in ("ddp", "optimizer")]


def _per_token_loss(model: Any, dataset: Any) -> list[Default]:
    """Weight microbatches by the tokens that count in the loss, where samples may leave tokens out."""
    reason = _why_tokens_are_masked(dataset)
    if reason is None or not hasattr(model, "calculate_per_token_loss"):
        return []
    return [Default("model.calculate_per_token_loss", True, f"{reason}: the mean is over those that count in the whole batch")]


def _why_tokens_are_masked(dataset: Any) -> str | None:
    """Return why the `loss_mask` of this dataset's samples may hold zeros; None where every token counts."""
    if isinstance(dataset, FinetuningDatasetConfig):
        return "fine-tuning learns answers alone"
    if getattr(dataset, "eod_mask_loss", False):
        return "`dataset.eod_mask_loss` leaves out what follows the end of a document"
    return "a dataset of your own may leave tokens out" if hasattr(dataset, "build") else None


def padded_examples(model: Any, dataset: Any) -> list[Default]:
    """Pad packed examples to 2 × CP tokens: each context-parallel rank takes two slices of every example."""
    if not isinstance(dataset, FinetuningDatasetConfig) or dataset.pad_to_multiple_of is not None:
        return []
    context = checks.parallel_size(model, checks.CP)
    if context == 1 or not dataset.packed:
        return []
    why = f"context parallel ranks take 2 × {context} slices of each example"
    return [Default("dataset.pad_to_multiple_of", 2 * context, why)]


def _schedule(scheduler: SchedulerConfig, optimizer: OptimizerConfig, train: TrainingConfig) -> list[Default]:
    """Fill in the schedule's open fields, in steps."""
    length = train.train_iters if scheduler.lr_decay_iters is None else scheduler.lr_decay_iters
    filled = {
        "optimizer.min_lr": (optimizer.min_lr, 0.0, "no lowest learning rate was given"),
        "scheduler.lr_decay_iters": (scheduler.lr_decay_iters, length, "as `train.train_iters`"),
        "scheduler.start_weight_decay": (scheduler.start_weight_decay, optimizer.weight_decay, "as `optimizer.weight_decay`"),
        "scheduler.end_weight_decay": (scheduler.end_weight_decay, optimizer.weight_decay, "as `optimizer.weight_decay`"),
    }
    defaults = [Default(setting, value, why) for setting, (explicit, value, why) in filled.items() if explicit is None]
    return defaults if scheduler.lr_warmup_fraction is None else [*defaults, *_warm_up(scheduler, length)]


def _warm_up(scheduler: SchedulerConfig, length: int) -> list[Default]:
    """Turn a warm-up given as a share of `length` steps into steps."""
    fraction, steps = scheduler.lr_warmup_fraction or 0.0, scheduler.lr_warmup_iters
    if steps:
        raise UserError(
            f"`scheduler.lr_warmup_iters` is `{steps}` and `scheduler.lr_warmup_fraction` is `{fraction}`",
            hint="leave one of them out",
        )
    why = f"`scheduler.lr_warmup_fraction={fraction}` of {length} steps"
    # At least one step, where another step follows it.
    steps = min(math.ceil(round(fraction * length, 6)), length - 1)
    return [Default("scheduler.lr_warmup_iters", steps, why), Default("scheduler.lr_warmup_fraction", None, why)]


_MINUTES_BETWEEN_SAVES, _KEPT_CHECKPOINTS = 30.0, 5


def _save_intervals(checkpoint: CheckpointConfig) -> list[Default]:
    """Save every half hour and keep a few checkpoints, where a folder is named and no interval."""
    if checkpoint.save is None or checkpoint.save_interval is not None or checkpoint.save_interval_in_mins is not None:
        return []
    why = "`checkpoint.save` is set, and no interval between checkpoints"
    keep_last = [Default("checkpoint.keep_last", _KEPT_CHECKPOINTS, why)] if checkpoint.keep_last is None else []
    return [Default("checkpoint.save_interval_in_mins", _MINUTES_BETWEEN_SAVES, why), *keep_last]


_EXPECTED = ("full scope is deprecated", "Could not determine rank")
"""Warnings of megatron-core about its own default, and about a process that is not a rank yet."""


def _validate(config: RunConfig) -> None:
    """Run megatron-core's own checks, which also derive fields from others."""
    with warnings.catch_warnings():
        for expected in _EXPECTED:
            warnings.filterwarnings("ignore", expected, UserWarning)
        for name, method in (("model", "finalize"), ("optimizer", "__post_init__"), ("ddp", "__post_init__")):
            section = getattr(config, name)
            before = copy.copy(section)  # fields derived in place would hide which setting was refused
            with refused.user_errors(name, before, lambda candidate, method=method: getattr(candidate, method, _nothing)()):
                getattr(section, method, _nothing)()


def _nothing() -> None:
    """Stand in for a method that a model of the user's own leaves out."""


def _unknown_length(train: TrainingConfig, steps: int | None) -> tuple[str, ...]:
    if train.num_epochs is None or steps is not None:
        return ()
    return (
        (
            f"`train.num_epochs={train.num_epochs}` is converted to steps when a run has read its data; "
            f"this shows `{train.train_iters}` steps"
        ),
    )


def _warnings(model: Any, microbatches: int) -> tuple[str, ...]:
    pipeline = checks.parallel_size(model, checks.PP)
    if microbatches >= pipeline:
        return ()
    return (f"`{microbatches}` microbatches cannot fill `{pipeline}` pipeline stages: some GPUs wait; raise the batch size",)
