"""Choose and prepare what a process computes on: a GPU with Transformer Engine, or the CPU.

Of models, knows only which layers each device has. `cpu_backend` lets megatron-core run without a GPU.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from formats.errors import UserError
from trainer import cpu_backend, user_buffers

CPU, GPU = "cpu", "gpu"


def choose(setting: str) -> str:
    """Return `cpu` or `gpu` for a value of `dist.device`. Raises UserError where a GPU is requested and there is none."""
    if setting == CPU or (setting == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise UserError("`dist.device` is `gpu`, and torch finds none", hint="set `dist.device=cpu`, or check the driver")
    return GPU


def set_environment(config: Any) -> None:
    """Set the environment variables that CUDA's libraries read when they start. Variables that are set stay as they are."""
    if config.mixed_precision == "fp32":
        # Transformer Engine multiplies fp32 in TF32, with 10 bits of mantissa, unless it is told not to.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if config.model.tensor_model_parallel_size > 1 or config.model.context_parallel_size > 1:
        # One queue keeps kernels in the order they were launched in, so that messages start before what hides them.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    user_buffers.set_environment()
    if getattr(config.model, "deterministic_mode", False):
        _set_deterministic(os.environ)


_DETERMINISTIC = {
    "NCCL_ALGO": ("Ring",),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}
"""Environment variables of NCCL, Transformer Engine and cuBLAS, and the values with which results are bitwise reproducible."""


def _set_deterministic(env: MutableMapping[str, str]) -> None:
    for name, values in _DETERMINISTIC.items():
        value = env.setdefault(name, values[0])
        if value not in values:
            raise UserError(
                f"`model.deterministic_mode` is `True`, and the environment has `{name}={value}`",
                hint=f"unset `{name}`, or set it to `{'` or `'.join(values)}`",
            )


@contextmanager
def determinism(model: Any) -> Iterator[None]:
    """Have torch use deterministic algorithms inside this context, if `model.deterministic_mode` is set."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or bool(getattr(model, "deterministic_mode", False)))
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def prepare(kind: str) -> None:
    """Set this process's device. Raises UserError for a GPU without Transformer Engine."""
    if kind == GPU:
        if find_spec("transformer_engine") is None:
            raise UserError(
                "training on a GPU needs Transformer Engine, which is not installed",
                hint="`pip install 'mbtools[gpu]'`, or `dist.device=cpu`",
            )
        if dist.is_initialized() and not os.environ.get("LOCAL_RANK"):
            return  # a program that has a process group, and no torchrun, has chosen a GPU
        torch.cuda.set_device(_gpu(local_rank(os.environ), visible=torch.cuda.device_count()))


def local_rank(env: Mapping[str, str]) -> int:
    """Return this process's rank on its host. Raises UserError where the variable is not a number."""
    rank = env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or "0"
    if not rank.isdecimal():
        raise UserError(
            f"`LOCAL_RANK` is `{rank}`, which is not the number of a process on its host",
            hint="start all processes with torchrun",
        )
    return int(rank)


def _gpu(local_rank: int, *, visible: int) -> int:
    """Return this process's GPU among those it sees. Slurm may show each process its own GPU only."""
    if visible > 1 and local_rank >= visible:
        raise UserError(
            f"this process is number `{local_rank}` on its host, and it sees `{visible}` GPUs",
            hint="start as many processes on each host as it has GPUs",
        )
    return 0 if visible == 1 else local_rank


def current() -> torch.device:
    """Return the device of parameters and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")


def _on_gpu() -> bool:
    return not cpu_backend.is_active() and torch.cuda.is_available()


def unused(setting: str) -> int:
    """Return how many GPUs of this host a single process does not use."""
    return torch.cuda.device_count() - 1 if choose(setting) == GPU else 0


def memory() -> int | None:
    """Return the memory of this process's GPU in bytes; None on the CPU."""
    return torch.cuda.get_device_properties(current()).total_memory if _on_gpu() else None


def synchronize() -> None:
    """Wait until all queued GPU work is done, so that a clock measures it."""
    if _on_gpu():
        torch.cuda.synchronize()


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Return the spec of the decoder's layers: Transformer Engine's on a GPU, megatron-core's own on the CPU."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: PLC0415 - seconds to import

    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=_on_gpu(),
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    if config.num_moe_experts and not _on_gpu():
        _name_norms_as_on_a_gpu(spec.layer_specs)
    return spec


def each_layer_spec(config: Any) -> list[Any]:
    """Return the specs of a layer with a feed-forward part and, where the model has experts, of one with experts."""
    experts = [0, 1] if config.num_moe_experts else [0]
    kinds = copy.copy(config)
    kinds.num_layers, kinds.moe_layer_freq = len(experts), experts
    return _specs(kinds)


def last_layer_spec(config: Any) -> Any:
    """Return the spec of the decoder's last layer, whichever rank has it: layers of multi-token prediction are like it."""
    return _specs(config)[-1]


def _specs(config: Any) -> list[Any]:
    """Return the specs of all of the decoder's layers, whichever rank has them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs  # noqa: PLC0415 - seconds to import

    specs = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=_on_gpu(), normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    if config.num_moe_experts and not _on_gpu():
        _name_norms_as_on_a_gpu(specs)
    return list(specs)


def _name_norms_as_on_a_gpu(layer_specs: Sequence[Any]) -> None:
    """Let checkpoints have Transformer Engine's key for the norm before experts: local layers have a dense layer's for it."""
    from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: PLC0415 - seconds to import

    for submodules in {id(layer.submodules): layer.submodules for layer in layer_specs}.values():
        mlp = submodules.mlp
        if MoELayer in {getattr(mlp, "module", None), getattr(mlp, "func", None)}:
            submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)


_ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""Variables that megatron-core sets for a model's attention; it fails where they are set for another model."""


_ATTENTION_MODULE = "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
_QUANTIZATION_MODULE = "transformer_engine.pytorch.quantization"


@contextmanager
def layers_restored() -> Iterator[None]:
    """Restore what a model's layers leave in this process, so that another model can follow.

    Transformer Engine keeps the kernels of attention that it chose for the last model, whatever the variables say by then, and
    the largest values of delayed scaling, with the process group that shares them.
    """
    before = {name: os.environ.get(name) for name in _ATTENTION}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        chosen = getattr(sys.modules.get(_ATTENTION_MODULE), "_attention_backends", {})
        chosen["backend_selection_requires_update"] = True
        if quantization := sys.modules.get(_QUANTIZATION_MODULE):
            quantization.FP8GlobalStateManager.reset()


def backend(kind: str) -> AbstractContextManager[None]:
    """Return the context that a run is computed in: on the CPU, megatron-core's CUDA calls are redirected there."""
    return nullcontext() if kind == GPU else cpu_backend.activate()
