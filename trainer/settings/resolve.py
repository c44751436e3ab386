"""From what a run was told to what it does: every field that is left open is filled, and everything that cannot run is refused.

Runs before processes start, and again in each of them with the same answer. The configuration it is given stays as it is.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from formats.errors import UserError
from trainer.config import CheckpointConfig, DatasetConfig, FinetuningDatasetConfig, RunConfig
from trainer.settings import checks, contradictions, cross_entropy, hf_config, overlap, paths, precision, refused, unsupported
from trainer.settings.defaults import Choice, apply_choices
from trainer.settings.precision import Machine


@dataclass(frozen=True, slots=True)
class Resolved:
    """A run that can start."""

    config: RunConfig
    explanations: tuple[Choice, ...]
    """What was set that nobody set, and why."""

    warnings: tuple[str, ...]
    world_size: int
    data_parallel_size: int
    """Copies of the model; context-parallel ranks are not counted."""

    num_microbatches: int
    """Microbatches per step on each rank."""


def resolve(
    config: RunConfig, *, world_size: int, device: str, machine: Machine | None = None, steps: int | None = None
) -> Resolved:
    """A copy of a run's configuration with every field decided, for `world_size` processes on `cpu` or `gpu`.

    UserError for whatever would fail later. `machine` is what this process finds, if not given. `steps` is what
    `train.num_epochs` comes to, as soon as the data says it: until then the schedule is that of `train.train_iters`.
    """
    told = _copy(config)
    paths.expand(told)
    machine = machine or precision.find_machine(device)
    checks.check_sizes(told)
    checks.check_attention(told.model)
    checks.check_optimizer(told)
    unsupported.check(told, machine.device)
    checks.check_peft(told.peft)
    precision.check(told.mixed_precision, machine)
    checks.check_device(told, machine)
    contradictions.check_kernels(told)
    checks.check_packed(told, machine)
    choices = [*_epochs(told, steps), *_virtual_stages(told.model), *_agreements(told), *_per_token(told), *padded_examples(told)]
    choices = apply_choices(told, choices) + precision.apply(told.mixed_precision, told)
    copies = _check_layout(told, world_size)
    microbatches = checks.num_microbatches(told, copies)
    context = checks.size(told.model, checks.CP)
    choices += apply_choices(told, overlap.choose(told, data_parallel=copies * context, device=device))
    contradictions.check_deterministic(told.model)
    choices += apply_choices(told, _device_fields(told.model, machine))
    cross_entropy.check(told.model, machine)
    choices += apply_choices(told, _schedule(told))
    if told.train.num_epochs is None or steps is not None:
        checks.check_schedule(told)
    contradictions.check(told)
    checks.check_saving(told)
    choices += apply_choices(told, _saving(told.checkpoint))
    elsewhere = _kernels_elsewhere(told.model, machine)
    with _kernels_put_aside(told.model, machine):
        _validate(told)
    choices += apply_choices(told, elsewhere) + hf_config.follow(told.model)
    warnings_ = (
        *_warnings(told, microbatches),
        *_unknown_length(told, steps),
        *hf_config.notes(told.model),
        *cross_entropy.notes(told.model, machine),
    )
    return Resolved(told, tuple(choices), warnings_, world_size, copies, microbatches)


def _copy(config: RunConfig) -> RunConfig:
    """A deep copy, but for a dataset of the user's own, which may hold open files and is not changed."""
    parts = {part.name: getattr(config, part.name) for part in fields(config)}
    ours = isinstance(config.dataset, (DatasetConfig, FinetuningDatasetConfig))
    kept = {} if ours else {"dataset": parts.pop("dataset")}
    return type(config)(**copy.deepcopy(parts), **kept)


def _check_layout(config: RunConfig, world_size: int) -> int:
    copies = checks.data_parallel_size(config.model, world_size)
    checks.check_tensor_parallel(config.model)
    checks.check_pipeline(config.model)
    checks.check_sequence(config)
    checks.check_samples(config)
    checks.check_precision_sizes(config)
    return copies


def _epochs(config: RunConfig, steps: int | None) -> list[Choice]:
    if steps is None:
        return []
    return [Choice("train.train_iters", steps, f"`train.num_epochs={config.train.num_epochs}` of this data")]


def _virtual_stages(model: Any) -> list[Choice]:
    """A layout of stages says how many are virtual. One is none: megatron-core would choose its interleaved schedule."""
    setting, told = f"model.{checks.VPP}", getattr(model, checks.VPP, None)
    if told == 1:
        return [Choice(setting, None, "one virtual stage is an ordinary one")]
    layout = getattr(model, "pipeline_model_parallel_layout", None)
    if not isinstance(layout, (str, list)) or told is not None:
        return []
    with refused.explained("model", model, _stages_of):
        stages = _stages_of(model)
    virtual = stages.virtual_pipeline_model_parallel_size
    return [Choice(setting, virtual, "as `model.pipeline_model_parallel_layout` says")] if virtual > 1 else []


def _stages_of(model: Any) -> Any:
    layout = model.pipeline_model_parallel_layout
    return PipelineParallelLayerLayout(layout, checks.size(model, checks.PP)) if layout is not None else None


def _agreements(config: RunConfig) -> list[Choice]:
    """Fields that exist twice."""
    on = config.ddp.use_distributed_optimizer or config.optimizer.use_distributed_optimizer
    why = "`ddp.use_distributed_optimizer` and `optimizer.use_distributed_optimizer` are one switch"
    return [Choice(f"{part}.use_distributed_optimizer", on, why) for part in ("ddp", "optimizer")]


def _per_token(config: RunConfig) -> list[Choice]:
    """Microbatches with few tokens that count must not weigh as much as those with many."""
    what = _leaves_tokens_out(config.dataset)
    if what is None or not hasattr(config.model, "calculate_per_token_loss"):
        return []
    return [Choice("model.calculate_per_token_loss", True, f"{what}: the mean is over those that count in the whole batch")]


def _leaves_tokens_out(dataset: Any) -> str | None:
    """Why the `loss_mask` of this dataset's samples may hold zeros; None where every token counts."""
    if isinstance(dataset, FinetuningDatasetConfig):
        return "fine-tuning learns answers alone"
    if getattr(dataset, "eod_mask_loss", False):
        return "`dataset.eod_mask_loss` leaves out what follows the end of a document"
    return "a dataset of your own may leave tokens out" if hasattr(dataset, "build") else None


def padded_examples(config: RunConfig) -> list[Choice]:
    """Context-parallel ranks take two slices each of every packed example."""
    if not isinstance(config.dataset, FinetuningDatasetConfig) or config.dataset.pad_to_multiple_of is not None:
        return []
    context = checks.size(config.model, checks.CP)
    if context == 1 or not config.dataset.packed:
        return []
    return [
        Choice("dataset.pad_to_multiple_of", 2 * context, f"context parallel ranks take 2 × {context} slices of each example")
    ]


WITHOUT_CUDA: dict[str, Any] = {
    "attention_backend": AttnBackend.local,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "cross_entropy_loss_fusion": False,
    "use_cpu_initialization": True,
}
"""megatron-core's kernels that exist for CUDA only, off."""


KERNELS: dict[str, Any] = {
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "apply_rope_fusion": True,
    "persist_layer_norm": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": cross_entropy.TE,
}
"""Kernels that are faster, with a Transformer Engine that has them all."""


def kernels(transformer_engine: str | None) -> dict[str, Any]:
    """The kernels that are faster, where nobody chose and this version of Transformer Engine is installed."""
    return {**KERNELS, "cross_entropy_fusion_impl": cross_entropy.implementation(transformer_engine)}


def _device_fields(model: Any, machine: Machine) -> list[Choice]:
    if machine.device == "cpu":
        why = "the CPU has none of CUDA's kernels"
        return [Choice(f"model.{name}", value, why) for name, value in WITHOUT_CUDA.items() if hasattr(model, name)]
    choices: list[Choice] = []
    if not getattr(model, "bf16", False):
        choices.append(Choice("model.cross_entropy_loss_fusion", False, "the fused kernels round gradients to bf16"))
    elif getattr(model, "deterministic_mode", False):
        choices.append(Choice("model.cross_entropy_loss_fusion", False, "`model.deterministic_mode`"))
    if importlib.util.find_spec("transformer_engine"):  # megatron-core refuses settings for what it cannot import
        choices += _kernels(model, {choice.setting for choice in choices}, kernels(machine.transformer_engine))
    return choices


def _kernels(model: Any, named: set[str], faster: Mapping[str, Any]) -> list[Choice]:
    free = {f"model.{name}": value for name, value in faster.items() if getattr(model, name, False) is None}
    return [Choice(name, value, "a fused kernel") for name, value in free.items() if name not in named]


def _kernels_elsewhere(model: Any, machine: Machine) -> list[Choice]:
    """What a run on GPUs will choose, seen from a machine that does not have their kernels."""
    return _kernels(model, set(), KERNELS) if _only_looks(machine) else []


def _only_looks(machine: Machine) -> bool:
    """A run on GPUs needs Transformer Engine: without it, this is a look at one."""
    return machine.device == "gpu" and not importlib.util.find_spec("transformer_engine")


@contextmanager
def _kernels_put_aside(model: Any, machine: Machine) -> Iterator[None]:
    """megatron-core refuses kernels that it cannot import, also on a machine that only looks at a run."""
    asked = [name for name in KERNELS if getattr(model, name, None) is True] if _only_looks(machine) else []
    for name in asked:
        setattr(model, name, None)
    yield
    for name in asked:
        setattr(model, name, True)


def _schedule(config: RunConfig) -> list[Choice]:
    """The schedule's open fields, in steps."""
    told, decay = config.scheduler, config.optimizer.weight_decay
    length = config.train.train_iters if told.lr_decay_iters is None else told.lr_decay_iters
    values = {
        "optimizer.min_lr": (config.optimizer.min_lr, 0.0, "no lowest learning rate was given"),
        "scheduler.lr_decay_iters": (told.lr_decay_iters, length, "as `train.train_iters`"),
        "scheduler.start_weight_decay": (told.start_weight_decay, decay, "as `optimizer.weight_decay`"),
        "scheduler.end_weight_decay": (told.end_weight_decay, decay, "as `optimizer.weight_decay`"),
    }
    choices = [Choice(name, value, why) for name, (found, value, why) in values.items() if found is None]
    share = told.lr_warmup_fraction
    if share is None:
        return choices
    if told.lr_warmup_iters:
        raise UserError(
            f"`scheduler.lr_warmup_iters` is `{told.lr_warmup_iters}` and `scheduler.lr_warmup_fraction` is `{share}`",
            hint="leave one of them out",
        )
    why = f"`scheduler.lr_warmup_fraction={share}` of {length} steps"
    return [
        *choices,
        Choice("scheduler.lr_warmup_iters", _share(share, length), why),
        Choice("scheduler.lr_warmup_fraction", None, why),
    ]


def _share(share: float, length: int) -> int:
    """Steps of a warm-up: at least one, where there is another step after it."""
    return min(math.ceil(round(share * length, 6)), length - 1)


_SAVED_EVERY_MINS, _KEPT = 30.0, 5


def _saving(told: CheckpointConfig) -> list[Choice]:
    """Who names a folder and no interval loses half an hour at most, and does not fill the disk."""
    if told.save is None or told.save_interval is not None or told.save_interval_in_mins is not None:
        return []
    why = "`checkpoint.save` is set, and no interval between checkpoints"
    kept = [Choice("checkpoint.keep_last", _KEPT, why)] if told.keep_last is None else []
    return [Choice("checkpoint.save_interval_in_mins", _SAVED_EVERY_MINS, why), *kept]


_EXPECTED = ("full scope is deprecated", "Could not determine rank")
"""What megatron-core says of its own default, and of a process that is not a rank yet."""


def _validate(config: RunConfig) -> None:
    """megatron-core's own checks, and the fields it derives from others."""
    with warnings.catch_warnings():
        for expected in _EXPECTED:
            warnings.filterwarnings("ignore", expected, UserWarning)
        for name, method in (("model", "finalize"), ("optimizer", "__post_init__"), ("ddp", "__post_init__")):
            part = getattr(config, name)
            before = copy.copy(part)  # what is derived in place would hide which setting was refused
            with refused.explained(name, before, lambda tried, method=method: getattr(tried, method, _nothing)()):
                getattr(part, method, _nothing)()


def _nothing() -> None:
    """What a model of the user's own may leave out."""


def _unknown_length(config: RunConfig, steps: int | None) -> tuple[str, ...]:
    epochs, shown = config.train.num_epochs, config.train.train_iters
    if epochs is None or steps is not None:
        return ()
    return (f"`train.num_epochs={epochs}` is counted in steps when a run has read its data; shown are `{shown}` steps",)


def _warnings(config: RunConfig, microbatches: int) -> tuple[str, ...]:
    pipeline = checks.size(config.model, checks.PP)
    if microbatches >= pipeline:
        return ()
    return (f"`{microbatches}` microbatches cannot fill `{pipeline}` pipeline stages: some GPUs wait; raise the batch size",)
