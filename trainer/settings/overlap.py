"""Choose which communication overlaps with computation, with a reason for each choice.

Explicit settings win, under `comm_overlap` or on `model` and `ddp` directly, wherever megatron-core supports them. Depends on the
layout and the device, not on shapes. The policy is Megatron-Bridge's, except that context-parallel ranks count: gradients are
reduced over them as well.
"""

from __future__ import annotations

from typing import Any

from formats.errors import UserError
from trainer import user_buffers
from trainer.settings.defaults import Default, explicit_value

CPU = "cpu"


def defaults(config: Any, *, data_parallel: int, device: str) -> list[Default]:
    """Return every overlap setting of a run, explicit or chosen. `data_parallel` includes context-parallel ranks.

    Raises UserError for an explicit setting that megatron-core refuses, or with which it would compute wrong gradients.
    """
    return [_tensor(config, device), *_pipeline(config), *_data(config, data_parallel, device)]


def _requested(config: Any, name: str, *, part: str) -> bool | None:
    """Return the explicit value, under `comm_overlap` or on the section itself; None where there is none."""
    overlapped, direct = getattr(config.comm_overlap, name), explicit_value(config, f"{part}.{name}")
    if overlapped is not None and direct is not None and overlapped != direct:
        raise UserError(
            f"`comm_overlap.{name}` is `{overlapped}`, but `{part}.{name}` is `{direct}`",
            hint=f"leave `{part}.{name}` out: `comm_overlap` sets it",
        )
    return direct if overlapped is None else overlapped


def _size(model: Any, name: str) -> int:
    return getattr(model, name, None) or 1


def _tensor(config: Any, device: str) -> Default:
    setting = "model.tp_comm_overlap"
    obstacle = _tensor_obstacle(config, device)
    if not _requested(config, "tp_comm_overlap", part="model"):
        return Default(setting, False, obstacle or "nobody asked for it: `comm_overlap.tp_comm_overlap=true`")
    if obstacle:
        raise UserError(
            f"`comm_overlap.tp_comm_overlap` cannot be on: {obstacle}",
            hint="leave it out; gradients, weights and pipeline messages overlap all the same",
        )
    return Default(setting, True, "parts of a layer's product are sent while others are computed")


def _tensor_obstacle(config: Any, device: str) -> str:
    """Return why Transformer Engine cannot overlap tensor-parallel messages; empty where it can."""
    model = config.model
    recipe = getattr(model, "fp8_recipe", None) if getattr(model, "fp8", None) else None
    reasons = {
        "one tensor-parallel rank sends nothing": _size(model, "tensor_model_parallel_size") == 1,
        "there is nothing to overlap with on a CPU": device == CPU,
        "it needs `model.sequence_parallel`": not getattr(model, "sequence_parallel", False),
        f"`mixed_precision={config.mixed_precision}` has no buffers in Transformer Engine": (
            not getattr(model, "bf16", False) or recipe not in user_buffers.FP8_RECIPES
        ),
        "`model.deterministic_mode` is on": getattr(model, "deterministic_mode", False),
        "adapters take the activations before they are sent": config.peft is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _pipeline(config: Any) -> list[Default]:
    pipeline = _size(config.model, "pipeline_model_parallel_size")
    virtual = _size(config.model, "virtual_pipeline_model_parallel_size")
    overlap = _requested(config, "overlap_p2p_comm", part="model")
    batch = _requested(config, "batch_p2p_comm", part="model")
    _check_pipeline(pipeline, virtual, overlap=overlap, batch=batch)
    if virtual > 1:
        why = f"{virtual} virtual stages compute other microbatches while activations are sent"
        overlap = not batch if overlap is None else overlap
    else:
        why = "without virtual stages there is nothing to compute meanwhile" if pipeline > 1 else "one pipeline stage"
        overlap = False
    batch = not overlap if batch is None else batch
    return [Default("model.overlap_p2p_comm", overlap, why), Default("model.batch_p2p_comm", batch, why)]


def _check_pipeline(pipeline: int, virtual: int, *, overlap: bool | None, batch: bool | None) -> None:
    if virtual > 1 and pipeline == 2 and (batch or overlap is False):
        setting = "comm_overlap.batch_p2p_comm=true" if batch else "comm_overlap.overlap_p2p_comm=false"
        raise UserError(
            f"`{setting}` gives wrong gradients with `{pipeline}` pipeline stages and `{virtual}` virtual stages: "
            "the previous and the next rank are the same, and batched messages between them are mixed up",
            hint="leave it out, and messages overlap with computation",
        )
    if overlap and virtual == 1:
        raise UserError(
            "`comm_overlap.overlap_p2p_comm` needs virtual pipeline stages",
            hint="set `model.virtual_pipeline_model_parallel_size`, or leave it out",
        )
    if overlap and batch:
        raise UserError(
            "`comm_overlap.overlap_p2p_comm` and `comm_overlap.batch_p2p_comm` cannot both be on", hint="leave one of them out"
        )


def _data(config: Any, ranks: int, device: str) -> list[Default]:
    useful, why = ranks > 1 and device != CPU, f"{ranks} ranks reduce gradients"
    if not useful:
        why = "there is nothing to overlap with on a CPU" if ranks > 1 else "one rank alone has its gradients"
    reduce = _requested(config, "overlap_grad_reduce", part="ddp")
    reduce = useful if reduce is None else reduce
    gather = _requested(config, "overlap_param_gather", part="ddp")
    sharded = config.ddp.use_distributed_optimizer
    _check_gather(reduce, gather, sharded=sharded)
    gather = (reduce and useful and sharded) if gather is None else gather
    _check_with_gather(config, gather)
    reason = why if sharded else "without the distributed optimizer every rank has all weights"
    aligned = gather and (_size(config.model, "virtual_pipeline_model_parallel_size") > 1 or config.ddp.align_param_gather)
    return [
        Default("ddp.overlap_grad_reduce", reduce, why),
        Default("ddp.overlap_param_gather", gather, reason),
        Default("optimizer.overlap_param_gather", gather, "as `ddp.overlap_param_gather`"),
        Default(
            "ddp.align_param_gather",
            aligned,
            "virtual stages gather at the same time on all ranks",
        ),
    ]


def _check_with_gather(config: Any, gather: bool) -> None:
    for setting, requested in (
        ("optimizer.overlap_param_gather", config.optimizer.overlap_param_gather),
        ("ddp.align_param_gather", config.ddp.align_param_gather),
    ):
        if requested and not gather:
            raise UserError(
                f"`{setting}` is `True`, but `ddp.overlap_param_gather` is `False`",
                hint=f"leave `{setting}` out: it follows from `comm_overlap.overlap_param_gather`",
            )


def _check_gather(reduce: bool, gather: bool | None, *, sharded: bool) -> None:
    if gather and not sharded:
        raise UserError(
            "`comm_overlap.overlap_param_gather` needs the distributed optimizer",
            hint="set `ddp.use_distributed_optimizer=true`, or leave it out",
        )
    if gather and not reduce:
        raise UserError(
            "`comm_overlap.overlap_param_gather` needs `comm_overlap.overlap_grad_reduce`",
            hint="set `comm_overlap.overlap_grad_reduce=true`, or leave it out",
        )
