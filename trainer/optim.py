"""megatron-core's gradient reduction and optimizer, from the run's settings. The schedule is `trainer.schedule`'s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_mup_config_overrides,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.module import Float16Module

from trainer import gradient_fusion
from trainer.config import DistributedDataParallelConfig, RunConfig
from trainer.layers.pattern import has_mamba


def wrap(chunks: list[torch.nn.Module], model: Any, ddp: DistributedDataParallelConfig) -> list[Any]:
    """Return model chunks in the precision of `model`, whose gradients are reduced over data-parallel ranks."""
    if model.bf16 or model.fp16:
        chunks = [in_16_bits(model, chunk) for chunk in chunks]
    gradient_fusion.prepare(chunks, model)
    return [DistributedDataParallel(model, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)]


_ROUTER_BIASES = ("expert_bias", "qb_beta")
"""Buffers of routers that megatron-core computes with in fp32."""

_IN_FP32 = ("A_log", "D")
"""Parameters of Mamba layers that megatron-core makes in fp32, and checkpoints hold in fp32."""


def in_16_bits(model: Any, chunk: torch.nn.Module) -> Float16Module:
    """Return a chunk in 16 bits, with the biases of its routers still in fp32: rounded ones would choose other experts; and with
    those parameters of Mamba layers that are in fp32."""
    parameters = [
        (parameter, parameter.data)
        for mixer in chunk.modules()
        if isinstance(mixer, MambaMixer)
        for parameter in map(mixer.get_parameter, _IN_FP32)
    ]
    exact = [
        (router, name, getattr(router, name))
        for router in chunk.modules()
        for name in _ROUTER_BIASES
        if getattr(router, name, None) is not None
    ]
    wrapped = Float16Module(model, chunk)
    for router, name, bias in exact:
        setattr(router, name, bias)
    for parameter, data in parameters:
        parameter.data = data
    return wrapped


def make_optimizer(chunks: list[Any], config: RunConfig) -> MegatronOptimizer:
    """Return the optimizer, and set the functions that the pipeline schedules call for it on `config.model`."""
    optimizer = get_megatron_optimizer(config.optimizer, chunks, config_overrides=_overrides(config))
    for part in each(optimizer):
        if part.init_state_fn is None:  # SGD has none, and megatron-core calls it to load a state
            part.init_state_fn = _allocate_momentum
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


def _overrides(config: RunConfig) -> dict[ParamKey, Any]:
    """Return the settings of single parameters: megatron-core's weight decay, and the learning rates of the method in `peft`."""
    settings = config.optimizer
    multiples = config.peft.rate_multiples() if config.peft is not None else {}
    rates = {
        ParamKey(name=pattern): {"max_lr": settings.lr * times, "min_lr": settings.min_lr * times, "lr_mult": times}
        for pattern, times in multiples.items()
    }
    return get_standard_config_overrides(settings) | _by_width(config.model, settings) | _apart(config.model, settings) | rates


def _apart(model: Any, settings: OptimizerConfig) -> dict[ParamKey, Any]:
    """Return the same learning rates for parameters in fp32, which makes them a group of their own: in one with others in 16
    bits, megatron-core's distributed optimizer saves the state of some as that of others."""
    if not has_mamba(model) or not (settings.bf16 or settings.fp16):
        return {}
    return {ParamKey(name=f"*.mixer.{name}"): {"max_lr": settings.lr, "min_lr": settings.min_lr} for name in _IN_FP32}


def _by_width(model: Any, settings: OptimizerConfig) -> dict[ParamKey, Any]:
    """Return muP's learning rates and epsilons: of hidden matrices, divided by the ratio of the model's width to its base's."""
    if not getattr(model, "use_mup", False):
        return {}
    return get_mup_config_overrides(settings, model.mup_width_mult, settings.optimizer)


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Allocate the state of torch's Adam, made at its first step; megatron-core's distributed optimizer needs it before."""
    for inner in _of_torch(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state.setdefault(parameter, {"step": torch.tensor(0.0), **zeros})


def _allocate_momentum(inner: torch.optim.Optimizer, _config: Any = None) -> None:
    """Allocate the momentum of torch's SGD, which it makes at its first step."""
    for group in inner.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            inner.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


@contextmanager
def steps_apart(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Take the step counts out of torch's Adam inside this context, in which its state is loaded. On leaving, give each parameter
    its own count.

    megatron-core's distributed optimizer fails to load step counts. It also makes one tensor of them for all parameters, and
    torch would increase that once for each parameter.
    """
    steps: list[tuple[dict[str, Any], torch.Tensor]] = []

    def take(inner: torch.optim.Optimizer) -> None:
        steps.extend((state, state.pop("step").clone()) for state in inner.state.values())

    hooks = [inner.register_load_state_dict_post_hook(take) for inner in _of_torch(optimizer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for state, step in steps:
            state["step"] = step


_GROUP = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""The settings in which parameter groups of a model differ."""


def kind(optimizer: MegatronOptimizer) -> str:
    """Return the name of megatron-core's optimizer class. A state is loaded only into the class that saved it."""
    return type(each(optimizer)[0]).__name__


def keep_settings(optimizer: MegatronOptimizer, saved: Any) -> None:
    """Write this run's rates, betas and so on into a saved state: megatron-core would use those that were saved, or fail."""

    def key(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(name) for name in _GROUP)

    ours = {
        key(group): {name: value for name, value in group.items() if name not in {"params", "step"}}
        for part in each(optimizer)
        for group in part.param_groups
    }
    for name, value in saved.items() if isinstance(saved, dict) else ():
        if name == "param_groups":
            for group in value:
                group.update(ours.get(key(group), {}))
        elif name not in {"state", "param_state"}:
            keep_settings(optimizer, value)


def each(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the parts of an optimizer: experts have one of their own where expert parallelism divides them."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def distributed(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    """Yield the distributed optimizers that have parameters: experts have one of their own."""
    for part in each(optimizer):
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
            yield part


def unsharded(optimizer: MegatronOptimizer) -> Iterator[Float16OptimizerWithFloat16Params]:
    """Yield the optimizers that hold unsharded fp32 masters of weights in 16 bits."""
    for part in each(optimizer):
        if isinstance(part, Float16OptimizerWithFloat16Params) and not part.is_stub_optimizer:
            yield part


def _of_torch(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield torch's optimizers inside the distributed ones, as on a CPU. On a GPU they are Transformer Engine's."""
    for part in distributed(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            yield part.optimizer


@contextmanager
def parameters_gathered(chunks: list[Any]) -> Iterator[None]:
    """Gather all parameters of every rank for this context, so that forward passes in it gather none."""
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
