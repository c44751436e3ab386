"""What a process computes on: a GPU with Transformer Engine, or the CPU.

megatron-core has no CPU mode. `stand_in` sends its hard-wired CUDA calls to the CPU for as long as a run lasts; on a GPU it
does nothing. Knows no models beyond which layers each device has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

from formats.errors import UserError

CPU, GPU = "cpu", "gpu"


def choose(wanted: str) -> str:
    """`cpu` or `gpu` for what `dist.device` says. UserError where a GPU is wanted and there is none."""
    if wanted == CPU or (wanted == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise UserError("`dist.device` is `gpu`, and torch finds none", hint="set `dist.device=cpu`, or check the driver")
    return GPU


def set_environment(config: Any) -> None:
    """What CUDA's libraries read once, when they start. Nothing that somebody set is changed."""
    if config.mixed_precision == "fp32":
        # Transformer Engine multiplies fp32 in TF32, with 10 bits of mantissa, unless it is told not to.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if config.model.tensor_model_parallel_size > 1 or config.model.context_parallel_size > 1:
        # One queue keeps kernels in the order they were launched in, so that messages start before what hides them.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def prepare(kind: str) -> None:
    """Give this process its device. UserError where a GPU lacks Transformer Engine."""
    if kind == GPU:
        if find_spec("transformer_engine") is None:
            raise UserError(
                "training on a GPU needs Transformer Engine, which is not installed",
                hint="`pip install 'mbtools[gpu]'`, or `dist.device=cpu`",
            )
        torch.cuda.set_device(_gpu(int(os.environ.get("LOCAL_RANK", "0")), visible=torch.cuda.device_count()))


def _gpu(local_rank: int, *, visible: int) -> int:
    """This process's GPU among those it sees. Slurm may show each process its own alone."""
    if visible > 1 and local_rank >= visible:
        raise UserError(
            f"this process is number `{local_rank}` on its host, and it sees `{visible}` GPUs",
            hint="start as many processes on each host as it has GPUs",
        )
    return 0 if visible == 1 else local_rank


def current() -> torch.device:
    """Where parameters and batches live."""
    return torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")


def _on_gpu() -> bool:
    return not _active and torch.cuda.is_available()


def synchronize() -> None:
    """Wait until everything begun is done, so that a clock means something."""
    if _on_gpu():
        torch.cuda.synchronize()


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The decoder's layers: Transformer Engine's on a GPU, megatron-core's own on the CPU."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: PLC0415 - seconds to import

    return get_gpt_decoder_block_spec(
        config, use_transformer_engine=_on_gpu(), normalization=config.normalization, vp_stage=vp_stage
    )


_active: list[TorchFunctionMode] = []


@contextmanager
def stand_in(kind: str) -> Iterator[None]:
    """While this is entered on the CPU, megatron-core's CUDA calls mean the CPU."""
    if kind == GPU:
        yield
        return
    with ExitStack() as stack:
        # torch.compile would spend minutes on what runs once, and does not expect the patches.
        stack.enter_context(mock.patch.dict(os.environ, {"TORCH_COMPILE_DISABLE": "1"}))
        stack.enter_context(mock.patch.object(torch._dynamo.config, "disable", new=True))
        for patch in _patches():
            stack.enter_context(patch)
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


class _CpuForCuda(TorchFunctionMode):
    """Calls that name a CUDA device get the CPU; tensors tell megatron-core's optimizers the types they ask for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(one) else one for one in args)
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


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001 - megatron-core's signature
    """How many tokens go where: numbers, which megatron-core's own function makes of CUDA tensors only."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
