"""megatron-core's gradient reduction and optimizer, from the run's settings. The schedule is `trainer.schedule`'s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_mup_config_overrides, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
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
    optimizer = get_megatron_optimizer(config.optimizer, chunks, config_overrides=_overrides(config))
    for one in _each(optimizer):
        if one.init_state_fn is None:  # of SGD, which megatron-core calls all the same where a state is loaded
            one.init_state_fn = _allocate_momentum
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
    """What parameters have of their own: megatron-core's weight decay, and the learning rates of the method in `peft`."""
    told = config.optimizer
    multiples = config.peft.rate_multiples() if config.peft is not None else {}
    rates = {
        ParamKey(name=pattern): {"max_lr": told.lr * times, "min_lr": told.min_lr * times, "lr_mult": times}
        for pattern, times in multiples.items()
    }
    return get_standard_config_overrides(told) | _by_width(config) | rates


def _by_width(config: RunConfig) -> dict[ParamKey, Any]:
    """muP's learning rates and epsilons: those of a hidden matrix are divided by how much wider the model is than its base."""
    if not getattr(config.model, "use_mup", False):
        return {}
    return get_mup_config_overrides(config.optimizer, config.model.mup_width_mult, config.optimizer.optimizer)


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the state that it makes at its first step: megatron-core's distributed optimizer asks for it before."""
    for inner in _of_torch(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state.setdefault(parameter, {"step": torch.tensor(0.0), **zeros})


def _allocate_momentum(inner: torch.optim.Optimizer, _config: Any = None) -> None:
    """Give torch's SGD the state that it makes at its first step."""
    for group in inner.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            inner.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


@contextmanager
def steps_apart(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While this is entered, states are loaded into torch's Adam without its counts of steps.

    megatron-core's distributed optimizer fails over them; and it makes one tensor of them for all parameters, to which torch
    would add once for each. On leaving each parameter has its own.
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
"""What tells parameter groups of one model apart."""


def kind(optimizer: MegatronOptimizer) -> str:
    """megatron-core's class of optimizer; states of one do not fit another."""
    return type(_each(optimizer)[0]).__name__


def keep_settings(optimizer: MegatronOptimizer, saved: Any) -> None:
    """Write this run's rates, betas and so on into a saved state: megatron-core would take those that were saved, or refuse."""

    def key(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(name) for name in _GROUP)

    ours = {
        key(group): {name: value for name, value in group.items() if name not in {"params", "step"}}
        for one in _each(optimizer)
        for group in one.param_groups
    }
    for name, value in saved.items() if isinstance(saved, dict) else ():
        if name == "param_groups":
            for group in value:
                group.update(ours.get(key(group), {}))
        elif name not in {"state", "param_state"}:
            keep_settings(optimizer, value)


def _each(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def distributed(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    """The distributed optimizers that have something to train: of experts there is another."""
    for one in _each(optimizer):
        if isinstance(one, DistributedOptimizer) and not one.is_stub_optimizer:
            yield one


def undivided(optimizer: MegatronOptimizer) -> Iterator[Float16OptimizerWithFloat16Params]:
    """The optimizers that hold whole fp32 masters of weights in 16 bits."""
    yield from (
        one for one in _each(optimizer) if isinstance(one, Float16OptimizerWithFloat16Params) and not one.is_stub_optimizer
    )


def _of_torch(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside distributed ones: those of a CPU. On a GPU they are Transformer Engine's."""
    for one in distributed(optimizer):
        if isinstance(one.optimizer, torch.optim.Adam):
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
