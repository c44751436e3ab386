"""megatron-core's gradient reduction, optimizer and schedule, from the run's settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from trainer.config import RunConfig


def wrap(chunks: list[torch.nn.Module], config: RunConfig) -> list[Any]:
    """Model chunks in the run's precision whose gradients are reduced over data-parallel ranks."""
    model = config.model
    if model.bf16 or model.fp16:
        chunks = [Float16Module(model, chunk) for chunk in chunks]
    return [
        DistributedDataParallel(model, config.ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]


def make_optimizer(chunks: list[Any], config: RunConfig) -> MegatronOptimizer:
    """The optimizer, and what the pipeline schedules must call for it."""
    optimizer = get_megatron_optimizer(config.optimizer, chunks)
    model = config.model
    model.grad_scale_func = optimizer.scale_loss
    model.finalize_model_grads_func = finalize_model_grads
    if config.ddp.overlap_grad_reduce:
        model.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        if len(chunks) > 1:
            model.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])
    if config.ddp.overlap_param_gather and config.ddp.align_param_gather:
        model.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])
    return optimizer


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def make_scheduler(optimizer: MegatronOptimizer, config: RunConfig) -> OptimizerParamScheduler:
    """Learning rate and weight decay by samples seen, so that a changed batch size does not move the curve."""
    told, samples = config.scheduler, config.train.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=told.lr_warmup_init,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=told.lr_warmup_iters * samples,
        lr_decay_steps=told.lr_decay_iters * samples,
        lr_decay_style=told.lr_decay_style,
        start_wd=told.start_weight_decay,
        end_wd=told.end_weight_decay,
        wd_incr_steps=config.train.train_iters * samples,
        wd_incr_style=told.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=None if told.lr_wsd_decay_iters is None else told.lr_wsd_decay_iters * samples,
        lr_wsd_decay_style=told.lr_wsd_decay_style,
    )


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the state that it makes at its first step: megatron-core's distributed optimizer asks for it before."""
    for inner in _of_torch(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state.setdefault(parameter, {"step": torch.tensor(0.0), **zeros})


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """A loaded distributed optimizer counts all parameters' steps in one tensor, which torch's Adam would add to for each."""
    for inner in _of_torch(optimizer):
        for state in inner.state.values():
            state["step"] = state["step"].clone()


def _of_torch(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside distributed ones: those of a CPU. On a GPU they are Transformer Engine's."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one, DistributedOptimizer) and isinstance(one.optimizer, torch.optim.Adam):
            yield one.optimizer


@contextmanager
def parameters_gathered(chunks: list[Any]) -> Iterator[None]:
    """While this is entered every rank has all parameters, and none is gathered behind the scenes."""
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
