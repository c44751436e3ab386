"""megatron-core without a GPU: it has no CPU mode, so its hard-wired CUDA calls are sent to the CPU for as long as a run lasts.

Runs on a GPU never enter this. Knows megatron-core's inside, and nothing of this trainer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

_active: list[TorchFunctionMode] = []


def is_active() -> bool:
    """Are CUDA calls sent to the CPU now?"""
    return bool(_active)


@contextmanager
def activate() -> Iterator[None]:
    """While this is entered, megatron-core's CUDA calls mean the CPU, and its kernels are torch's."""
    with ExitStack() as stack:
        # torch.compile would spend minutes on what runs once, and does not expect the patches.
        stack.enter_context(mock.patch.dict(os.environ, {"TORCH_COMPILE_DISABLE": "1"}))
        stack.enter_context(mock.patch.object(torch._dynamo.config, "disable", new=True))
        for patch in _patches():
            stack.enter_context(patch)
        stack.enter_context(_without_random_state_warning())
        mode = stack.enter_context(_CpuForCuda())
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _inside(mode)))
        _active.append(mode)
        stack.callback(_active.remove, mode)
        yield


def _inside(mode: TorchFunctionMode) -> Callable[..., Any]:
    """Backward passes with the mode that torch takes away for their length: recomputed layers make tensors in them."""
    run = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    return backward


@contextmanager
def _without_random_state_warning() -> Iterator[None]:
    """megatron-core warns where a draw for the GPU moved the CPU's random state. Here it always does: they are the same."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")

    def other(record: logging.LogRecord) -> bool:
        return record.msg != "CPU RNG state changed within GPU RNG context"

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


class _CpuForCuda(TorchFunctionMode):
    """Calls that name a CUDA device get the CPU; tensors tell megatron-core's optimizers the types they ask for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        answer = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer


def _is_cuda(device: Any) -> bool:
    if isinstance(device, (str, torch.device)):
        return str(device).startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _Stream:
    """Work on the CPU is done in order."""

    def wait_stream(self, _other: Any) -> None:
        """It is done already."""

    def wait_event(self, _event: Any) -> None:
        """It has happened already."""

    def record_event(self, _event: Any = None) -> Any:
        """What has happened can be waited for like a stream."""
        return self

    def synchronize(self) -> None:
        """It is done already."""


def _patches() -> Iterator[AbstractContextManager[Any]]:
    """What megatron-core calls on `torch.cuda`, answered by the CPU."""
    from megatron.core.tensor_parallel import random  # noqa: PLC0415 - seconds to import
    from megatron.core.transformer.moe import token_dispatcher  # noqa: PLC0415

    get_state: Callable[..., Any] = lambda *_, **__: torch.get_rng_state()  # noqa: E731
    set_state: Callable[..., Any] = lambda state, *_, **__: torch.set_rng_state(state)  # noqa: E731
    answers: dict[str, Any] = {
        "current_device": lambda: "cpu",
        "synchronize": lambda *_: None,
        "set_device": lambda *_: None,
        "empty_cache": lambda *_: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "Stream": lambda *_, **__: _Stream(),
        "current_stream": lambda *_: _Stream(),
        "stream": lambda *_: nullcontext(),
    }
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, answer)
    yield mock.patch.object(random, "_get_cuda_rng_state", get_state)
    yield mock.patch.object(random, "_set_cuda_rng_state", set_state)
    yield mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _on_cpu)
    yield from _kernels()


def _kernels() -> Iterator[AbstractContextManager[Any]]:
    """Where Transformer Engine is installed, megatron-core's optimizers took its CUDA kernels on import: back to torch's."""
    from megatron.core import optimizer, utils  # noqa: PLC0415
    from megatron.core.optimizer import clip_grads, distrib_optimizer  # noqa: PLC0415
    from megatron.core.optimizer import optimizer as mixed  # noqa: PLC0415

    for module in (clip_grads, mixed):
        yield mock.patch.object(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
        yield mock.patch.object(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    yield mock.patch.object(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    yield mock.patch.object(clip_grads, "multi_tensor_scale_tensor_impl", None)
    yield mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    for name, torchs in (("Adam", torch.optim.AdamW), ("SGD", torch.optim.SGD), ("USING_PYTORCH_OPTIMIZER", True)):
        yield mock.patch.object(optimizer, name, torchs)


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001 - megatron-core's signature
    """How many tokens go where: numbers, which megatron-core's own function makes of CUDA tensors only."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
