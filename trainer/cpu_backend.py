"""Run megatron-core without a GPU: it has no CPU mode, so its hard-wired CUDA calls are redirected to the CPU during a run.

Runs on a GPU never enter this. Depends on megatron-core's internals, and of this trainer on its kernels alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from trainer import torch_kernels

_active: list[TorchFunctionMode] = []


def is_active() -> bool:
    """Tell whether CUDA calls are redirected to the CPU now."""
    return bool(_active)


@contextmanager
def activate() -> Iterator[None]:
    """Redirect megatron-core's CUDA calls to the CPU, and its kernels to torch's, inside this context."""
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
    """Return a backward pass that keeps `mode` active, which torch would disable: recomputed layers create tensors in it."""
    run = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    return backward


@contextmanager
def _without_random_state_warning() -> Iterator[None]:
    """Drop megatron-core's warning that a GPU draw changed the CPU's random state: on the CPU they are the same state."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")

    def other(record: logging.LogRecord) -> bool:
        return record.msg != "CPU RNG state changed within GPU RNG context"

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


class _CpuForCuda(TorchFunctionMode):
    """Replace CUDA devices in calls by the CPU, and report tensor types as the CUDA types that megatron-core's optimizers
    expect."""

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
    """A CUDA stream on the CPU, where work is done in order."""

    def wait_stream(self, _other: Any) -> None:
        """Do nothing: the work is done."""

    def wait_event(self, _event: Any) -> None:
        """Do nothing: the event has happened."""

    def record_event(self, _event: Any = None) -> Any:
        """Return this stream, which can be waited for like an event."""
        return self

    def synchronize(self) -> None:
        """Do nothing: the work is done."""


def _patches() -> Iterator[AbstractContextManager[Any]]:
    """Yield patches of what megatron-core calls on `torch.cuda`."""
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
    yield from _uneven_messages()
    yield from _kernels()
    yield from _delta_net()


def _delta_net() -> Iterator[AbstractContextManager[Any]]:
    """Yield patches that give megatron-core's gated delta net torch's kernels for those of fla."""
    from megatron.core.ssm.gated_delta_net import common, gdn  # noqa: PLC0415 - seconds to import

    yield mock.patch.object(common, "HAVE_FLA", new=True)
    yield mock.patch.object(common, "l2norm", torch_kernels.l2norm)
    yield mock.patch.object(gdn, "causal_conv1d", torch_kernels.causal_conv1d)
    yield mock.patch.object(gdn, "chunk_gated_delta_rule", gdn.torch_chunk_gated_delta_rule)


def _uneven_messages() -> Iterator[AbstractContextManager[Any]]:
    """Yield patches of messages whose ranks have different numbers of tokens, as parts of experts have: gloo takes equal ones."""
    from megatron.core.tensor_parallel import mappings  # noqa: PLC0415

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(tensor: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        return gather(tensor, group, sizes, use_global_buffer) if sizes is None else _gathered(tensor, group, sizes)

    def scatter_any(tensor: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        return scatter(tensor, group, sizes, use_global_buffer) if sizes is None else _scattered(tensor, group, sizes)

    yield mock.patch.object(mappings, "_gather_along_first_dim", gather_any)
    yield mock.patch.object(mappings, "_reduce_scatter_along_first_dim", scatter_any)


def _gathered(tensor: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> torch.Tensor:
    """Return the rows of all ranks, of which each has its number in `sizes`."""
    if group.size() == 1:
        return tensor
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _scattered(tensor: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> torch.Tensor:
    """Return this rank's rows of the sum over ranks, of which each gets its number in `sizes`."""
    if group.size() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed, group=group)
    return summed.split(list(sizes))[group.rank()]


def _kernels() -> Iterator[AbstractContextManager[Any]]:
    """Yield patches that give megatron-core's optimizers and routers torch's kernels, where they imported those of Transformer
    Engine."""
    from megatron.core import optimizer, utils  # noqa: PLC0415
    from megatron.core.optimizer import clip_grads, distrib_optimizer  # noqa: PLC0415
    from megatron.core.optimizer import optimizer as mixed  # noqa: PLC0415
    from megatron.core.transformer.moe import moe_utils  # noqa: PLC0415

    for module in (clip_grads, mixed):
        yield mock.patch.object(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
        yield mock.patch.object(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    yield mock.patch.object(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    yield mock.patch.object(clip_grads, "multi_tensor_scale_tensor_impl", None)
    yield mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    yield mock.patch.object(moe_utils, "te_general_gemm", None)
    for name, torchs in (("Adam", torch.optim.AdamW), ("SGD", torch.optim.SGD), ("USING_PYTORCH_OPTIMIZER", True)):
        yield mock.patch.object(optimizer, name, torchs)


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001 - megatron-core's signature
    """Return numbers of tokens on the CPU, as megatron-core's function does for CUDA tensors."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
